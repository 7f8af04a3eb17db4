"""What a figure needs beside it to mean anything: machine, load, versions, and the limits read in the same
minute."""

import os
import platform
import statistics
import subprocess
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

import tinydrug
from tinydrug.kernels.isa import ISA
from tinydrug.kernels.memory import aligned
from tinydrug.kernels.probe import dot_products, read_memory


def card(threads: int) -> dict:
    """The machine and the versions, as a flat dict."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "isa": ISA,
        "threads": threads,
        "load": [round(x, 2) for x in os.getloadavg()],
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "tinydrug": tinydrug.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("numba", "numpy", "llvmlite")},
    }


def together(work, threads: int) -> float:
    """Seconds until work(i) is done in every one of so many threads."""
    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


class Limits:
    """Memory read (GB/s) and int8 dot products (GOP/s, a multiply-add counts two) of so many threads, on
    demand."""

    def __init__(self, threads: int, nbytes: int = 1 << 30):
        self.threads = threads
        self._area = aligned(nbytes // 4, np.float32)
        self._area[:] = 1  # pages that were never written read faster than memory
        self._out = aligned((threads, 128), np.float32)

    def read_gbs(self, rounds: int = 3) -> float:
        part = self._area.nbytes // self.threads // 256 * 256

        def work(i):
            read_memory(self._area.ctypes.data + i * part, part, self._out[i].ctypes.data)

        return statistics.median(
            part * self.threads / together(work, self.threads) / 1e9 for _ in range(rounds)
        )

    def dot_gops(self, rounds: int = 3) -> float:
        count = 2_000_000

        def work(i):
            dot_products(count, self._area.ctypes.data, self._out[i].ctypes.data)

        ops = count * 8 * 64 * 2 * self.threads
        return statistics.median(ops / together(work, self.threads) / 1e9 for _ in range(rounds))


def show(title: str, columns: list[str], rows: list[list]) -> None:
    """A table for people, columns as wide as they need."""
    cells = [
        [
            f"{x:.3g}"
            if isinstance(x, float) and abs(x) < 100
            else f"{x:.0f}"
            if isinstance(x, float)
            else str(x)
            for x in row
        ]
        for row in rows
    ]
    widths = [
        max(len(c), *(len(row[i]) for row in cells)) if cells else len(c) for i, c in enumerate(columns)
    ]
    print(title)
    for row in [columns, *cells]:
        print(
            "  "
            + "  ".join(
                x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
            )
        )
    print(flush=True)
