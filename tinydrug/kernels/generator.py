"""The random generator: counter-based, so a draw is a pure function of where it is used and nothing is
remembered.

Every draw is f(seed, layer, site, head, position, step, component). The first four and the step make a
64-bit key (splitmix64), a position makes two 32-bit words of it, and the components' words are a 32-bit
mixing function (lowbias32, with the second word added between its rounds) of a counter. Threads, chunks
and batches change no draw.
"""

import numpy as np

from tinydrug.kernels.jit import inline
from tinydrug.kernels.vectors import ints, lane, shift_right

i4, i8, u8 = np.int32, np.int64, np.uint64
GOLDEN = i4(-1640531527)  # 2^32 / golden ratio: spreads a counter over all bits


@inline
def draw_key(seed, layer, site, head, step):
    """splitmix64 over the coordinates of a draw."""
    z = u8(seed)
    for coordinate in (layer, site, head, step):
        z = (z ^ u8(coordinate)) + u8(0x9E3779B97F4A7C15)
        z = (z ^ (z >> u8(30))) * u8(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> u8(27))) * u8(0x94D049BB133111EB)
        z = z ^ (z >> u8(31))
    return i8(z)


@inline
def mix(x, between):
    """32 bits to 32 bits, each depending on all (lowbias32)."""
    x = (x ^ shift_right(x, i4(16))) * i4(0x7FEB352D) + between
    x = (x ^ shift_right(x, i4(15))) * i4(-0x7B935975)
    return x ^ shift_right(x, i4(16))


@inline
def streams(positions, key):
    """positions in lanes -> the two words each lane's draws start from."""
    low, high = ints(i4(key)), ints(i4(key >> 32))
    return mix(positions * GOLDEN + low, high), mix(positions + high, low)


@inline
def word(first, second, index):
    """The index-th random word of each lane."""
    return mix(first + index * GOLDEN, second)


@inline
def words(first, second, block):
    """The words 16 block .. 16 block + 15 of one vector, whose own are in all lanes."""
    return word(first + i4(16 * block) * GOLDEN, second, lane())
