"""The ring-buffer key-value cache of one sequence: position p lies in slot p mod S, for every layer and kv
head."""

import numpy as np

from tinydrug.formats.config import Config
from tinydrug.formats.weights import padded
from tinydrug.kernels.attention import BLOCK
from tinydrug.kernels.memory import aligned

CELLS = {"f16": np.float16, "f32": np.float32}


def slots_needed(n_ctx: int, window: int | None, chunk: int, rewind: int) -> int:
    """S, a multiple of the attention block.

    Without a window every position stays. With one, a chunk of T tokens is written before its first token
    looks back window - 1 positions, and a rewind of n tokens must find what the first of them saw: window
    + max(chunk, rewind) - 1. For example window 4, chunk 3: positions 7, 8, 9 are written while 7 still
    sees 4: 4..9 are 6 = 4 + 3 - 1 slots."""
    needed = n_ctx if window is None else min(n_ctx, window + max(chunk, rewind) - 1)
    return padded(needed, BLOCK)


class RingCache:
    """keys (L, G, S/16, d, 16) and values (L, G, S, d), d padded. Pages of memory are taken as positions are
    written."""

    def __init__(self, config: Config, slots: int, cell: str):
        L, G, d = config.n_layers, config.n_kv_heads, padded(config.head_dim)
        self.slots = slots
        self.keys = aligned((L, G, slots // 16, d, 16), CELLS[cell], huge=False)
        self.values = aligned((L, G, slots, d), CELLS[cell], huge=False)

    def begin(self, start: int, noisy: bool, again: bool) -> tuple[int, int]:
        """A step is about to write rows from this position on, under noise or not; again: which are there ->
        addresses of keys and values."""
        return self.keys.ctypes.data, self.values.ctypes.data

    def end(self, pos: int, again: bool, caught_up: bool) -> None:
        """The step has written all rows before this position."""

    def turn_back(self, pos: int) -> int:
        """Where writing anew begins, to have all rows from this position on anew."""
        return pos

    def turn_to(self, pos: int, sober: int) -> int:
        """How many of the rows before this position are there."""
        return pos

    def blocks(self, first: int, last: int) -> np.ndarray:
        """Which of the S/16 blocks of 16 slots hold positions first .. last - 1, ascending."""
        return np.unique(np.arange(first // 16, -(-last // 16)) % (self.slots // 16))

    def wipe(self, blocks: np.ndarray, written: int, pos: int) -> None:
        """Zero the slots of these blocks that hold none of the positions before `pos`, of `written` ever
        written: what was forgotten is nobody's business."""
        empty = np.zeros(self.slots, bool).reshape(-1, 16)
        empty[blocks] = True
        empty.reshape(-1)[np.arange(max(0, written - self.slots), pos) % self.slots] = False
        self.keys.swapaxes(3, 4)[:, :, empty] = 0
        self.by_block()[:, :, empty] = 0

    def loaded(self, pos: int, sober: bool) -> None:
        """All rows before this position have been filled from a file."""

    def copy_from(self, other: "RingCache", blocks: np.ndarray) -> None:
        """Take over what these blocks of a cache of the same shape hold."""
        for layer in range(len(self.keys)):  # one at a time: little memory, and no page that is not needed
            self.keys[layer][:, blocks] = other.keys[layer][:, blocks]
            self.by_block()[layer][:, blocks] = other.by_block()[layer][:, blocks]

    def by_block(self) -> np.ndarray:
        """The values as a view (L, G, S/16, 16, d)."""
        L, G, S, d = self.values.shape
        return self.values.reshape(L, G, S // 16, 16, d)

    @staticmethod
    def nbytes(config: Config, slots: int, cell: str) -> int:
        """Bytes of a full cache."""
        heads = config.n_layers * config.n_kv_heads
        return 2 * heads * slots * padded(config.head_dim) * np.dtype(CELLS[cell]).itemsize
