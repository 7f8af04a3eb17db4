"""The recurrent state of one sequence under srf attention: of one size, however long the sequence."""

import numpy as np

from tinydrug.engine.cache import CELLS
from tinydrug.formats.weights import padded
from tinydrug.kernels.memory import aligned
from tinydrug.kernels.tables import PANEL
from tinydrug.models.srf import FeatureProgram


class RecurrentState:
    """What tokens leave behind, and a copy of it from before noise came in.

    There are no rows to forget or to write anew. So a session that sobers up lets the clean copy read the
    tokens again until it has caught up, and one that is rewound starts from it, or from nothing."""

    def __init__(self, program: FeatureProgram, slots: int):
        self.slots = slots  # no position is ever lost in a ring: the tokens are kept, and can be read again
        self._program, self._features = program, program.features
        self._live, self._clean = _Memory(program), None

    @property
    def keys(self) -> np.ndarray:
        """(L, G, 1, 2, m) float32."""
        return self._live.keys

    def by_block(self) -> np.ndarray:
        """(L, G, 1, d/16, m, 16)."""
        return self._live.values

    def blocks(self, first: int, last: int) -> np.ndarray:
        """The one block there is, if it holds anything."""
        return np.arange(min(last, 1))

    def wipe(self, blocks: np.ndarray, written: int, pos: int) -> None:
        """Nothing is there that could be wiped: tokens that have been forgotten are in no sum."""

    def loaded(self, pos: int, sober: bool) -> None:
        """The state of all tokens before this position has been filled from a file; whether it is sober."""
        self._live.pos, self._live.sober = pos, sober

    def copy_from(self, other: "RecurrentState", blocks: np.ndarray) -> None:
        """Take over the state of another sequence, and its clean copy."""
        self._features, self._live = other._features, other._live.copy()
        self._clean = other._clean and other._clean.copy()

    def begin(self, start: int, noisy: bool, again: bool) -> tuple[int, int]:
        """A step is about to add tokens from this position on, under noise or not; again: to the clean copy
        -> addresses of keys and values."""
        if start == 0 and not again:
            self._live.pos, self._live.sober = 0, True
            self._clean, self._features = None, self._program.features
        if noisy and self._live.sober:
            self._clean, self._live.sober = self._live.copy(), False
        memory = self._clean if again else self._live
        memory.torn = True
        return memory.keys.ctypes.data, memory.values.ctypes.data

    def end(self, pos: int, again: bool, caught_up: bool) -> None:
        """The step has added all tokens before this position; that is all there are, if it has caught up."""
        memory = self._clean if again else self._live
        memory.pos, memory.torn = pos, False
        if again and caught_up:
            self._live, self._clean = self._clean, None

    def turn_back(self, pos: int) -> int:
        """Where writing anew begins, to have all tokens from this position on anew."""
        self._forget_damage()
        if self._clean is None:
            self._clean = _Memory(self._program)
        return self._clean.pos

    def turn_to(self, pos: int, sober: int) -> int:
        """How many of the tokens before this position are in the state, once all others are out. The first
        `sober` of them must be there as they would be without noise."""
        self._forget_damage()
        if self._live.torn or self._live.pos != pos:
            usable = self._clean is not None and self._clean.pos <= min(pos, sober)
            self._live, self._clean = self._clean if usable else _Memory(self._program), None
        return self._live.pos

    def _forget_damage(self) -> None:
        """Drop what an interrupted step has left, and what belongs to features that have been drawn anew."""
        if self._features != self._program.features:
            self._live.torn, self._clean, self._features = True, None, self._program.features
        if self._clean is not None and self._clean.torn:
            self._clean = None


class _Memory:
    """Arrays that `pos` tokens have been added to, all without noise if `sober`; `torn` while a step adds
    more, and ever after if it is interrupted."""

    def __init__(self, program: FeatureProgram):
        c, m = program.config, padded(program.features.m, PANEL)
        L, G, d = c.n_layers, c.n_kv_heads, padded(c.head_dim)
        self._program = program
        self.keys = aligned((L, G, 1, 2, m), np.float32)
        self.values = aligned((L, G, 1, d // PANEL, m, PANEL), CELLS[program.cell])
        self.pos, self.sober, self.torn = 0, True, False

    def copy(self) -> "_Memory":
        twin = _Memory(self._program)
        twin.keys[:], twin.values[:] = self.keys, self.values
        twin.pos, twin.sober, twin.torn = self.pos, self.sober, self.torn
        return twin
