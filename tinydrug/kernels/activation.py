"""The non-linear functions of the MLP, row by row. Of many rows the next one is asked for while one is
computed, which halves the time."""

import numpy as np

from tinydrug.kernels.maths import erf, sigmoid, tanh
from tinydrug.kernels.tables import my_rows, operation, row
from tinydrug.kernels.vectors import load, prefetch_l1, store

f4 = np.float32


@operation
def silu_mul(call, op, tid, n):
    """gate x (T, F), up z (T, F) -> y (T, F): silu(gate) * up."""
    lo, hi, me = my_rows(call, op, tid, n)
    for i in range(lo, hi):
        gate, up, y = row(op.x, i, me), row(op.z, i, me), row(op.y, i, me)
        next_row = op.x.stride if i + 1 < hi else 0
        for j in range(0, 4 * op.width, 64):
            prefetch_l1(gate + next_row + j)
            prefetch_l1(up + next_row + j)
            x = load(gate + j)
            store(y + j, x * sigmoid(x) * load(up + j))


@operation
def gelu_tanh(call, op, tid, n):
    """x (T, F) -> y (T, F): x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), GPT-2's gelu_new."""
    lo, hi, me = my_rows(call, op, tid, n)
    for i in range(lo, hi):
        source, y = row(op.x, i, me), row(op.y, i, me)
        next_row = op.x.stride if i + 1 < hi else 0
        for j in range(0, 4 * op.width, 64):
            prefetch_l1(source + next_row + j)
            x = load(source + j)
            inner = (x + x * x * x * f4(0.044715)) * f4(0.7978845608)
            store(y + j, x * f4(0.5) * (tanh(inner) + f4(1.0)))


@operation
def gelu_erf(call, op, tid, n):
    """x (T, F) -> y (T, F): x/2 (1 + erf(x / sqrt 2)), the exact GELU."""
    lo, hi, me = my_rows(call, op, tid, n)
    for i in range(lo, hi):
        source, y = row(op.x, i, me), row(op.y, i, me)
        next_row = op.x.stride if i + 1 < hi else 0
        for j in range(0, 4 * op.width, 64):
            prefetch_l1(source + next_row + j)
            x = load(source + j)
            store(y + j, x * f4(0.5) * (erf(x * f4(0.70710678)) + f4(1.0)))
