"""Compiling kernels: when, and where the machine code is kept between processes.

Nothing compiles at import. A `Kernel` is a C function that Numba compiles on first use, to an object file in
a private folder whose name is a hash of every kernel source, the versions and the CPU: Numba's own cache
looks at one file only, and would run stale code after a callee changed. What is found there is loaded by LLVM
alone, without Numba. It is code: the folder belongs to the user, mode 0700, or is not used.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from tinydrug.kernels.isa import CPU, ISA
from tinydrug.kernels.kinds import Signature, f32, void

log = logging.getLogger("tinydrug")
llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
_lock = threading.RLock()
KERNELS: dict[str, "Kernel"] = {}  # those whose machine code is kept, by name


class Helper:
    """A function that kernels call, and Python as it stands."""

    def __init__(self, function: Callable, **options):
        self.function, self.options = function, options
        functools.update_wrapper(self, function)

    def __call__(self, *args):
        return self.function(*args)

    @functools.cached_property
    def _jitted(self):
        from tinydrug.kernels import compiler

        return compiler.jitted(self.function, **self.options)

    @property
    def _numba_type_(self):
        return self._jitted._numba_type_


inline = functools.partial(Helper, forceinline=True)  # one that disappears into its kernel
helper = Helper  # one big enough to stay a function


def _source_hash() -> str:
    features = llvm.get_host_cpu_features().flatten()
    versions = [importlib.metadata.version("numba"), llvmlite.__version__, np.__version__]
    parts = [*versions, CPU, features, ISA]
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


def _read(path: Path | None) -> bytes | None:
    """The object code in a file, which begins with its digest, or None if there is none, or a damaged one."""
    try:
        data = path.read_bytes() if path else b""
    except OSError:
        return None
    digest, code = data[:32], data[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    except OSError as error:  # a full disk must not stop a run
        log.warning("compiled kernel %s is not kept: %s", path, error)
        temporary.unlink(missing_ok=True)


def _load(code: bytes) -> llvm.ExecutionEngine:
    """An engine that has object code in executable memory. Every kernel has its own: their helpers may share
    names."""
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


class Kernel:
    """A C function, compiled or loaded on first use. `address` is what tables hold; calling it goes through
    ctypes, which lets go of the GIL."""

    def __init__(self, function, signature, name, cached=True, big=False):
        # The name is also the symbol: kernels made by one factory must differ in it.
        function.__qualname__ = function.__name__ = self.name = name
        self._function, self._signature, self._cached = function, signature, cached
        self.module, self.big = function.__module__, big
        if cached:
            KERNELS[name] = self

    @functools.cached_property
    def address(self) -> int:
        with _lock:
            return self._loaded.get_function_address(self.name) if self._cached else self._compiled.address

    @functools.cached_property
    def _loaded(self) -> llvm.ExecutionEngine:
        code = _read(self._path)
        if code is None:
            from tinydrug.kernels import compiler

            code = compiler.object_code(self._function, self._signature, self.name)
            if self._path:
                _write(self._path, code)
        return _load(code)

    @functools.cached_property
    def _compiled(self):
        from tinydrug.kernels import compiler

        return compiler.in_this_process(self._function, self._signature)

    @property
    def _path(self) -> Path | None:
        folder = cache_folder()
        return folder and folder / self.name

    @functools.cached_property
    def _call(self):
        kinds = {void: None, f32: ctypes.c_float}
        args = [kinds.get(kind, ctypes.c_int64) for kind in self._signature.args]
        result = kinds.get(self._signature.result, ctypes.c_int64)
        return ctypes.CFUNCTYPE(result, *args)(self.address)

    def __call__(self, *args):
        return self._call(*args)

    @property
    def is_cached(self) -> bool:
        """Whether the machine code is at hand: using the kernel costs milliseconds, not a second."""
        return "address" in self.__dict__ or bool(self._path and self._path.exists())


def kernel(signature: Signature, name: str | None = None, cached: bool = True, big: bool = False) -> Callable:
    """Decorator: a function of this signature becomes a Kernel; cached=False if a user's code is in it; big
    if it takes seconds to compile."""
    return lambda function: Kernel(function, signature, name or function.__name__, cached, big)
