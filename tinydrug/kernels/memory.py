"""Memory on cache-line boundaries: a 64-byte load that straddles two lines costs double."""

import math
import mmap
import weakref
from collections.abc import Mapping

import numpy as np

LINE = 64
PAGE = 4096  # a panel that begins a page decodes up to a tenth faster than one a few lines into it


def nbytes(dtype, shape) -> int:
    """Bytes of an array."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def aligned(shape, dtype, huge=True) -> np.ndarray:
    """A zeroed array whose first byte begins a cache line. Pages are taken on first touch; a large array asks
    for huge ones, unless it will be filled sparsely."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    size = max(nbytes(dtype, shape), 1)
    if size < 1 << 21:
        raw = np.zeros(size + LINE, np.uint8)
        start = -raw.ctypes.data % LINE
        return raw[start : start + size].view(dtype)[: math.prod(shape)].reshape(shape)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, dtype, math.prod(shape)).reshape(shape)


def arena(layout: Mapping[str, tuple[type, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Zeroed arrays of these element types and shapes, each beginning a cache line, one after the other in
    one piece of memory: then the small ones lie in huge pages, too, which decodes 3 to 6 % faster."""
    starts, end = {}, 0
    for name, (dtype, shape) in layout.items():
        starts[name] = end
        end += -(-nbytes(dtype, shape) // LINE) * LINE
    memory = aligned(end, np.uint8)
    return {
        name: memory[start : start + nbytes(*layout[name])].view(layout[name][0]).reshape(layout[name][1])
        for name, start in starts.items()
    }


class Loans:
    """Memory that is handed out, and handed out again when nobody holds it or a view of it: memory that is
    new costs a page fault a page."""

    KEPT = 4  # areas: what is held for longer is its holder's, and is let go with it

    def __init__(self):
        self._areas: list[tuple[np.ndarray, int, weakref.ref]] = []  # addresses, and what was last handed out

    def take(self, rows: int, shape: tuple[int, int], step: int) -> tuple[np.ndarray, int]:
        """Floats of this shape with anything in them, `step` bytes from row to row, in memory that begins a
        cache line and has room for so many rows; and its address."""
        size = rows * step
        free = [(len(area), i) for i, (area, _, lent) in enumerate(self._areas) if lent() is None]
        i = min((fit for fit in free if fit[0] >= size), default=(0, None))[1]
        if i is None:
            area = aligned(size, np.uint8)
            address = area.ctypes.data
            del self._areas[: 1 - self.KEPT]
        else:
            area, address, _ = self._areas.pop(i)
        lent = np.frombuffer(area.data, np.uint8)  # its base is no array: views hold it, not the area
        self._areas.append((area, address, weakref.ref(lent)))
        return np.ndarray(shape, np.float32, lent, 0, (step, 4)), address
