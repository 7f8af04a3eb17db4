"""Teacher forcing: given tokens read under several schedules at once, and how far apart the readings are."""

from collections.abc import Iterator, Sequence

import numpy as np

from tinydrug.engine.runtime import Part
from tinydrug.engine.sampling import log_softmax
from tinydrug.engine.session import Session
from tinydrug.errors import NumericalError

ROWS = 256  # of logits that are in memory at once, if there are no more sequences than that


def read(sessions: Sequence[Session], ids: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Feed these tokens to each session, under its own noise -> (position of the first, logits (N, t, V)
    float32) for t of them at a time. At most `chunk` sessions. NumericalError if a logit is not finite."""
    runtime = sessions[0].runtime
    for session in sessions:
        session.check(ids)
    t = max(1, min(ROWS, runtime.chunk) // len(sessions))
    for at in range(0, len(ids), t):
        piece = ids[at : at + t]
        parts = [Part(s, piece, not s.schedule.is_sober, len(piece)) for s in sessions]
        logits = runtime.step(parts).reshape(len(sessions), len(piece), -1)
        if not np.isfinite(logits).all():
            raise NumericalError(
                "a logit is NaN or infinite: the weights are damaged or overflow, try --check-tensors"
            )
        yield at, logits


def divergence(sober: np.ndarray, drugged: np.ndarray) -> np.ndarray:
    """KL(sober || drugged) of next tokens in nats: logits (T, V), (N, T, V) -> (N, T) float64."""
    out = np.empty(drugged.shape[:-1])
    for t, row in enumerate(sober):
        log_p = log_softmax(row)  # (V,)
        p = np.exp(log_p)
        out[:, t] = [p @ (log_p - log_softmax(other)) for other in drugged[:, t]]
    return np.maximum(out, 0)  # rounding, where they are the same


def cut(ids: Sequence[int], size: int, bos: int | None) -> list[list[int]]:
    """A text in pieces of at most `size` tokens, each after the token that begins a text, if it has one."""
    if len(ids) and ids[0] == bos:
        return [[bos, *ids[at : at + size - 1]] for at in range(1, len(ids), size - 1)]
    return [list(ids[at : at + size]) for at in range(0, len(ids), size)]
