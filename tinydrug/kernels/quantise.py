"""Activations to int8, so that integer dot products can meet quantised weights.

Columns that share a scale are a group: 32, or what else a format of weights shares its scales among. Where
weights were spread, activations are, before they are rounded (hadamard.py).

A quantised row is [k int8][groups f32 scales][groups int32 sums][groups f32 moments][2 groups int32 half
sums], each part where groups of 32 would have it. A sum is minus the sum of the group's int8 values: it
undoes the offset of unsigned weights exactly, sum (q + 128) a = sum q a + 128 sum a; half sums, of the first
16 of every 32 columns and the last, do so for weights with a scale for each. A moment is scale * sum: what a
minimum is multiplied with.

Where there are tile registers (amx.py), every 16 rows of a call that go to a tile lie together instead, group
by group: [groups][16][int8 of a group], [groups][16] scales, and so on, in the memory of the 16 rows.
"""

import numpy as np

from tinydrug.kernels import amx
from tinydrug.kernels.blocks import BLOCKS
from tinydrug.kernels.jit import inline, kernel
from tinydrug.kernels.tables import OPERATION, my_rows, row, rows_of, to_next
from tinydrug.kernels.tiles import (
    TILES,
    by_rows,
    tile_hadamard,
    tile_highest_magnitude,
    tile_load,
    tile_round,
    tile_rows,
    tile_store_low_bytes,
    tile_sum_alternate,
)
from tinydrug.kernels.vectors import get_int, prefetch_l1, store_f32, store_i32

f4 = np.float32
LEAST = f4(4e-37)  # 127 times one over less would overflow
ROW_BYTES = 13 / 8  # of a quantised row, for each column


@inline
def scales_of(q, k):
    return q + k


@inline
def sums_of(q, k):
    return q + k + (k >> 3)


@inline
def moments_of(q, k):
    return q + k + (k >> 2)


@inline
def half_sums_of(q, k):
    return q + k + 3 * (k >> 3)


def quantise_by(group, spread):
    """The operation for groups of so many columns; the last may be narrower."""

    whole = TILES[group // 16]

    @inline
    def round_group(zeros, x, q, k, g, together, r):
        """Group g, as large as a tile, of row r of those that lie together at q."""
        at, width = together * group * g, 16 * tile_rows(zeros)
        tile = tile_load(zeros, x + 4 * group * g, 64)
        if spread:
            tile = tile_hadamard(tile)
        top = tile_highest_magnitude(tile)
        inverse = f4(127.0) / top if top > LEAST and top < f4(np.inf) else f4(0.0)
        tile = tile_round(tile, inverse)
        tile_store_low_bytes(tile, q + at + r * width)
        both, at = tile_sum_alternate(tile), together * g + r
        # A group of NaN or infinity has NaN for its scale, so that all logits show it, and alike.
        scale, first_sum, second_sum = top * f4(1 / 127) + (top - top), get_int(both, 0), get_int(both, 8)
        halves = q + together * half_sums_of(0, k) + 8 * at
        store_f32(q + together * scales_of(0, k) + 4 * at, scale)
        store_i32(q + together * sums_of(0, k) + 4 * at, -(first_sum + second_sum))
        store_f32(q + together * moments_of(0, k) + 4 * at, scale * f4(first_sum + second_sum))
        store_i32(halves, -first_sum)
        store_i32(halves + 4, -second_sum)

    round_narrow = by_rows(round_group, group // 16 - 2)

    @kernel(OPERATION, f"quantise_{group}" + "_spread" * spread)
    def quantise(call, op, tid, n):
        """x (T, k) f32 -> y (T, k) int8: scales absmax / 127, as ggml's q8_0 but in f32."""
        lo, hi, me = my_rows(call, op, tid, n)
        k, rows = op.width, rows_of(call, op)
        groups = k // group
        left = k - group * groups  # columns of the last group, if that is narrower
        for i in range(lo, hi):
            tiled = i < amx.rows_in_tiles(rows)
            together = 16 if tiled else 1  # rows that lie together; r: which of them is this one
            r = i % together
            x, q = row(op.x, i, me), row(op.y, i - r, me)
            for g in range(groups):
                for j in range(4 * group * g, 4 * group * (g + 1), 64):
                    prefetch_l1(x + to_next(op.x, i, hi) + j)  # saves a sixth of the time in a prompt
                round_group(whole(), x, q, k, g, together, r)
            round_narrow(left // 16, x, q, k, groups, together, r)

    return quantise


QUANTISE = {  # (columns of a group, whether they are spread) -> the operation
    how: quantise_by(*how) for how in sorted({(blocks.group, blocks.spread) for blocks in BLOCKS.values()})
}
