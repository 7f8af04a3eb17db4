"""Integers of 4, 5, 6 and 8 bits in panels: where the bits lie, and how 64 of them become bytes again.

16 output rows and 32 columns make a block. Four columns of all rows, a quad, are one vector of 64 bytes
[row][column]; quads 0 .. 3 are the columns 0 .. 15 and 4 .. 7 the columns 16 .. 31.

    8 bits   [8 quads][16][4]
    4 bits   [4][16][4]: quad c in the low nibbles, quad c + 4 in the high ones
    5 bits   4 bits, then [16][4]: the fifth bit of quad c is bit c
    6 bits   4 bits, then [2][16][4]: the upper two bits of quad c, and of c + 4, are bits 2c and 2c + 1
    levels   4 bits, the number of one of 16 levels; bytes are that level + 128
    tables   4 bits, the number of one of 16 levels in one of four tables: the one bits 4 and 5 of a key say
"""

from typing import NamedTuple

import numpy as np

from tinydrug.kernels.jit import inline
from tinydrug.kernels.lookups import (
    bits_to,
    either,
    high_nibbles,
    high_nibbles_under,
    lookup,
    lookup_64,
    low_nibbles,
    low_nibbles_under,
)
from tinydrug.kernels.vectors import load_bytes, load_u8, store_u8

i4, i8 = np.int32, np.int64
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of ggml's iq4_nl
level = lookup([q + 128 for q in LEVELS])
SHRINKS = (1.0, 0.85, 0.68, 0.5)  # of the levels, in each of four tables
TABLES = tuple(int(np.rint(np.float32(q) * np.float32(shrink))) for shrink in SHRINKS for q in LEVELS)
level_of = lookup_64([q + 128 for q in TABLES])


class Planes(NamedTuple):
    """How integers of so many bits lie in a block of a panel."""

    nbytes: int  # of a block
    low: object  # (block, c, key) -> quad c < 4, unsigned bytes
    high: object  # (block, c, key) -> quad c + 4
    place: object  # (block, row, column, integer): into a block that was zero


@inline
def low4(w, c, key):
    return low_nibbles(load_bytes(w + 64 * c))


@inline
def high4(w, c, key):
    return high_nibbles(load_bytes(w + 64 * c))


@inline
def place4(w, r, column, q):
    at = w + 64 * (column % 16 // 4) + 4 * r + column % 4
    store_u8(at, load_u8(at) | (q & 15) << 4 * (column // 16))


@inline
def low5(w, c, key):
    return either(low4(w, c, key), bits_to(load_bytes(w + 256), c, i8(4), i4(1)))


@inline
def high5(w, c, key):
    return either(high4(w, c, key), bits_to(load_bytes(w + 256), c + 4, i8(4), i4(1)))


@inline
def place5(w, r, column, q):
    place4(w, r, column, q)
    at = w + 256 + 4 * r + column % 4
    store_u8(at, load_u8(at) | (q >> 4) << column // 4)


@inline
def low6(w, c, key):
    return either(low4(w, c, key), bits_to(load_bytes(w + 256), 2 * c, i8(4), i4(3)))


@inline
def high6(w, c, key):
    return either(high4(w, c, key), bits_to(load_bytes(w + 320), 2 * c, i8(4), i4(3)))


@inline
def place6(w, r, column, q):
    place4(w, r, column, q)
    at = w + 256 + 64 * (column // 16) + 4 * r + column % 4
    store_u8(at, load_u8(at) | (q >> 4) << 2 * (column % 16 // 4))


@inline
def low8(w, c, key):
    return load_bytes(w + 64 * c)


@inline
def high8(w, c, key):
    return load_bytes(w + 256 + 64 * c)


@inline
def place8(w, r, column, q):
    store_u8(w + 64 * (column // 4) + 4 * r + column % 4, q)


@inline
def low_levels(w, c, key):
    return level(low4(w, c, key))


@inline
def high_levels(w, c, key):
    return level(high4(w, c, key))


@inline
def low_tables(w, c, key):
    return level_of(low_nibbles_under(load_bytes(w + 64 * c), key))


@inline
def high_tables(w, c, key):
    return level_of(high_nibbles_under(load_bytes(w + 64 * c), key))


PLANES = {
    4: Planes(256, low4, high4, place4),
    5: Planes(320, low5, high5, place5),
    6: Planes(384, low6, high6, place6),
    8: Planes(512, low8, high8, place8),
    "levels": Planes(256, low_levels, high_levels, place4),
    "tables": Planes(256, low_tables, high_tables, place4),
}
