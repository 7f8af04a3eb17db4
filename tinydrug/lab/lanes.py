"""One text read under many noises at once: the weights are read once for all of them."""

from collections.abc import Iterator, Sequence

import numpy as np

from tinydrug.api import Engine
from tinydrug.engine.runtime import Part
from tinydrug.errors import NumericalError, PromptError
from tinydrug.noise import Schedule

MOST = 64  # sequences at once
Noise = tuple[Schedule, int]  # and its seed


class Lanes:
    """Sequences that share their first tokens, which are read once and without noise; each reads the others
    under a noise of its own. `lanes` of them fit one forward pass. PromptError, ContextOverflow."""

    def __init__(self, engine: Engine, ids: Sequence[int], shared: int = 0):
        self.runtime, self._ids, self._shared = engine.runtime, list(ids), shared
        first = engine.session()
        first.check(ids)
        if shared:
            first.feed(self._ids[:shared], outputs=0)
        self.lanes = max(1, min(MOST, self.runtime.chunk // (len(ids) - shared)))
        self._sessions = [first]

    def read(self, noise: Sequence[Noise], outputs: int = 1) -> np.ndarray:
        """Logits (N, outputs, V) float32 after the last `outputs` tokens, for any number of noises."""
        groups = [noise[at : at + self.lanes] for at in range(0, len(noise), self.lanes)]
        return np.concatenate([self._read(group, outputs) for group in groups])

    def hidden(self, noise: Sequence[Noise]) -> tuple[np.ndarray, np.ndarray]:
        """After the last token, for at most `lanes` noises: logits (N, V), and the residual stream after
        every layer (N, L, D), float32."""
        *before, last = self._steps(noise, 1)
        for parts in before:
            self.runtime.step(parts)
        logits, states = self.runtime.hidden(last)
        return _sound(logits), states.swapaxes(0, 1)

    def _read(self, noise, outputs):
        steps = [self.runtime.step(parts) for parts in self._steps(noise, outputs)]
        return _sound(np.concatenate([rows.reshape(len(noise), -1, rows.shape[-1]) for rows in steps], 1))

    def _steps(self, noise: Sequence[Noise], outputs: int) -> Iterator[list[Part]]:
        """The parts of each forward pass; together they ask for the logits of the last `outputs` tokens."""
        while len(self._sessions) < len(noise):
            self._sessions[0].rewind(self._sessions[0].pos - self._shared)
            self._sessions.append(self._sessions[0].fork())
        sessions, n = self._sessions[: len(noise)], len(self._ids)
        for session, (schedule, seed) in zip(sessions, noise, strict=True):
            session.rewind(session.pos - self._shared)
            session.dose(schedule, seed)
        t = max(1, self.runtime.chunk // len(sessions))
        for at in range(self._shared, n, t):
            piece = self._ids[at : at + t]
            asked = min(max(at + len(piece) - (n - outputs), 0), len(piece))
            yield [Part(s, piece, not s.schedule.is_sober, asked) for s in sessions]


def check_reach(ids: Sequence[int], sink: int) -> None:
    """PromptError for a text so short that noise touches none of its tokens."""
    if len(ids) <= sink:
        raise PromptError(
            f"the text has {len(ids)} tokens, and noise leaves the first {sink} alone: make it longer"
        )


def _sound(logits: np.ndarray) -> np.ndarray:
    if not np.isfinite(logits).all():
        raise NumericalError("a logit is NaN or infinite: the weights are damaged, try --check-tensors")
    return logits
