"""Drift and diffusion: the operation that scales attention's output and adds noise of a set size to it.

    x' = x + drift (x - centre) + (diffusion spread + learned std) n,    n ~ N(0, 1)

The amounts are a sequence's, from its schedule. centre, spread and std are a layer's, a value a component:
0, 1 and 0, unless the model has a drift of its own behind this operation (models/dd_gpt2.py).
"""

import numpy as np

from tinydrug.kernels.atomics import atomic_add
from tinydrug.kernels.embed import copy_row
from tinydrug.kernels.generator import draw_key, streams
from tinydrug.kernels.jit import inline
from tinydrug.kernels.laws import LAWS
from tinydrug.kernels.noise import is_protected
from tinydrug.kernels.tables import my_rows, operation, row
from tinydrug.kernels.vectors import floats, fma, ints, load, store

f4, i4 = np.float32, np.int32
normal = LAWS["gauss"].law.components
SITE = 1 << 16  # in the key of a draw: apart from every site's


@inline
def scale_row(x, op, centre, share):
    """Every component of the heads at x moved away from the centre by this share."""
    for j in range(0, 4 * op.head_dim * op.heads, 64):
        here = load(x + j)
        store(x + j, fma(here - load(centre + j), floats(f4(share)), here))


@inline
def add_noise(x, spread, std, term, n):
    """16 components at x, 16 normal numbers n."""
    size = load(spread) * f4(term.diffusion) + load(std) * f4(term.learned)
    store(x, fma(n, size, load(x)))


@inline
def diffuse_head(x, d, spread, std, term, key, position):
    """Noise for the d components of one head at x."""
    first, second = streams(ints(i4(position)), key)
    for j in range(0, 4 * d, 128):
        n0, n1 = normal(first, second, j // 128)
        add_noise(x + j, spread + j, std + j, term, n0)
        add_noise(x + j + 64, spread + j + 64, std + j + 64, term, n1)


@operation
def drift(call, op, tid, n):
    """x (T, H, d) -> y (T, H, d); z: three rows of (H, d), centre, spread and std, zero where d is padded."""
    lo, hi, me = my_rows(call, op, tid, n)
    for i in range(lo, hi):
        x, y = row(op.x, i, me), row(op.y, i, me)
        if x != y:
            copy_row(x, y, 4 * op.head_dim * op.heads)
        span, position = call.spans[call.tokens[i].span], call.tokens[i].position
        term = span.terms[op.layer]
        diffuses = term.diffusion > 0.0 or term.learned > 0.0
        if not (term.drift != 0.0 or diffuses) or is_protected(span, position):
            continue
        if term.drift != 0.0:
            scale_row(y, op, op.z.data, term.drift)
        if diffuses:
            for h in range(op.heads):
                at = 4 * op.head_dim * h
                spread, std = op.z.data + op.z.stride + at, op.z.data + 2 * op.z.stride + at
                key = draw_key(span.seed, op.layer, SITE, h, position)
                diffuse_head(y + at, op.head_dim, spread, std, term, key, position)
        if me <= 0:
            if term.drift != 0.0:
                atomic_add(span.moved + 8 * call.sites, op.heads)
            if diffuses:
                atomic_add(span.moved + 8 * (call.sites + 1), op.heads)
