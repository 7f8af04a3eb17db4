"""Activations to int8, so that integer dot products can meet quantised weights.

A quantised row is [k int8][k/32 f32 scales][k/32 int32 sums][k/32 f32 moments]. A sum is minus the sum of
the block's int8 values: it undoes the offset of unsigned weights exactly, sum (q + 128) a = sum q a + 128
sum a. A moment is scale * sum: what a block's minimum is multiplied with.
"""

import numpy as np

from tinydrug.kernels.jit import inline
from tinydrug.kernels.tables import my_rows, operation, row, rows_of
from tinydrug.kernels.vectors import (
    absolute,
    load,
    max_lanes,
    maximum,
    round_even,
    store_f32,
    store_i32,
    store_low_bytes,
    sum_ints,
    to_ints,
)

f4 = np.float32
ROW_BYTES = 11 / 8  # of a quantised row, for each column


@inline
def scales_of(q, k):
    return q + k


@inline
def sums_of(q, k):
    return q + k + (k >> 3)


@inline
def moments_of(q, k):
    return q + k + (k >> 2)


@operation
def quantise(call, op, tid, n):
    """x (T, k) f32 -> y (T, k) int8 with a scale a block of 32: absmax / 127, as ggml's q8_0 but the scale in
    f32."""
    first, step, me = my_rows(call, op, tid, n)
    k = op.width
    for i in range(first, rows_of(call, op), step):
        x, q = row(op.x, i, me), row(op.y, i, me)
        scales, sums, moments = scales_of(q, k), sums_of(q, k), moments_of(q, k)
        for b in range(k // 32):
            u, v = load(x + 128 * b), load(x + 128 * b + 64)
            top = max_lanes(maximum(absolute(u), absolute(v)))
            # A block of NaN or infinity keeps its NaN in the scale, so that the logits show it.
            inverse = f4(127.0) / top if top > f4(0.0) and top < f4(np.inf) else f4(0.0)
            iu, iv = to_ints(round_even(u * inverse)), to_ints(round_even(v * inverse))
            store_low_bytes(q + 32 * b, iu)
            store_low_bytes(q + 32 * b + 16, iv)
            scale, total = top * f4(1 / 127), sum_ints(iu + iv)
            store_f32(scales + 4 * b, scale)
            store_i32(sums + 4 * b, -total)
            store_f32(moments + 4 * b, scale * f4(total))
