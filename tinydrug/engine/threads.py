"""How many threads this process may use: cores of its affinity, cut by the quota of its control group."""

import math
import os
from pathlib import Path

from tinydrug.errors import ConfigError

MAX_THREADS = 62  # what a team can count: its sleeping helpers are bits of one 64-bit word


def available_threads(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may run on, at most its quota rounded down, at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()[:2]
        if quota != "max":
            cores = min(cores, math.floor(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no control groups, no quota
    return max(1, min(cores, MAX_THREADS))


def check_threads(threads: int | None) -> int:
    """The number asked for, or all that may be used. ConfigError beyond the machine."""
    limit = available_threads()
    if threads is None:
        return limit
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= limit:
        raise ConfigError(
            f"--threads: {threads} is not between 1 and the {limit} cores this process may use", "threads"
        )
    return threads
