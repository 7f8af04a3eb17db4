"""RMSNorm and LayerNorm, row by row. Padding columns hold zeros before and after."""

import math

import numpy as np

from tinydrug.kernels.jit import inline
from tinydrug.kernels.tables import my_rows, operation, row
from tinydrug.kernels.vectors import floats, fma, load, store, sum_lanes

f4 = np.float32


@inline
def sum_squares(x, k):
    """The sum of squares of k floats."""
    total = floats(f4(0.0))
    for j in range(0, 4 * k, 64):
        total = fma(load(x + j), load(x + j), total)
    return sum_lanes(total)


@operation
def rms_norm(call, op, tid, n):
    """x (T, D) -> y (T, D): x / sqrt(mean(x^2) + eps) * weight."""
    lo, hi, me = my_rows(call, op, tid, n)
    k = op.weight.k
    for i in range(lo, hi):
        x, y = row(op.x, i, me), row(op.y, i, me)
        r = f4(1.0) / math.sqrt(sum_squares(x, k) / f4(op.width) + f4(op.eps))
        for j in range(0, 4 * k, 64):
            store(y + j, load(x + j) * r * load(op.weight.data + j))


@operation
def layer_norm(call, op, tid, n):
    """x (T, D) -> y (T, D): (x - mean) / sqrt(variance + eps) * weight + bias, the variance divided by D."""
    lo, hi, me = my_rows(call, op, tid, n)
    k = op.weight.k
    for i in range(lo, hi):
        x, y = row(op.x, i, me), row(op.y, i, me)
        total = floats(f4(0.0))
        for j in range(0, 4 * k, 64):
            total = total + load(x + j)
        mean = sum_lanes(total) / f4(op.width)
        squares = floats(f4(0.0))
        for j in range(0, 4 * k, 64):
            centred = load(x + j) - mean
            squares = fma(centred, centred, squares)
        padding = f4(k - op.width) * mean * mean  # every zero of the padding counted as (0 - mean)^2
        r = f4(1.0) / math.sqrt((sum_lanes(squares) - padding) / f4(op.width) + f4(op.eps))
        for j in range(0, 4 * k, 64):
            store(y + j, (load(x + j) - mean) * r * load(op.weight.data + j) + load(op.weight.bias + j))
