"""Activations to int8, so that integer dot products can meet quantised weights.

A quantised row is [k int8][k/32 f32 scales][k/32 int32 sums][k/32 f32 moments][k/16 int32 half sums]. A sum
is minus the sum of the block's int8 values: it undoes the offset of unsigned weights exactly, sum (q + 128) a
= sum q a + 128 sum a; half sums do so for weights with a scale for every 16 columns. A moment is scale * sum:
what a block's minimum is multiplied with.

Where there are tile registers (amx.py), every 16 rows of a call that fill a tile lie together instead, block
by block: [k/32][16][32 int8], [k/32][16] scales, and so on, in the memory of the 16 rows.
"""

import numpy as np

from tinydrug.kernels import amx
from tinydrug.kernels.jit import inline
from tinydrug.kernels.tables import my_rows, operation, row, rows_of
from tinydrug.kernels.vectors import (
    get_int,
    highest_magnitude,
    load,
    round_even,
    store_f32,
    store_i32,
    store_low_bytes,
    sum_both,
    to_ints,
)

f4 = np.float32
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


@operation
def quantise(call, op, tid, n):
    """x (T, k) f32 -> y (T, k) int8 with a scale a block of 32: absmax / 127, as ggml's q8_0 but the scale in
    f32."""
    lo, hi, me = my_rows(call, op, tid, n)
    k, rows = op.width, rows_of(call, op)
    for i in range(lo, hi):
        tiled = amx.AVAILABLE and i < rows // 16 * 16
        together = 16 if tiled else 1  # rows that lie together; r: which of them is this one
        r = i % together
        x, q = row(op.x, i, me), row(op.y, i - r, me)
        scales, sums = q + together * scales_of(0, k), q + together * sums_of(0, k)
        moments, halves = q + together * moments_of(0, k), q + together * half_sums_of(0, k)
        for b in range(k // 32):
            u, v = load(x + 128 * b), load(x + 128 * b + 64)
            top = highest_magnitude(u, v)
            # A block of NaN or infinity keeps its NaN in the scale, so that the logits show it.
            inverse = f4(127.0) / top if top > f4(0.0) and top < f4(np.inf) else f4(0.0)
            iu, iv = to_ints(round_even(u * inverse)), to_ints(round_even(v * inverse))
            at = b * together + r
            store_low_bytes(q + 32 * at, iu)
            store_low_bytes(q + 32 * at + 16, iv)
            both = sum_both(iu, iv)
            scale, first_sum, second_sum = top * f4(1 / 127), get_int(both, 0), get_int(both, 8)
            store_f32(scales + 4 * at, scale)
            store_i32(sums + 4 * at, -(first_sum + second_sum))
            store_f32(moments + 4 * at, scale * f4(first_sum + second_sum))
            store_i32(halves + 8 * at, -first_sum)
            store_i32(halves + 8 * at + 4, -second_sum)
