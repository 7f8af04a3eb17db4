"""How many threads a decoding step uses: all, or one while the machine is busy with something else.

Threads meet at barriers hundreds of times a token. When another process takes a core, all wait for the one
that lost it, and two threads can be slower than one. The number changes no bit, so the clock chooses it.
"""

import math

TRIAL = 3  # steps that judge the other number
SLOWER = 1.6  # times the best known: what counts as a disturbance
RETRY = 48  # steps on one thread before all are tried again
FORGET = 1.002  # growth of the best known time a step: contexts grow, and so do honest times


class Pace:
    """Chooses between `threads` and 1 for steps of one row; `note` tells it how long a step took."""

    def __init__(self, threads: int):
        self.threads = self.using = threads
        self._best = math.inf  # seconds of an undisturbed step on all threads
        self._recent = {threads: math.inf, 1: math.inf}  # seconds of the last trial or of the running mean
        self._trial: list[float] | None = None  # of the other number, while it is being tried
        self._steps = 0  # since the last trial

    def choose(self) -> int:
        """Threads for the next step."""
        if self.threads == 1:
            return 1
        if self._trial is None and self._is_due():
            self._trial = []
        return self.using if self._trial is None else self._other

    def note(self, seconds: float) -> None:
        """The step that `choose` was asked for took so long."""
        if self._trial is not None:
            self._trial.append(seconds)
            if len(self._trial) == TRIAL:
                self._judge(min(self._trial))
            return
        self._steps += 1
        mean = self._recent[self.using]
        self._recent[self.using] = seconds if math.isinf(mean) else 0.75 * mean + 0.25 * seconds
        if self.using == self.threads:
            self._best = min(self._best * FORGET, seconds)

    @property
    def _other(self) -> int:
        return 1 if self.using == self.threads else self.threads

    def _is_due(self) -> bool:
        if self.using == 1:
            return self._steps >= RETRY
        return self._steps >= TRIAL and self._recent[self.using] > SLOWER * self._best

    def _judge(self, seconds: float) -> None:
        self._recent[self._other] = seconds
        if self._other == self.threads:
            self._best = min(self._best, seconds)
        if seconds < self._recent[self.using]:
            self.using = self._other
        self._trial, self._steps = None, 0
