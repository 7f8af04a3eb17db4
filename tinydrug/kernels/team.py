"""A team of threads that run one forward pass together, and meet at atomic barriers.

Every thread runs `serve`. Thread 0 is the caller; the others are helpers that spin for a while after a
step, then sleep on a lock in Python. The low byte of a job number is its number of threads, which may
change from step to step: no bit of a result does. A barrier costs 0.1 to 1 microseconds. Who waits there for
long sleeps until woken: beside other programs a thread has a share of a core, which spinning would use up,
and yielding forfeits. So it is left for when all can go on, and threads come to have their turns together.
"""

import os
import threading

import numpy as np

from tinydrug.kernels.atomics import (
    atomic_add,
    atomic_load,
    atomic_store,
    atomic_swap,
    call_at,
    cycles,
    pause,
    sleep_while,
    wake,
)
from tinydrug.kernels.jit import helper, inline, kernel
from tinydrug.kernels.kinds import int64
from tinydrug.kernels.memory import aligned
from tinydrug.kernels.tables import CALL, OPERATION, rows_of

# Byte offsets in the team's memory, each on a cache line of its own.
JOB, ARRIVED, GENERATION, SLEEPERS, CLAIMED, DONE, PARKED = 0, 64, 128, 192, 256, 320, 384
SPIN = 3000  # pauses before sleeping at a barrier: about 80 microseconds
LINGER = 100_000  # pauses a helper waits for the next step before it sleeps: about 3 milliseconds
STOP = 255
call_operation = call_at(OPERATION)


@helper
def barrier(sync, n):
    """Wait until all n threads are here. The last one resets the counter of claimed units."""
    if n == 1:
        atomic_store(sync + CLAIMED, 0)
        return
    generation = atomic_load(sync + GENERATION)
    if atomic_add(sync + ARRIVED, 1) == n - 1:
        atomic_store(sync + ARRIVED, 0)
        atomic_store(sync + CLAIMED, 0)
        atomic_add(sync + GENERATION, 1)
        if atomic_load(sync + SLEEPERS) > 0:
            wake(sync + GENERATION)
        return
    for _ in range(SPIN):
        if atomic_load(sync + GENERATION) != generation:
            return
        pause()
    atomic_add(sync + SLEEPERS, 1)
    while atomic_load(sync + GENERATION) == generation:
        sleep_while(sync + GENERATION, generation)
    atomic_add(sync + SLEEPERS, -1)


@inline
def claim(call):
    """The next unit of work of this operation, for whoever asks first."""
    return atomic_add(call.sync + CLAIMED, 1)


@helper
def forward(call, tid, n):
    """All operations in order, this thread's share of each."""
    for i in range(call.n_ops):
        op = call.ops[i]
        start = cycles() if call.profile else 0
        if op.barrier_alone if rows_of(call, op) == 1 else op.barrier_many:
            barrier(call.sync, n)
        call_operation(op.kernel, call, op, tid, n)
        if call.profile and tid == 0:
            op.cycles += cycles() - start
    barrier(call.sync, n)


@kernel(int64(CALL, int64, int64))
def serve(call, tid, job):
    """Thread 0: one step. A helper: steps as jobs appear, until none came for a while (it returns the last
    job it saw) or the team stops (-1)."""
    sync, waited = call.sync, 0
    while True:
        while tid > 0 and atomic_load(sync + JOB) == job:
            pause()
            waited += 1
            if waited > LINGER:
                atomic_store(sync + PARKED + 8 * tid, 1)
                # Look once more, now that the flag is up: either we still see the old job and sleep, or we
                # take the flag down ourselves, or it is down already and a lock is being released for us.
                if atomic_load(sync + JOB) == job or atomic_swap(sync + PARKED + 8 * tid, 0) == 0:
                    return job
                break
        job = atomic_load(sync + JOB)
        n = job & 255
        if n == STOP:
            return -1
        if tid < n:
            forward(call, tid, n)
            waited = 0  # a step for fewer threads does not keep this one awake
        if tid == 0:
            atomic_store(sync + DONE, job)
            return job


@kernel(int64(int64, int64, int64))
def post(sync, n, helpers):
    """Announce a job for n threads; bit i of the result: helper i is needed, sleeps and must be woken."""
    atomic_store(sync + JOB, (atomic_load(sync + JOB) | 255) + 1 + n)
    asleep = 0
    for i in range(1, min(helpers + 1, n)):
        asleep |= atomic_swap(sync + PARKED + 8 * i, 0) << i
    return asleep


class Team:
    """n threads for the calls of one `call` table. Threads start at the first run, and again in a forked
    child."""

    def __init__(self, call: np.ndarray, threads: int):
        self.threads = threads
        self._call = call
        self._sync = aligned(PARKED + 8 * (threads + 8), np.uint8)
        call["sync"] = self._sync.ctypes.data
        self._locks: list[threading.Lock] = []
        self._helpers: list[threading.Thread] = []
        self._asleep = 0  # bit i: helper i sleeps and must be woken
        self._pid = -1

    def run(self, threads: int) -> None:
        """One forward pass over what the call table says, by this many of the team's threads."""
        if self._pid != os.getpid():
            self._start()
        words = self._sync.view(np.int64)
        try:
            self._post(threads)
            serve(self._call.ctypes.data, 0, 0)
        finally:  # Ctrl-C may come when helpers have begun and this thread has not: its share must be done
            self._wake()
            if words[JOB // 8] != words[DONE // 8]:
                serve(self._call.ctypes.data, 0, 0)

    def close(self) -> None:
        """Let the helpers go, and wait for it: one that lingered would join in the next team's work."""
        helpers = self._helpers
        self.dismiss()
        for thread in helpers:
            thread.join()

    def dismiss(self) -> None:
        """Let the helpers go without waiting: for a team that will not work again."""
        if self._pid == os.getpid():
            self._post(STOP)
        self._helpers, self._pid = [], -1

    def _start(self) -> None:
        self._sync[:] = 0  # nobody else looks at it: `close` has waited, and a forked child is alone
        self._locks, self._asleep = [threading.Lock() for _ in range(self.threads)], 0
        for lock in self._locks:
            lock.acquire()
        self._helpers = [
            threading.Thread(
                target=self._help, args=(tid, self._locks[tid]), daemon=True, name=f"tinydrug-{tid}"
            )
            for tid in range(1, self.threads)
        ]
        for thread in self._helpers:
            thread.start()
        self._pid = os.getpid()

    def _help(self, tid: int, lock: threading.Lock) -> None:
        job = 0
        while (job := serve(self._call.ctypes.data, tid, job)) >= 0:
            lock.acquire()

    def _post(self, n: int) -> None:
        self._asleep |= post(self._sync.ctypes.data, n, len(self._locks) - 1)
        self._wake()

    def _wake(self) -> None:
        """Wake who sleeps; done again after an interruption, it goes on where it was."""
        while self._asleep:
            tid = self._asleep.bit_length() - 1
            self._asleep ^= 1 << tid
            self._locks[tid].release()
