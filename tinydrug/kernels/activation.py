"""The non-linear functions of the MLP, row by row. A row of a prompt comes from the third cache: the next one
is asked for while one is computed, which saves a third of the time."""

import numpy as np

from tinydrug.kernels.jit import inline, kernel
from tinydrug.kernels.maths import erf, sigmoid, tanh
from tinydrug.kernels.tables import OPERATION, my_rows, row, to_next
from tinydrug.kernels.vectors import load, prefetch_l1, store

f4 = np.float32


def _activation(name, function, gated=False):
    """The operation x (T, F) -> y (T, F) that computes function(x), times z (T, F) if gated."""

    @kernel(OPERATION, name)
    def run(call, op, tid, n):
        lo, hi, me = my_rows(call, op, tid, n)
        for i in range(lo, hi):
            x, y = row(op.x, i, me), row(op.y, i, me)
            for j in range(0, 4 * op.width, 64):
                prefetch_l1(x + to_next(op.x, i, hi) + j)
                if gated:
                    z = row(op.z, i, me) + j
                    prefetch_l1(z + to_next(op.z, i, hi))
                    store(y + j, function(load(x + j)) * load(z))
                else:
                    store(y + j, function(load(x + j)))

    return run


@inline
def _silu(x):
    return x * sigmoid(x)


@inline
def _gelu_tanh(x):
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), GPT-2's gelu_new."""
    inner = (x + x * x * x * f4(0.044715)) * f4(0.7978845608)
    return x * f4(0.5) * (tanh(inner) + f4(1.0))


@inline
def _gelu_erf(x):
    """x/2 (1 + erf(x / sqrt 2)), the exact GELU."""
    return x * f4(0.5) * (erf(x * f4(0.70710678)) + f4(1.0))


silu_mul = _activation("silu_mul", _silu, gated=True)  # x: gate, z: up
gelu_tanh = _activation("gelu_tanh", _gelu_tanh)
gelu_erf = _activation("gelu_erf", _gelu_erf)
