"""Which theta has a given effect on a model: the mean KL(sober || drugged) a token, and its inverse.

Tokens are read in pieces, each from an empty cache, everything under noise, and only positions that noise may
touch count. All doses are solved in step: each round reads every piece once, for all of them and sober.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinydrug.engine.forced import divergence, read
from tinydrug.engine.runtime import Runtime
from tinydrug.engine.session import Session
from tinydrug.noise import SOBER, Dose, Schedule

LANES = 15  # doses that are read at once, beside the sober reading
NEAR, TOLERANCE = 0.1, 0.01  # of the KL, relative: for the first rounds, and in the end
ROUNDS = 12
FIRST = 0.3  # radians, where the search begins
FEW = 256  # tokens of the first rounds
LARGEST = {"rotation": 3.141, "L2": 64.0, "NL": 64.0}  # theta by form: beyond it there is no more to lose


@dataclass(frozen=True)
class Found:
    """A dose with the theta that comes nearest to an effect, and what it has: KL in nats, its standard error,
    and whether that is what was asked for."""

    dose: Dose
    kl: float
    error: float
    reached: bool


def effects(
    runtime: Runtime,
    pieces: Sequence[Sequence[int]],
    schedules: Sequence[Schedule],
    seed: int = 0,
    sink: int = SOBER.sink,
) -> list[list[np.ndarray]]:
    """KL(sober || drugged) in nats by schedule and piece, each (T,) at positions from the sink on."""
    out: list[list[np.ndarray]] = []
    for at in range(0, len(schedules), LANES):
        some = schedules[at : at + LANES]
        sessions = [Session(runtime, each, seed) for each in (SOBER, *some)]
        found = [[] for _ in some]
        for piece in pieces:
            for session in sessions:
                session.reset()
            rows = [divergence(logits[0], logits[1:]) for _, logits in read(sessions, piece)]
            for lane, values in zip(found, np.concatenate(rows, 1), strict=True):
                lane.append(values[sink:])
        out += found
    return out


def solve(
    runtime: Runtime,
    pieces: Sequence[Sequence[int]],
    doses: Sequence[Dose],
    *,
    sink: int = SOBER.sink,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Found]:
    """For each open dose, the same with the theta that has its effect, or comes nearest to it.

    A dose that fades is measured before it does. progress(done, total) counts doses, and may raise to stop.
    """
    searches = [_Search(dose) for dose in doses]
    for few in (True, False):  # a few tokens tell where to look
        some = _first(pieces, FEW) if few else pieces
        for search in searches:
            search.begin(NEAR if few else TOLERANCE)
        for _ in range(ROUNDS):
            todo = [search for search in searches if not search.done]
            if not todo:
                break
            schedules = [Schedule((search.dose_at(search.theta),), sink=sink) for search in todo]
            for search, kl in zip(todo, effects(runtime, some, schedules, seed, sink), strict=True):
                search.note(kl)
            progress(sum(search.done for search in searches) + len(searches) * (not few), 2 * len(searches))
    return [search.found() for search in searches]


class _Search:
    """One theta on its way to its effect: secant steps in logarithms, where KL is nearly a straight line."""

    def __init__(self, dose: Dose):
        self.dose, self.target, self.done = dose, dose.theta.kl, False
        self.most = LARGEST[dose.form] / max(1.0 if dose.where is None else dose.where.peak, 1e-3)
        self.theta = self._rounded(FIRST) if self.target else 0.0
        self._slope = 2.0  # KL grows as theta squared, at first

    def begin(self, tolerance: float) -> None:
        """Start from where the last search has come to."""
        self._tolerance, self._points, self.done = tolerance, {}, self.target == 0

    def dose_at(self, theta: float) -> Dose:
        """What is measured: the dose with this theta, before any ramp has begun to lower it."""
        return replace(self.dose, theta=theta, time=replace(self.dose.time, ramp="constant", over=0.0))

    def note(self, kl: Sequence[np.ndarray]) -> None:
        """What came out at this theta; choose the next one, or be done."""
        values = np.concatenate(kl)
        mean = float(values.mean()) if values.size else 0.0
        self._points[self.theta] = (mean, standard_error(values))
        low = [theta for theta, (kl, _) in self._points.items() if kl < self.target]
        high = [theta for theta, (kl, _) in self._points.items() if kl >= self.target]
        following = self._next(max(low, default=None), min(high, default=None))
        self.done = abs(mean / self.target - 1) <= self._tolerance or following in self._points
        if not self.done:
            self.theta = following

    def _next(self, low: float | None, high: float | None) -> float:
        if low is not None and high is not None:
            (x0, y0), (x1, y1) = self._logs(low), self._logs(high)
            x = x0 - y0 * (x1 - x0) / (y1 - y0) if math.isfinite(y0) else (x0 + x1) / 2
            edge = 0.1 * (x1 - x0)  # an end that never moves would make the steps ever smaller
            return self._rounded(math.exp(min(max(x, x0 + edge), x1 - edge)))
        x, y = self._logs(self.theta)
        if len(self._points) > 1:
            (x0, y0), (x1, y1) = (self._logs(theta) for theta in list(self._points)[-2:])
            if math.isfinite(y0 + y1):
                self._slope = min(max((y1 - y0) / (x1 - x0), 0.5), 4.0)
        step = -y / self._slope if math.isfinite(y) else math.log(8)
        return self._rounded(math.exp(x + min(max(step, -math.log(8)), math.log(8))))

    def _logs(self, theta: float) -> tuple[float, float]:
        kl = self._points[theta][0]
        return math.log(theta), math.log(kl / self.target) if kl else -math.inf

    def _rounded(self, theta: float) -> float:
        """At most what makes sense, in four digits: it will be read and typed."""
        return float(f"{min(theta, self.most):.4g}")

    def found(self) -> Found:
        if self.target == 0:
            return Found(replace(self.dose, theta=0.0), 0.0, 0.0, True)
        theta = min(self._points, key=lambda theta: abs(self._points[theta][0] / self.target - 1))
        kl, error = self._points[theta]
        return Found(replace(self.dose, theta=theta), kl, error, abs(kl / self.target - 1) <= 5 * TOLERANCE)


def standard_error(values: np.ndarray, block: int = 32) -> float:
    """Of the mean of values along a text, (T,): neighbours are alike, so blocks of them count as one draw.
    NaN for fewer than two blocks."""
    n = len(values) // block
    if n < 2:
        return math.nan
    means = values[: n * block].reshape(n, block).mean(1)
    return float(means.std(ddof=1) / math.sqrt(n))


def _first(pieces: Sequence[Sequence[int]], n: int) -> list[Sequence[int]]:
    """As many of the pieces as hold n tokens."""
    some, held = [], 0
    for piece in pieces:
        if held < n:
            some.append(piece)
            held += len(piece)
    return some
