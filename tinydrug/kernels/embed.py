"""From token ids to rows: token and position embeddings, and the rows whose logits are asked for."""

import numpy as np

from tinydrug.kernels.atomics import call_at
from tinydrug.kernels.jit import inline
from tinydrug.kernels.tables import GATHER, operation, rows_of, share_rows
from tinydrug.kernels.vectors import load, store, store_f32

f4 = np.float32
call_gather = call_at(GATHER)


@inline
def copy_row(source, target, nbytes):
    for j in range(0, nbytes, 64):
        store(target + j, load(source + j))


@operation
def embed(call, op, tid, n):
    """y (T, D): row `id` of the embedding matrix, for each token."""
    lo, hi = share_rows(call.n_tokens, tid, n)
    for i in range(lo, hi):
        y = op.y.data + i * op.y.stride
        call_gather(op.weight.gather, op.weight, call.tokens[i].id, y)
        for c in range(op.width, op.weight.k):  # what is spread is rounded there too
            store_f32(y + 4 * c, f4(0.0))


@operation
def add_position(call, op, tid, n):
    """y (T, D) += row `position` of the float matrix `weight`, rows plain, not in panels."""
    lo, hi = share_rows(call.n_tokens, tid, n)
    for i in range(lo, hi):
        y, p = op.y.data + i * op.y.stride, op.weight.data + 4 * op.weight.k * call.tokens[i].position
        for j in range(0, 4 * op.weight.k, 64):
            store(y + j, load(y + j) + load(p + j))


@operation
def asked(call, op, tid, n):
    """x (T, D) -> y (outputs, D): the rows of the tokens whose logits are asked for, in order."""
    if rows_of(call, op) == 0:
        return
    lo, hi = share_rows(call.n_tokens, tid, n)
    for i in range(lo, hi):
        if call.tokens[i].output >= 0:
            copy_row(
                op.x.data + i * op.x.stride,
                op.y.data + call.tokens[i].output * op.y.stride,
                op.y.stride,
            )
