"""The meter: what a dose does on a text, teacher-forced: next-token distributions with and without noise.

The text is read in pieces, each from an empty cache, everything under noise; positions that noise may not
touch do not count. Standard errors take blocks of 32 neighbouring tokens as one draw.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from tinydrug.api import Engine
from tinydrug.engine.calibrate import LANES, standard_error
from tinydrug.engine.forced import read
from tinydrug.engine.sampling import log_softmax
from tinydrug.engine.session import Session
from tinydrug.errors import PromptError
from tinydrug.lab.page import need
from tinydrug.lab.progress import Progress, Work
from tinydrug.noise import SOBER, Schedule

MEASURES = {  # of a position: what it is; p: sober, q: drugged
    "kl": "KL(p||q), nats",
    "reverse": "KL(q||p), nats",
    "js": "Jensen-Shannon divergence of p and q, nats",
    "flip": "whether q's likeliest token is another than p's",
    "rank": "the rank of q's likeliest token in p, from 1",
    "p_choice": "p of q's likeliest token",
    "entropy": "entropy of q minus entropy of p, nats",
}


@dataclass(frozen=True)
class Reading:
    """A schedule, and of each of MEASURES the mean over `tokens` positions and its standard error."""

    schedule: Schedule
    tokens: int
    mean: dict[str, float]
    error: dict[str, float]

    def row(self) -> dict:
        """For a table."""
        found = {"drug": str(self.schedule), "tokens": self.tokens}
        for name in MEASURES:
            found |= {name: self.mean[name], f"{name}_error": self.error[name]}
        return found


def measures(sober: np.ndarray, drugged: np.ndarray) -> dict[str, float]:
    """MEASURES of one position: logits (V,), (V,)."""
    from scipy.special import entr, rel_entr

    p, q = np.exp(log_softmax(sober)), np.exp(log_softmax(drugged))
    m, choice = (p + q) / 2, int(drugged.argmax())
    return {
        "kl": rel_entr(p, q).sum(),
        "reverse": rel_entr(q, p).sum(),
        "js": (rel_entr(p, m).sum() + rel_entr(q, m).sum()) / 2,
        "flip": choice != int(sober.argmax()),
        "rank": 1 + np.count_nonzero(sober > sober[choice]),
        "p_choice": p[choice],
        "entropy": entr(q).sum() - entr(p).sum(),
    }


def meter(
    engine: Engine,
    pieces: Sequence[Sequence[int]],
    schedules: Sequence[Schedule],
    seed: int = 1,
    progress: Progress | None = None,
) -> list[Reading]:
    """A reading of each schedule, in order; all are read together, beside a sober reading.

    pieces: as Engine.pieces gives them. Progress counts pieces; those that are read when it raises
    KeyboardInterrupt are kept. Raises PromptError for a text that noise does not reach, DrugError.
    """
    schedules = [engine.resolve(schedule) for schedule in schedules]
    for schedule in schedules:
        check_text(pieces, schedule.sink)
    need("scipy")
    groups = [range(at, min(at + LANES, len(schedules))) for at in range(0, len(schedules), LANES)]
    found: list[list[np.ndarray]] = [[] for _ in schedules]
    sessions = [Session(engine.runtime, schedule, seed) for schedule in schedules]
    sober = Session(engine.runtime, SOBER)
    with ThreadPoolExecutor(engine.threads) as pool:
        for group, piece in Work([(group, piece) for group in groups for piece in pieces], progress):
            lanes = [sober, *(sessions[i] for i in group)]
            for session in lanes:
                session.reset()
            for start, (first, *others) in read(lanes, piece):
                for i, lane in zip(group, pool.map(partial(_measured, first), others), strict=True):
                    found[i].append(lane[max(0, schedules[i].sink - start) :])
    return [_reading(*each) for each in zip(schedules, found, strict=True)]


def check_text(pieces: Sequence[Sequence[int]], sink: int) -> None:
    """PromptError if noise can touch none of these tokens."""
    if all(len(piece) <= sink for piece in pieces):
        raise PromptError(f"the text is too short: noise leaves the first {sink} tokens alone")


def halves(pieces: Sequence[Sequence[int]]) -> tuple[list, list]:
    """Every other piece, to find angles on, and those between, to hold back. PromptError for one piece."""
    if len(pieces) < 2:
        raise PromptError("the text is too short to hold a part of it back: give more, or smaller --piece")
    return list(pieces[::2]), list(pieces[1::2])


def _measured(sober: np.ndarray, drugged: np.ndarray) -> np.ndarray:
    """Logits (T, V), (T, V) -> (T, measures)."""
    return np.array([list(measures(*rows).values()) for rows in zip(sober, drugged, strict=True)], float)


def _reading(schedule: Schedule, found: Sequence[np.ndarray]) -> Reading:
    values = np.concatenate([np.empty((0, len(MEASURES))), *found])  # (T, measures)
    with np.errstate(invalid="ignore"):
        means = values.sum(0) / len(values)
    errors = [standard_error(column) for column in values.T]
    return Reading(
        schedule,
        len(values),
        dict(zip(MEASURES, means.tolist(), strict=True)),
        dict(zip(MEASURES, errors, strict=True)),
    )
