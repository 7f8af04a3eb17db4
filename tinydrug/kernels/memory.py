"""Memory on cache-line boundaries: a 64-byte load that straddles two lines costs double."""

import math
import mmap

import numpy as np

LINE = 64


def aligned(shape, dtype, huge=True) -> np.ndarray:
    """A zeroed array whose first byte begins a cache line. Pages are taken on first touch; a large array asks
    for huge ones, unless it will be filled sparsely."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    nbytes = max(math.prod(shape) * np.dtype(dtype).itemsize, 1)
    if nbytes < 1 << 21:
        raw = np.zeros(nbytes + LINE, np.uint8)
        start = -raw.ctypes.data % LINE
        return raw[start : start + nbytes].view(dtype)[: math.prod(shape)].reshape(shape)
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, dtype, math.prod(shape)).reshape(shape)
