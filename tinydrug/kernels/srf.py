"""Attention by simplex random features: a sequence is remembered as m running means of its values.

exp(q.k / sqrt(d)) is the mean over random directions w of exp(c w.q - |c q|^2/2) exp(c w.k - |c k|^2/2),
where c = d^(-1/4). So of all keys k_t and values v_t up to now, direction w_j needs only

    M = max e_t        z = sum exp(e_t - M)        S = sum exp(e_t - M) v_t / z

with e_t = c w_j.k_t - |c k_t|^2/2, and a query gets the mean of all S, weighted by exp(c w_j.q + M) z. The
seeds have one M a head. With one a feature, z is at least 1: nothing overflows, no query finds only zeros.

A state: M and z (L, G, 2, m) float32 where a cache has keys, S (L, G, d/16, m, 16) where it has values. m is
padded to whole vectors; features that do not exist get no weight. A token at position 0 starts a new state.

Three operations. In each a thread owns what it changes (16 features, heads, 16 columns of S) and goes through
the tokens in order: the bits of a token depend on those before it and on nothing else. Blocks of tokens would
save little: 16 columns of S stay in the nearest caches while a whole prompt goes by.
"""

import numpy as np

from tinydrug.kernels.generator import draw_key, streams, word
from tinydrug.kernels.jit import inline, kernel
from tinydrug.kernels.maths import exp
from tinydrug.kernels.norm import sum_squares
from tinydrug.kernels.tables import OPERATION, operation, share
from tinydrug.kernels.tiles import tile1, tile2, tile4, tile8, tile_add, tile_fma, tile_store
from tinydrug.kernels.vectors import (
    as_floats,
    as_ints,
    floats,
    fma,
    ints,
    lane,
    load,
    load_f32,
    load_halves,
    max_lanes,
    maximum,
    select,
    shift_right,
    store,
    store_halves,
    sum_lanes,
)

f4, i4 = np.float32, np.int32
TOKENS = 8  # tokens whose products with a direction are computed together
NOTHING = f4(-1e30)  # M of no tokens; not -inf: -inf - -inf would be NaN


@inline
def tile_products(zeros, directions, x, step, d, out, out_step):
    u = zeros
    for i in range(d):
        u = tile_fma(u, load(directions + 64 * i), x + 4 * i, step)
    tile_store(u, out, out_step)


@inline
def products(directions, x, step, d, tokens, out, out_step):
    """c w.x of 16 directions (d, 16) and of up to 8 tokens' vectors, `step` apart -> out. If they are not 1,
    rows up to the 8th are computed and written, too."""
    if tokens == 1:
        tile_products(tile1(), directions, x, step, d, out, out_step)
    else:
        tile_products(tile8(), directions, x, step, d, out, out_step)


@operation
def absorb(call, op, tid, n):
    """keys x (T, G, d) into M and z -> y (T, G, 3, m): the share of each token's value in S, then M and z
    with it."""
    m, d, G = op.width, op.head_dim, op.kv_heads
    u = call.scratch + tid * call.scratch_stride
    first, last = share(G * (m // 16), tid, n)
    for unit in range(first, last):
        g, j = unit // (m // 16), 64 * (unit % (m // 16))
        for s in range(call.n_spans):
            span = call.spans[s]
            at = span.keys + 8 * m * (op.layer * G + g) + j
            scale, total = load(at), load(at + 4 * m)
            for t in range(span.count):
                token = span.first + t
                k = op.x.data + token * op.x.stride + 4 * d * g
                y = op.y.data + token * op.y.stride + 12 * m * g + j
                if t % TOKENS == 0:
                    tokens = min(TOKENS, span.count - t)
                    products(op.features + j * d, k, op.x.stride, d, tokens, u, 64)
                if call.tokens[token].position == 0:
                    scale, total = floats(NOTHING), floats(f4(0.0))
                e = load(u + 64 * (t % TOKENS)) - sum_squares(k, d) * f4(op.scale)
                before, scale = scale, maximum(scale, e)
                weight = exp(e - scale)
                total = fma(total, exp(before - scale), weight)
                store(y, weight / total)
                store(y + 4 * m, scale)
                store(y + 8 * m, total)
            store(at, scale)
            store(at + 4 * m, total)


@inline
def normalise(y, scales, sums, m, valid):
    """c w.q at y (m) -> exp(c w.q + M) z over the sum of all; 0 from feature `valid` on."""
    top = floats(f4(-np.inf))
    for j in range(0, 4 * m, 64):
        exists = lane() + i4(j // 4) < i4(valid)
        e = select(exists, load(y + j) + load(scales + j), floats(f4(-np.inf)))
        store(y + j, e)
        top = maximum(top, e)
    highest, total = max_lanes(top), floats(f4(0.0))
    for j in range(0, 4 * m, 64):
        weight = exp(load(y + j) - highest) * load(sums + j)
        store(y + j, weight)
        total = total + weight
    inverse = f4(1.0) / sum_lanes(total)
    for j in range(0, 4 * m, 64):
        store(y + j, load(y + j) * inverse)


@operation
def weigh(call, op, tid, n):
    """queries x (T, H, d), with M and z in z (T, G, 3, m) -> y (T, H, m), the weights of the features."""
    m, d, group = op.width, op.head_dim, op.heads // op.kv_heads
    blocks = (call.n_tokens + TOKENS - 1) // TOKENS
    first, last = share(op.heads * blocks, tid, n)
    for unit in range(first, last):
        h, token = unit // blocks, unit % blocks * TOKENS
        tokens = min(TOKENS, call.n_tokens - token)
        q = op.x.data + token * op.x.stride + 4 * d * h
        y = op.y.data + token * op.y.stride + 4 * m * h
        for j in range(0, 4 * m, 64):
            products(op.features + j * d, q, op.x.stride, d, tokens, y + j, op.y.stride)
        for t in range(tokens):
            after = op.z.data + (token + t) * op.z.stride + 12 * m * (h // group)
            normalise(y + t * op.y.stride, after + 4 * m, after + 8 * m, m, op.valid)


@inline
def store_exactly(p, x, dice):
    store(p, x)


@inline
def store_rounded(p, x, dice):
    """To f16, up or down by chance (13 bits of dice). A mean of thousands moves by less than f16 can tell:
    rounded to the nearest, it would never move again."""
    store_halves(p, as_floats((as_ints(x) + (dice & i4(8191))) & i4(-8192)))


def _recall(name, load_mean, store_mean, cell):
    """The operation for one element type of S."""

    @inline
    def update(at, value, share_of_it, dice):
        """One feature's mean of 16 columns, with the value in it."""
        before = load_mean(at)
        after = fma(value - before, floats(load_f32(share_of_it)), before)
        store_mean(at, after, dice)
        return after

    @inline
    def recall_heads(zeros, means, weights, m, value, shares, dice, out):
        """16 columns of S (m, 16) for heads whose weights lie m apart -> out, a row each. `shares`: let the
        value in on the way; 0: it is in. Even and odd features add up apart: one chain waits for itself."""
        even, odd = zeros, zeros
        for j in range(0, m, 2):
            at = means + 16 * cell * j
            if shares:
                bits = word(dice, dice, ints(i4(j)))
                s0 = update(at, value, shares + 4 * j, bits)
                s1 = update(at + 16 * cell, value, shares + 4 * j + 4, shift_right(bits, i4(16)))
            else:
                s0, s1 = load_mean(at), load_mean(at + 16 * cell)
            even = tile_fma(even, s0, weights + 4 * j, 4 * m)
            odd = tile_fma(odd, s1, weights + 4 * j + 4, 4 * m)
        tile_store(tile_add(even, odd), out, 64)

    @kernel(OPERATION, f"recall_{name}")
    def recall(call, op, tid, n):
        """values w (T, G, d) into S by shares in z (T, G, 3, m); S by weights x (T, H, m) -> y (T, H, d)."""
        m, d, G, group = op.width, op.head_dim, op.kv_heads, op.heads // op.kv_heads
        out = call.scratch + tid * call.scratch_stride
        first, last = share(G * (d // 16), tid, n)
        for unit in range(first, last):
            g, c = unit // (d // 16), 64 * (unit % (d // 16))
            for s in range(call.n_spans):
                span = call.spans[s]
                means = span.values + cell * 16 * m * (op.layer * G * (d // 16) + unit)
                for token in range(span.first, span.first + span.count):
                    position = call.tokens[token].position
                    if position == 0:
                        for at in range(means, means + cell * 16 * m, 64):
                            store(at, floats(f4(0.0)))
                    value = load(op.w.data + token * op.w.stride + 4 * d * g + c)
                    shares = op.z.data + token * op.z.stride + 12 * m * g
                    dice, _ = streams(lane(), draw_key(position, op.layer, unit, 0, 0))
                    for h in range(g * group, (g + 1) * group, 4):
                        weights = op.x.data + token * op.x.stride + 4 * m * h
                        rows = min((g + 1) * group - h, 4)
                        if rows == 1:
                            recall_heads(tile1(), means, weights, m, value, shares, dice, out)
                        elif rows == 2:
                            recall_heads(tile2(), means, weights, m, value, shares, dice, out)
                        else:  # a fourth row that is no head of this group is computed, and stays in `out`
                            recall_heads(tile4(), means, weights, m, value, shares, dice, out)
                        shares = 0
                        y = op.y.data + token * op.y.stride + 4 * d * h + c
                        for r in range(rows):
                            store(y + 4 * d * r, load(out + 64 * r))

    return recall


RECALL = {
    "f16": _recall("f16", load_halves, store_rounded, 2),
    "f32": _recall("f32", load, store_exactly, 4),
}
