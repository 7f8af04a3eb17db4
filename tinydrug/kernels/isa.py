"""Which int8 dot product this machine has: chosen once, forced by TINYDRUG_ISA for tests."""

import os

import llvmlite.binding as llvm

from tinydrug.errors import ConfigError

KNOWN = ("avx512vnni", "avx2", "portable")  # best first


def _choose() -> str:
    features = llvm.get_host_cpu_features()
    able = [
        name
        for name, needs in (("avx512vnni", ("avx512f", "avx512vnni")), ("avx2", ("avx2",)), ("portable", ()))
        if all(features.get(need, False) for need in needs)
    ]
    forced = os.environ.get("TINYDRUG_ISA")
    if forced is None:
        return able[0]
    if forced not in able:
        raise ConfigError(f"TINYDRUG_ISA={forced}: this machine runs {', '.join(able)}", "TINYDRUG_ISA")
    return forced


CPU = llvm.get_host_cpu_name()
ISA = _choose()
