"""How many threads a decoding step uses: all, or one while the machine is busy with something else.

Threads meet at barriers hundreds of times a token. When another process takes a core, all wait for the one
that lost it, and two threads can be slower than one. The number changes no bit, so the clock chooses it.
"""

import math

TRIAL = 6  # steps that judge the other number,
BETTER = 0.8  # of what they would have taken before, at most: so few can be lucky
SLOWER = 1.6  # times the best known: what counts as a disturbance
CLIPPED = 4.0  # times the best known: what one step can count at most, since a hiccup is no disturbance
WEIGHT = 0.1  # of the last step in the running mean
RETRY, LONGEST = 24, 192  # disturbed steps before a trial: twice as many after each that changed nothing
FORGET = 1.002  # growth of the best known time a step: contexts grow, and so do honest times


class Pace:
    """Chooses between `threads` and 1 for steps of one row; `note` tells it how long a step took."""

    def __init__(self, threads: int):
        self.threads = self.using = threads
        self._best = math.inf  # seconds of an undisturbed step on all threads
        self._mean = math.inf  # seconds of recent steps,
        self._clipped = math.inf  # and with none that counts for more than CLIPPED
        self._trial: list[float] | None = None  # of the other number, while it is being tried
        self._steps = 0  # since the last trial, or since the machine was quiet
        self._patience = RETRY

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
            if len(self._trial) == TRIAL or self._has_failed():
                self._judge()
            return
        self._steps += 1
        self._mean = _towards(self._mean, seconds)
        if self.using == self.threads:
            self._best = min(self._best * FORGET, seconds)
            most = CLIPPED * self._best
            self._clipped = min(most, _towards(self._clipped, min(seconds, most)))
            if not self._is_disturbed():
                self._steps = 0

    @property
    def _other(self) -> int:
        return 1 if self.using == self.threads else self.threads

    def _is_disturbed(self) -> bool:
        return self.using == 1 or self._clipped > SLOWER * self._best

    def _is_due(self) -> bool:
        return self._is_disturbed() and self._steps >= self._patience

    def _has_failed(self) -> bool:
        """Whether the trial, even if no more steps came, is not clearly faster."""
        return sum(self._trial) > BETTER * TRIAL * self._mean

    def _judge(self) -> None:
        if self._has_failed():
            self._patience = min(2 * self._patience, LONGEST)
        else:
            self._mean, self._patience = sum(self._trial) / TRIAL, RETRY
            if self._other == self.threads:
                self._best, self._clipped = min(self._best, *self._trial), self._mean
            self.using = self._other
        self._trial, self._steps = None, 0


def _towards(mean: float, seconds: float) -> float:
    """The running mean after another step."""
    return seconds if math.isinf(mean) else mean + WEIGHT * (seconds - mean)
