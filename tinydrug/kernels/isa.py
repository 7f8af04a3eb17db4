"""Which int8 dot product this machine has: chosen once, forced by TINYDRUG_ISA for tests."""

import ctypes
import os
import sys

import llvmlite.binding as llvm

from tinydrug.errors import ConfigError

_VNNI = ("avx512f", "avx512vnni")
_NEEDS = {  # best first: features of the CPU
    "amx": (*_VNNI, "amx-tile", "amx-int8"),
    "avx512vnni": _VNNI,
    "avx2": ("avx2",),
    "portable": (),
}
KNOWN = tuple(_NEEDS)


def _tiles_allowed() -> bool:
    """Linux hands out the tile registers on request (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA)."""
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None, use_errno=True).syscall(158, 0x1023, 18) == 0


def _choose() -> str:
    features, forced = llvm.get_host_cpu_features(), os.environ.get("TINYDRUG_ISA")
    able = [name for name, needs in _NEEDS.items() if all(features.get(need, False) for need in needs)]
    if "amx" in able and forced in (None, "amx") and not _tiles_allowed():
        able.remove("amx")
    if forced is None:
        return able[0]
    if forced not in able:
        raise ConfigError(f"TINYDRUG_ISA={forced}: this machine runs {', '.join(able)}", "TINYDRUG_ISA")
    return forced


CPU = llvm.get_host_cpu_name()
ISA = _choose()
WIDE_LOOKUP = ISA in ("amx", "avx512vnni") and llvm.get_host_cpu_features().get("avx512vbmi", False)
