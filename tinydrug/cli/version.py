"""--version: what to put into a report."""

import os
import platform
from importlib.metadata import version

from tinydrug import __version__
from tinydrug.engine.threads import available_threads


def describe() -> str:
    """Versions, processor and folder of compiled kernels, a line each. Numba is not imported."""
    from tinydrug.kernels.isa import CPU, ISA  # LLVM

    lines = [f"tinydrug {__version__}", f"python {platform.python_version()}"]
    lines += [f"{name} {version(name)}" for name in ("numpy", "numba", "llvmlite")]
    lines += [
        f"processor {CPU}, {ISA}, {available_threads()} threads",
        f"kernels in {kernel_folder()}",
    ]
    return "\n".join(lines)


def kernel_folder() -> str:
    """Where compiled kernels are kept, by the rule of kernels.jit, which would import Numba."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("TINYDRUG_CACHE_DIR", os.path.join(caches, "tinydrug"))
