"""Compiling kernels: when, with which options, and where the machine code is kept between processes.

Nothing compiles at import. A `Kernel` is a C function that compiles on first use and is cached in a
private folder whose name is a hash of every kernel source, the versions and the CPU: Numba's own cache
looks at one file only, and would run stale code after a callee changed. The cache is pickle, hence code:
the folder belongs to the user, mode 0700, or is not used.
"""

import ctypes
import functools
import hashlib
import logging
import os
import pickle
import stat
import threading
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba import njit, types
from numba.core import compiler
from numba.core.ccallback import CFunc

from tinydrug.kernels.isa import ISA

log = logging.getLogger("tinydrug")

# The one place where Numba options are spelled. No fastmath: NaN and infinity mean something, and the order
# of a sum is a promise.
OPTIONS = {"error_model": "numpy"}
inline = njit(forceinline=True, **OPTIONS)  # a helper that disappears into its kernel
helper = njit(**OPTIONS)  # a helper big enough to stay a function
_lock = threading.RLock()


def _source_hash() -> str:
    features = llvm.get_host_cpu_features().flatten()
    parts = [numba.__version__, llvmlite.__version__, np.__version__, llvm.get_host_cpu_name(), features, ISA]
    for source in sorted(Path(__file__).parent.glob("*.py")):
        parts.append(source.read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def cache_folder() -> Path | None:
    """The private folder of compiled kernels ($TINYDRUG_CACHE_DIR, else the user's cache), or None with one
    warning."""
    base = os.environ.get("TINYDRUG_CACHE_DIR")
    if base is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        base = os.path.join(home, "tinydrug")
    folder = Path(base) / f"jit-{_source_hash()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
        if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o022:
            raise PermissionError("it can be written by others")
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        log.warning("compiled kernels are not kept: %s: %s (set TINYDRUG_CACHE_DIR)", folder, error)
        return None
    return folder


class _Cache:
    """What Numba asks of a cache, for one kernel: one file."""

    def __init__(self, name: str):
        folder = cache_folder()
        self.path = folder and folder / name

    def load_overload(self, signature, target_context):
        try:
            with open(self.path, "rb") as file:
                payload = pickle.load(file)
            target_context.refresh()
            return compiler.CompileResult._rebuild(target_context, *payload)
        except (
            OSError,
            TypeError,
            ValueError,
            EOFError,
            AttributeError,
            ImportError,
            pickle.UnpicklingError,
        ):
            return None  # no folder (path is None), no file, or a damaged one: compile

    def save_overload(self, signature, result):
        if self.path is None:
            return
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(pickle.dumps(result._reduce(), protocol=pickle.HIGHEST_PROTOCOL))
            os.replace(temporary, self.path)
        except OSError as error:  # a full disk must not stop a run
            log.warning("compiled kernel %s is not kept: %s", self.path, error)
            temporary.unlink(missing_ok=True)


class Kernel:
    """A C function, compiled (or loaded) on first use. `address` is what tables hold; calling it goes through
    ctypes, which lets go of the GIL."""

    def __init__(self, function, signature, name, cached=True):
        # The name is also the symbol: kernels made by one factory must differ in it.
        function.__qualname__ = function.__name__ = self.name = name
        self._function, self._signature, self._cached = function, signature, cached

    @functools.cached_property
    def address(self) -> int:
        return self._compiled.address

    @functools.cached_property
    def _compiled(self):
        with _lock:
            compiled = CFunc(
                self._function,
                (self._signature.args, self._signature.return_type),
                locals={},
                options=OPTIONS | {"nopython": True},
            )
            if self._cached:
                compiled._cache = _Cache(self.name)
            compiled.compile()
            return compiled

    @functools.cached_property
    def _call(self):
        kinds = {types.void: None, types.float32: ctypes.c_float}
        args = [kinds.get(t, ctypes.c_int64) for t in self._signature.args]
        result = kinds.get(self._signature.return_type, ctypes.c_int64)
        return ctypes.CFUNCTYPE(result, *args)(self.address)

    def __call__(self, *args):
        return self._call(*args)

    @property
    def is_cached(self) -> bool:
        """Whether the machine code is at hand: using the kernel costs milliseconds, not a second."""
        return "_compiled" in self.__dict__ or bool((path := _Cache(self.name).path) and path.exists())


def kernel(signature, name=None, cached=True):
    """Decorator: a function of this signature becomes a Kernel; cached=False if a user's code is in it."""
    return lambda function: Kernel(function, signature, name or function.__name__, cached)
