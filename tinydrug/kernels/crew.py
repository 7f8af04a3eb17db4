"""Compiling what a model needs by several processes: most of that is Numba's own Python, of which a process
runs one thread at a time.

This process and workers, started for that, take kernels from one list. Workers keep what they compile where
this one finds it (jit.py), and say so by a line. Whatever becomes of them, what is missing in the end is
compiled here.
"""

import importlib
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

from tinydrug.kernels.jit import KERNELS, Kernel, cache_folder

FEW = 4  # missing small kernels that are not worth a worker, which takes a second to start
MOST = 3  # processes: two linear maps and attention take nearly all of the time
PATIENCE = 60  # seconds that a worker may take when there is nothing left to do here
WORKER = "import sys; sys.path[:] = sys.argv[1:]; from tinydrug.kernels.crew import work; work()"


def compile_all(
    kernels: Sequence[Kernel], processes: int, progress: Callable[[float], None] | None = None
) -> None:
    """Have all of these at hand, loaded or compiled, by so many processes at most. progress: called with the
    share that is done, if something was missing."""
    missing = deque(k for big in (True, False) for k in kernels if k.big == big and not k.is_cached)
    total, progress = len(missing), progress or (lambda share: None)
    worth = total > FEW or sum(kernel.big for kernel in missing) > 1
    # The executable of an application that embeds Python may start the application.
    able = cache_folder() and Path(sys.executable or "").name.startswith("python")
    count = min(processes, MOST) - 1 if worth and able else 0
    workers = [Thread(target=_direct, args=(missing,), daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    if total:
        progress(0.0)
    try:
        with suppress(IndexError):  # until the list is empty
            while True:
                missing.popleft().address  # noqa: B018 - compiles it
                progress((total - len(missing)) / (total + 1))
    finally:
        missing.clear()
    for worker in workers:
        worker.join(PATIENCE)
    for kernel in kernels:
        kernel.address  # noqa: B018 - loads it, or compiles what a worker did not
    if total:
        progress(1.0)


def _direct(missing: deque[Kernel]) -> None:
    """Start a worker and have it compile kernels of the list, until that is empty."""
    flags = ["-I", *["-B"] * sys.dont_write_bytecode]
    command = [sys.executable, *flags, "-c", WORKER, *(path for path in sys.path if isinstance(path, str))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with suppress(OSError, ValueError, IndexError), subprocess.Popen(command, text=True, **pipes) as worker:
        try:
            done = "begin"
            while done:  # else it died
                kernel = missing.popleft()
                worker.stdin.write(f"{kernel.module} {kernel.name}\n")
                worker.stdin.flush()
                done = worker.stdout.readline()
        finally:
            worker.kill()  # its files are whole; it would not see the end of a pipe that a fork has, too


def work() -> None:
    """In a worker: compile the kernels that come, a line each."""
    for line in sys.stdin:
        module, name = line.split()
        importlib.import_module(module)
        KERNELS[name].address  # noqa: B018 - compiles it
        os.write(1, b"done\n")
