"""A checksum of memory, at the speed of memory: it finds damage and difference, not malice."""

import hashlib

import numpy as np

from tinydrug.kernels.jit import inline, kernel
from tinydrug.kernels.kinds import int64, void
from tinydrug.kernels.memory import LINE, aligned
from tinydrug.kernels.vectors import ints, load_ints, shift_right, store_ints

i4 = np.int32


@inline
def stir(state, words):
    """A bijection of either, given the other: one changed word is never missed."""
    product = (state ^ words) * i4(0x7FEB352D)
    return product ^ shift_right(product, i4(15))


@kernel(void(int64, int64, int64))
def checksum(data, nbytes, out):
    """Whole lines at `data` -> 4 lines at `out`. Four states at a time hide the time a product takes."""
    a, b, c, d = ints(i4(1)), ints(i4(2)), ints(i4(3)), ints(i4(4))
    end = data + nbytes
    last = data + nbytes // 256 * 256
    for at in range(data, last, 256):
        a, b = stir(a, load_ints(at)), stir(b, load_ints(at + 64))
        c, d = stir(c, load_ints(at + 128)), stir(d, load_ints(at + 192))
    for at in range(last, end, 64):
        a = stir(a, load_ints(at))
    store_ints(out, a)
    store_ints(out + 64, b)
    store_ints(out + 128, c)
    store_ints(out + 192, d)


def digest(area: np.ndarray) -> str:
    """The checksum of a contiguous array of whole lines, as 64 hexadecimal digits."""
    out = aligned(4 * LINE, np.uint8)
    checksum(area.ctypes.data, area.nbytes, out.ctypes.data)
    return hashlib.sha256(out).hexdigest()
