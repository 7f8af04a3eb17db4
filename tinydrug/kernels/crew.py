"""Compiling what a model needs by several processes: most of the time is spent in Numba's own Python, which
threads of one process would share.

This process and workers, started for that, take kernels from one list. Workers keep what they compile where
this one finds it (jit.py), and say so by a line. Whatever becomes of them, what is missing in the end is
compiled here.
"""

import importlib
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

from tinydrug.kernels.jit import KERNELS, Kernel, cache_folder

FEW = 4  # missing kernels that are not worth a worker, which takes a second to start
MOST = 4  # processes: two big kernels and attention take nearly all of the time
WORKER = "import sys; sys.path[:] = sys.argv[1:]; from tinydrug.kernels.crew import work; work()"


def compile_all(
    kernels: Sequence[Kernel], processes: int, progress: Callable[[float], None] | None = None
) -> None:
    """Have all of these at hand, loaded or compiled, by so many processes at most. progress: called with the
    share that is done."""
    missing = deque(sorted((k for k in kernels if not k.is_cached), key=lambda kernel: not kernel.big))
    total = len(missing)
    # A program that has Python in it may not be one that runs a line of it.
    able = total > FEW and cache_folder() and Path(sys.executable or "").name.startswith("python")
    workers = [
        Thread(target=_direct, args=(missing,), daemon=True) for _ in range(1, min(processes, MOST)) if able
    ]
    for worker in workers:
        worker.start()
    try:
        with suppress(IndexError):  # until the list is empty
            while True:
                missing.popleft().address  # noqa: B018 - compiles it
                if progress:
                    progress(1 - len(missing) / total)
    finally:
        missing.clear()
    for worker in workers:
        worker.join()
    for kernel in kernels:
        kernel.address  # noqa: B018 - loads it, or compiles what a worker did not


def _direct(missing: deque[Kernel]) -> None:
    """Start a worker and have it compile kernels of the list, until that is empty."""
    command = [sys.executable, "-c", WORKER, *sys.path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with suppress(OSError, IndexError), subprocess.Popen(command, text=True, **pipes) as worker:
        done = "begin"
        while done:  # else it died
            kernel = missing.popleft()
            print(kernel.module, kernel.name, file=worker.stdin, flush=True)
            done = worker.stdout.readline()


def work() -> None:
    """In a worker: compile the kernels that come, a line each."""
    for line in sys.stdin:
        module, name = line.split()
        importlib.import_module(module)
        KERNELS[name].address  # noqa: B018 - compiles it
        print(name, flush=True)
