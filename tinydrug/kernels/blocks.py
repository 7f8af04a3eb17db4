"""The quantised weight formats: ggml's blocks, as a file has them and as they lie in panels, and our own.

A weight is scale * (integer - offset), or scale * integer + minimum. Every bit of a file is kept: integers go
to their planes (planes.py), scales and minima lie beside them, one a row of the panel:

    q8_0, q4_0, q5_0,  [block][16] f16
    iq4_nl
    q4_1, q5_1         [block][2][16] f16: scales, minima
    q4_k, q5_k         [8 blocks: [8][16] u8, [8][16] u8, [16] f16, [16] f16]: 6-bit scales and minima, what
                       to multiply each with (minima are subtracted)
    q6_k               [8 blocks: [16][16] i8, [16] f16]: a scale for every 16 columns, what to multiply with
    q8_256             [8 blocks][16] f16
    q4_128             [4 blocks: [16] f16, [4][16] u8]: scales; keys of each block, two bits for every 8
                       columns, at bits 4, 6, 0 and 2

Formulas: ggml-quants.c, dequantize_row_*. The last two are what `--quant` makes, q8 8.0625 bits a weight and
q4 4.375: 256 and 128 columns share a scale, so that integers are added up eight and four times as far. In
q8_256 they are spread (hadamard.py), so that one scale suits them all; in q4_128 every 8 columns choose one
of four tables, the small ones one of small levels. Tables hold integers: choosing costs no arithmetic.
"""

from typing import NamedTuple

import numpy as np

from tinydrug.kernels.jit import inline
from tinydrug.kernels.lookups import load_byte_a_lane, next_pair
from tinydrug.kernels.planes import PLANES, Planes
from tinydrug.kernels.vectors import (
    load_halves,
    load_i32,
    load_signed_bytes,
    load_u8,
    load_u16,
    load_unsigned_bytes,
    store_i32,
    store_u8,
    store_u16,
)

f4, i4, i8 = np.float32, np.int32, np.int64
SIGNS = -0x7F7F7F80  # of four bytes: q + 128, where a file has q


@inline
def no_keys(s, g, b):
    return i8(0), i8(0), i8(0), i8(0)


class Blocks(NamedTuple):
    """A quantised format."""

    planes: Planes
    offset: int  # of the stored integers; 0 where there is a minimum
    scale_bytes: int  # of a group of a panel
    scale: object  # (scales of the panel, group) -> F, a lane a row
    minimum: object  # the same, or None
    second_scale: object  # the same for columns 16 .. 31, or None: they share it
    copy_integers: object  # (row of a file, its block, row of the panel, the panel's block); None: no file
    copy_scales: object  # (row of a file, block, row of the panel, scales of the panel)
    group: int = 32  # columns that share a scale and a minimum
    spread: bool = False  # weights and activations are, before they are rounded
    keys: object = no_keys  # (scales of the panel, group, block of it) -> for the planes: of each 8 columns


def widths(group):
    """Two functions: k columns -> how many groups of so many; group g, k columns -> how many blocks of 32 it
    has: the last may have fewer."""
    many = group // 32

    @inline
    def groups_of(k):
        return (k + group - 1) // group

    @inline
    def blocks_of(g, k):
        return 1 if many == 1 else min(many, k // 32 - many * g)

    return groups_of, blocks_of


# --- one f16 scale a block; perhaps a minimum ---------------------------------------------------------------
@inline
def load_scale(p):
    """The bits of an f16 scale, NaN for infinity: of that, some kernels would make infinity and others NaN
    (tiles.py, by_sums)."""
    bits = load_u16(p)
    return bits | (1 if bits & 0x7FFF == 0x7C00 else 0)


@inline
def scale_1(s, b):
    return load_halves(s + 32 * b)


@inline
def scale_2(s, b):
    return load_halves(s + 64 * b)


@inline
def minimum_2(s, b):
    return load_halves(s + 64 * b + 32)


def _halves(block_bytes, halves):
    """The first numbers of a file's block -> panel."""

    @inline
    def copy_scales(row, b, r, scales):
        for i in range(halves):
            store_u16(scales + 32 * (halves * b + i) + 2 * r, load_scale(row + block_bytes * b + 2 * i))

    return copy_scales


def _quads(block_bytes, head, quads, flipped=0):
    """Where a file's bytes lie as the panel's do, four columns of a row together."""

    @inline
    def copy_integers(row, b, r, out):
        for c in range(quads):
            quad = load_i32(row + block_bytes * b + head + 4 * c)
            store_i32(out + 64 * c + 4 * r, quad ^ i4(flipped))

    return copy_integers


def _each(bits, integer):
    """integer: (row of a file, column) -> the stored integer, of so many bits."""
    place = PLANES[bits].place

    @inline
    def copy_integers(row, b, r, out):
        for c in range(32):
            place(out, r, c, integer(row, 32 * b + c))

    return copy_integers


def _nibble_and_bit(block_bytes, head):
    @inline
    def integer(row, column):
        block = row + block_bytes * (column // 32) + head
        nibble = (load_u8(block + 4 + column % 16) >> 4 * (column % 32 // 16)) & 15
        return nibble | ((load_u8(block + column % 32 // 8) >> column % 8) & 1) << 4

    return integer


# --- K: blocks of 32 in super-blocks of 256 -----------------------------------------------------------------
@inline
def scale_k(s, b):
    s += 320 * (b // 8)
    return load_halves(s + 256) * load_unsigned_bytes(s + 16 * (b % 8))


@inline
def minimum_k(s, b):
    s += 320 * (b // 8)
    return load_halves(s + 288) * load_unsigned_bytes(s + 128 + 16 * (b % 8)) * f4(-1.0)


def _scales_k(block_bytes):
    @inline
    def copy_scales(row, b, r, scales):
        block, j = row + block_bytes * (b // 8), b % 8
        packed, s = block + 4, scales + 320 * (b // 8)
        if j < 4:
            scale, minimum = load_u8(packed + j) & 63, load_u8(packed + j + 4) & 63
        else:
            scale = (load_u8(packed + j + 4) & 15) | (load_u8(packed + j - 4) >> 6) << 4
            minimum = load_u8(packed + j + 4) >> 4 | (load_u8(packed + j) >> 6) << 4
        store_u8(s + 16 * j + r, scale)
        store_u8(s + 128 + 16 * j + r, minimum)
        store_u16(s + 256 + 2 * r, load_scale(block))
        store_u16(s + 288 + 2 * r, load_scale(block + 2))

    return copy_scales


def _nibble_k(block_bytes, head):
    """64 columns share 32 bytes: the first 32 are the low nibbles."""

    @inline
    def integer(row, column):
        byte = load_u8(row + block_bytes * (column // 256) + head + 32 * (column % 256 // 64) + column % 32)
        return (byte >> 4 * (column % 64 // 32)) & 15

    return integer


nibble_q5_k = _nibble_k(176, 48)


@inline
def integer_q5_k(row, column):
    byte = load_u8(row + 176 * (column // 256) + 16 + column % 32)
    return nibble_q5_k(row, column) | ((byte >> column % 256 // 32) & 1) << 4


@inline
def scale_q6_k(s, b):
    s += 288 * (b // 8)
    return load_halves(s + 256) * load_signed_bytes(s + 32 * (b % 8))


@inline
def second_scale_q6_k(s, b):
    s += 288 * (b // 8)
    return load_halves(s + 256) * load_signed_bytes(s + 32 * (b % 8) + 16)


@inline
def integer_q6_k(row, column):
    block, c = row + 210 * (column // 256), column % 256
    half, c = c // 128, c % 128  # 128 columns share 64 bytes of nibbles and 32 of upper bits
    nibbles, upper = load_u8(block + 64 * half + c % 64), load_u8(block + 128 + 32 * half + c % 32)
    return (nibbles >> 4 * (c // 64)) & 15 | ((upper >> 2 * (c // 32)) & 3) << 4


@inline
def scales_q6_k(row, b, r, scales):
    block, s = row + 210 * (b // 8), scales + 288 * (b // 8)
    for i in range(2 * (b % 8), 2 * (b % 8) + 2):
        store_u8(s + 16 * i + r, load_u8(block + 192 + i))
    store_u16(s + 256 + 2 * r, load_scale(block + 208))


# --- q4_128: four blocks share a scale, and every 8 columns choose their table ------------------------------
@inline
def scale_128(s, g):
    return load_halves(s + 96 * g)


@inline
def keys_128(s, g, b):
    first = load_byte_a_lane(s + 96 * g + 32 + 16 * b)
    second = next_pair(first)
    third = next_pair(second)
    return first, second, third, next_pair(third)


BLOCKS = {
    "q8_0": Blocks(PLANES[8], 128, 32, scale_1, None, None, _quads(34, 2, 8, SIGNS), _halves(34, 1)),
    "q4_0": Blocks(PLANES[4], 8, 32, scale_1, None, None, _quads(18, 2, 4), _halves(18, 1)),
    "iq4_nl": Blocks(PLANES["levels"], 128, 32, scale_1, None, None, _quads(18, 2, 4), _halves(18, 1)),
    "q5_0": Blocks(PLANES[5], 16, 32, scale_1, None, None, _each(5, _nibble_and_bit(22, 2)), _halves(22, 1)),
    "q4_1": Blocks(PLANES[4], 0, 64, scale_2, minimum_2, None, _quads(20, 4, 4), _halves(20, 2)),
    "q5_1": Blocks(
        PLANES[5], 0, 64, scale_2, minimum_2, None, _each(5, _nibble_and_bit(24, 4)), _halves(24, 2)
    ),
    "q4_k": Blocks(PLANES[4], 0, 40, scale_k, minimum_k, None, _each(4, _nibble_k(144, 16)), _scales_k(144)),
    "q5_k": Blocks(PLANES[5], 0, 40, scale_k, minimum_k, None, _each(5, integer_q5_k), _scales_k(176)),
    "q6_k": Blocks(
        PLANES[6], 32, 36, scale_q6_k, None, second_scale_q6_k, _each(6, integer_q6_k), scales_q6_k
    ),
    "q8_256": Blocks(PLANES[8], 128, 32, scale_1, None, None, None, None, 256, spread=True),
    "q4_128": Blocks(PLANES["tables"], 128, 96, scale_128, None, None, None, None, 128, keys=keys_128),
}
