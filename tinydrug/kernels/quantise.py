"""Activations to int8, so that integer dot products can meet quantised weights.

Columns that share a scale are a group: 32, or what else a format of weights shares its scales among. A
quantised row is [k int8][groups f32 scales][groups int32 sums][groups f32 moments][2 groups int32 half sums],
each part where groups of 32 would have it. A sum is minus the sum of the group's int8 values: it undoes the
offset of unsigned weights exactly, sum (q + 128) a = sum q a + 128 sum a; half sums, of the first 16 of every
32 columns and the last, do so for weights with a scale for each. A moment is scale * sum: what a minimum is
multiplied with.

Where there are tile registers (amx.py), every 16 rows of a call that fill a tile lie together instead, group
by group: [k/32][16][32 int8], [k/32][16] scales, and so on, in the memory of the 16 rows.
"""

import numpy as np

from tinydrug.kernels import amx
from tinydrug.kernels.blocks import BLOCKS
from tinydrug.kernels.jit import inline, kernel
from tinydrug.kernels.tables import OPERATION, my_rows, row, rows_of
from tinydrug.kernels.vectors import (
    get_int,
    higher_magnitude,
    highest_magnitude,
    ints,
    load,
    round_even,
    store_f32,
    store_i32,
    store_low_bytes,
    sum_both,
    to_ints,
)

f4, i4 = np.float32, np.int32
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


def quantise_by(group):
    """The operation for groups of so many columns; the last may be narrower."""

    @kernel(OPERATION, f"quantise_{group}")
    def quantise(call, op, tid, n):
        """x (T, k) f32 -> y (T, k) int8: scales absmax / 127, as ggml's q8_0 but in f32."""
        lo, hi, me = my_rows(call, op, tid, n)
        k, rows = op.width, rows_of(call, op)
        for i in range(lo, hi):
            tiled = amx.AVAILABLE and i < rows // 16 * 16
            together = 16 if tiled else 1  # rows that lie together; r: which of them is this one
            r = i % together
            x, q = row(op.x, i, me), row(op.y, i - r, me)
            scales, sums = q + together * scales_of(0, k), q + together * sums_of(0, k)
            moments, halves = q + together * moments_of(0, k), q + together * half_sums_of(0, k)
            for g in range((k + group - 1) // group):
                first = group * g
                width = 32 if group == 32 else min(group, k - first)
                highest = ints(i4(0))
                for c in range(0, width, 16):
                    highest = higher_magnitude(highest, load(x + 4 * (first + c)))
                top = highest_magnitude(highest)
                # A group of NaN or infinity keeps its NaN in the scale, so that the logits show it.
                inverse = f4(127.0) / top if top > f4(0.0) and top < f4(np.inf) else f4(0.0)
                to, even, odd = q + together * first + r * width, ints(i4(0)), ints(i4(0))
                for c in range(0, width, 32):
                    at = x + 4 * (first + c)
                    u = to_ints(round_even(load(at) * inverse))
                    v = to_ints(round_even(load(at + 64) * inverse))
                    store_low_bytes(to + c, u)
                    store_low_bytes(to + c + 16, v)
                    even, odd = even + u, odd + v
                both, at = sum_both(even, odd), g * together + r
                scale, first_sum, second_sum = top * f4(1 / 127), get_int(both, 0), get_int(both, 8)
                store_f32(scales + 4 * at, scale)
                store_i32(sums + 4 * at, -(first_sum + second_sum))
                store_f32(moments + 4 * at, scale * f4(first_sum + second_sum))
                store_i32(halves + 8 * at, -first_sum)
                store_i32(halves + 8 * at + 4, -second_sum)

    return quantise


QUANTISE = {group: quantise_by(group) for group in sorted({blocks.group for blocks in BLOCKS.values()})}
