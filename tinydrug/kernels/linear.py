"""Linear maps: y (T, N) = x (T, K) @ weight (N, K)^T, one kernel a weight format.

Weights lie in panels of 16 output rows; a lane is an output row, so there is no horizontal sum:

    f32, f16, bf16   [panel][k][16]
    quantised        [panel][k/32] blocks (planes.py), and the scales of their groups (blocks.py)

An output element is one sum over k in one order whatever the tile that holds it, so its bits depend
neither on how many tokens came with it nor on the threads: products of integers are exact, and what is
rounded is rounded alike. Tiles reach up to 7 rows past T: buffers have room for them.
"""

import numpy as np

from tinydrug.kernels import amx
from tinydrug.kernels.blocks import BLOCKS
from tinydrug.kernels.jit import inline, kernel
from tinydrug.kernels.quantise import half_sums_of, moments_of, scales_of, sums_of
from tinydrug.kernels.tables import OPERATION, reader, row, rows_of, share
from tinydrug.kernels.vectors import (
    load,
    load_bfloats,
    load_f32,
    load_halves,
    no_bytes,
    prefetch,
    store_bytes,
    subtract_bytes,
    tile1,
    tile4,
    tile8,
    tile16,
    tile_add,
    tile_add_ints,
    tile_add_vec,
    tile_dot4,
    tile_fma,
    tile_fma_panels_bf16,
    tile_fma_panels_f16,
    tile_fma_panels_f32,
    tile_ints,
    tile_load,
    tile_rows,
    tile_scale_add,
    tile_scale_add_stored,
    tile_scale_add_stored_fma,
    tile_splat_ints,
    tile_store,
)

i4, i8 = np.int32, np.int64
UNPACKED = 1 << 20  # bytes of panels that are unpacked together
RING = 4096  # bytes of four products
TOGETHER = 32  # tokens, and
SLICE = 512  # columns of them at least, that stay in a core's first cache while panels come from the second
AHEAD = 2624  # bytes of weights to ask for before they are needed: hardware alone leaves a third of DRAM idle


# --- one panel of floats: tile of zeros, addresses of weights and activations, k, activation stride -> tile -
@inline
def panel_f32(acc, w, x, k, stride):
    for i in range(k):
        acc = tile_fma(acc, load(w + 64 * i), x + 4 * i, stride)
    return acc


@inline
def panel_f16(acc, w, x, k, stride):
    for i in range(k):
        acc = tile_fma(acc, load_halves(w + 32 * i), x + 4 * i, stride)
    return acc


@inline
def panel_bf16(acc, w, x, k, stride):
    for i in range(k):
        acc = tile_fma(acc, load_bfloats(w + 32 * i), x + 4 * i, stride)
    return acc


# --- four panels for one token: independent sums hide the latency of the one fma chain a float panel is -----
@inline
def panels_f32(acc, w, step, x, k):
    for i in range(k):
        acc = tile_fma_panels_f32(acc, w + 64 * i, step, load_f32(x + 4 * i))
    return acc


@inline
def panels_f16(acc, w, step, x, k):
    for i in range(k):
        acc = tile_fma_panels_f16(acc, w + 32 * i, step, load_f32(x + 4 * i))
    return acc


@inline
def panels_bf16(acc, w, step, x, k):
    for i in range(k):
        acc = tile_fma_panels_bf16(acc, w + 32 * i, step, load_f32(x + 4 * i))
    return acc


# --- the epilogue -------------------------------------------------------------------------------------------
@inline
def finish(acc, bias, onto, y, stride):
    """Add the bias (if any), then what is there already (if asked), then store: one order for every tile."""
    if bias != 0:
        acc = tile_add_vec(acc, load(bias))
    if onto:
        acc = tile_add(tile_load(acc, y, stride), acc)
    tile_store(acc, y, stride)


# --- a quantised format -------------------------------------------------------------------------------------
def _block_linear(name, blocks):
    """The kernel of a quantised format; activations come as int8."""
    low, high, scale, minimum = blocks.planes.low, blocks.planes.high, blocks.scale, blocks.minimum
    keys, group, many = blocks.keys, blocks.group, blocks.group // 32
    second, offset, block_bytes, scale_bytes = (
        blocks.second_scale,
        blocks.offset,
        blocks.planes.nbytes,
        blocks.scale_bytes,
    )
    shift = max(offset, 1).bit_length() - 1
    parts = 1 if second is None else 2  # products of a group,
    tile_columns = min(64, group // parts)  # and columns of a tile

    @inline
    def groups_of(k):
        return (k + group - 1) // group

    @inline
    def blocks_of(g, k):
        """How many blocks group g has: the last may have fewer."""
        return 1 if many == 1 else min(many, k // 32 - many * g)

    @inline
    def start(zeros, sums, stride):
        """Integer sums, begun with what undoes the offset."""
        return tile_splat_ints(zeros, sums, stride, i4(shift)) if offset else tile_ints(zeros)

    @inline
    def dots_low(dots, w, first, key, x, stride):
        for c in range(first, first + 2):
            dots = tile_dot4(dots, low(w, c, key), x + 4 * c, stride)
        return dots

    @inline
    def dots_high(dots, w, first, key, x, stride):
        for c in range(first, first + 2):
            dots = tile_dot4(dots, high(w, c, key), x + 16 + 4 * c, stride)
        return dots

    @inline
    def ask(block):
        for j in range(0, block_bytes, 64):
            prefetch(block + AHEAD + j)

    # The ways a group adds to floats: by one scale; with a minimum; by a scale for each half of a block.
    # w and x are the group's.
    if second is not None:

        @inline
        def add_group(acc, w, s, g, columns, x, k, stride, ahead):
            if ahead:
                ask(w)
            key, key_8, key_16, key_24 = keys(s, g, 0)
            scales, sums = scales_of(x, k) + 4 * g, half_sums_of(x, k) + 8 * g
            dots = dots_low(start(acc, sums, stride), w, 0, key, columns, stride)
            dots = dots_low(dots, w, 2, key_8, columns, stride)
            acc = tile_scale_add(acc, dots, scale(s, g), scales, stride)
            dots = dots_high(start(acc, sums + 4, stride), w, 0, key_16, columns, stride)
            dots = dots_high(dots, w, 2, key_24, columns, stride)
            return tile_scale_add(acc, dots, second(s, g), scales, stride)

        def product(t):
            begin, multiply = amx.begin(t), amx.multiply(t)

            @inline
            def half(x, panel, i, k):
                begin()
                multiply(x + 256 * i - 240 * (i & 1), 32, panel + 256 * i)

            return half

        @inline
        def add_product(acc, integers, s, i, x_scales, moments):
            factor = second(s, i >> 1) if i & 1 else scale(s, i >> 1)
            return tile_scale_add_stored(acc, integers, factor, x_scales + 64 * (i >> 1))

    else:

        @inline
        def add_group(acc, w, s, g, columns, x, k, stride, ahead):
            # Sums of their own hide each other's latency; eight tokens have no registers for more than two.
            few = tile_rows(acc) <= 4
            dots, others = start(acc, sums_of(x, k) + 4 * g, stride), tile_ints(acc)
            dots_8, others_8 = tile_ints(acc), tile_ints(acc)
            for b in range(blocks_of(g, k)):
                if ahead:
                    ask(w)
                key, key_8, key_16, key_24 = keys(s, g, b)
                dots = dots_low(dots, w, 0, key, columns, stride)
                others = dots_high(others, w, 0, key_16, columns, stride)
                if few:
                    dots_8 = dots_low(dots_8, w, 2, key_8, columns, stride)
                    others_8 = dots_high(others_8, w, 2, key_24, columns, stride)
                else:
                    dots = dots_low(dots, w, 2, key_8, columns, stride)
                    others = dots_high(others, w, 2, key_24, columns, stride)
                w, columns = w + block_bytes, columns + 32
            dots = tile_add_ints(tile_add_ints(dots, others), tile_add_ints(dots_8, others_8))
            acc = tile_scale_add(acc, dots, scale(s, g), scales_of(x, k) + 4 * g, stride)
            if minimum is not None:
                acc = tile_fma(acc, minimum(s, g), moments_of(x, k) + 4 * g, stride)
            return acc

        def product(t):
            begin, multiply = amx.begin(t), amx.multiply(t)

            @inline
            def whole(x, panel, i, k):
                x, panel, width = x + 16 * group * i, panel + 16 * group * i, 32 * blocks_of(i, k)
                begin()
                if width == group:  # a loop that can be unrolled
                    for c in range(0, group, tile_columns):
                        multiply(x + c, group, panel + 16 * c)
                else:
                    for c in range(0, width, tile_columns):
                        multiply(x + c, width, panel + 16 * c)

            return whole

        @inline
        def add_product(acc, integers, s, i, x_scales, moments):
            x = x_scales + 64 * i
            if minimum is not None:
                at = moments + 64 * i
                return tile_scale_add_stored_fma(acc, integers, scale(s, i), x, minimum(s, i), at)
            return tile_scale_add_stored(acc, integers, scale(s, i), x)

    @inline
    def add_group_of(acc, op, p, g, x, ahead):
        """Group g of panel p."""
        w, groups = op.weight, groups_of(op.weight.k)
        data = w.data + p * (w.k // 32) * block_bytes + many * block_bytes * g
        s = w.scales + p * groups * scale_bytes
        if ahead:
            for j in range(0, scale_bytes, 64):
                prefetch(s + scale_bytes * g + AHEAD * scale_bytes // (many * block_bytes) + j)
        return add_group(acc, data, s, g, x + group * g, x, w.k, op.x.stride, ahead)

    @inline
    def finish_panel(acc, op, p, y):
        bias = op.weight.bias
        finish(acc, bias + 64 * p if bias != 0 else i8(0), op.onto != 0, y + 64 * p, op.y.stride)

    @inline
    def tile(zeros, op, p, x, y, ahead):
        acc = zeros
        for g in range(groups_of(op.weight.k)):
            acc = add_group_of(acc, op, p, g, x, ahead)
        finish_panel(acc, op, p, y)

    @inline
    def two_panels(op, p, q, x, y):
        """Of one token: while one panel waits for memory or for its own sum, the other goes on."""
        one, other = tile1(), tile1()
        for g in range(groups_of(op.weight.k)):
            one = add_group_of(one, op, p, g, x, True)
            other = add_group_of(other, op, q, g, x, True)
        finish_panel(one, op, p, y)
        finish_panel(other, op, q, y)

    @inline
    def unpack(w, p, out):
        """Panel p -> signed bytes [k/4][16][4]."""
        groups, block = groups_of(w.k), w.data + p * (w.k // 32) * block_bytes
        for g in range(groups):
            for b in range(blocks_of(g, w.k)):
                key, key_8, key_16, key_24 = keys(w.scales + p * groups * scale_bytes, g, b)
                for c in range(4):
                    quad = low(block, c, key if c < 2 else key_8)
                    store_bytes(out + 64 * c, subtract_bytes(quad, i4(offset)))
                    quad = high(block, c, key_16 if c < 2 else key_24)
                    store_bytes(out + 256 + 64 * c, subtract_bytes(quad, i4(offset)))
                block, out = block + block_bytes, out + 512
        if w.k % tile_columns != 0:  # a tile is twice as wide as what is left: the rest is times zero
            for j in range(0, 512, 64):
                store_bytes(out + j, no_bytes())

    @inline
    def unpacked_bytes(k):
        """Of a panel."""
        return 16 * ((k + tile_columns - 1) // tile_columns * tile_columns)

    configure = amx.configure(tile_columns)

    def stage(j):
        """A stage of the pipeline: product m + j begins, the one two before leaves its tile, and the one four
        before is added to the sums of its token tile and panel, which begin with it or are taken up again,
        and are left for later or finished."""
        multiply, end = product(j), amx.end(j ^ 2)

        @inline
        def step(acc, begun, added, m, count, ring, lengths, x_step, panel_step, rows, finished):
            first, last, tiles, k = lengths
            if m + j < count:
                i, t, x, panel = begun
                multiply(x, panel, i, k)
                i += 1
                if i == last:
                    i, t, x = first, t + 1, x + x_step
                    if t == tiles:
                        t, x, panel = i8(0), x - tiles * x_step, panel + panel_step
                begun = i, t, x, panel
            end(ring + 1024 * (j ^ 2))
            if 4 <= m + j < count + 4:
                i, t, x, moments, s, y, bias, partial = added
                scales_step, y_stride, onto = rows
                if i == first:
                    acc = tile_load(acc, partial, 64) if first > 0 else tile16()
                acc = add_product(acc, ring + 1024 * j, s, i, x, moments)
                i += 1
                if i == last:
                    if finished:
                        finish(acc, bias, onto, y, y_stride)
                    else:
                        tile_store(acc, partial, 64)
                    i, t, x, moments = first, t + 1, x + x_step, moments + x_step
                    y, partial = y + 16 * y_stride, partial + 1024
                    if t == tiles:
                        t, x, moments = i8(0), x - tiles * x_step, moments - tiles * x_step
                        s, y = s + scales_step, y - 16 * tiles * y_stride + 64
                        bias = bias + 64 if bias != 0 else bias
                added = i, t, x, moments, s, y, bias, partial
            return acc, begun, added

        return step

    stage_0, stage_1, stage_2, stage_3 = map(stage, range(4))

    @inline
    def add_slice(op, few, tiles, first, last, p0, p1, panels, ring, partial):
        """Products first .. last of so many token tiles from token `few` on and panels p0 .. p1, in a
        pipeline of four: tiles wait for their stores, and stores for what reads them."""
        w, count, acc = op.weight, (p1 - p0) * tiles * (last - first), tile16()
        x, k, scales_step = op.x.data + few * op.x.stride, w.k, groups_of(w.k) * scale_bytes
        begun = first, i8(0), x, panels
        x_scales, moments = x + 16 * scales_of(i8(0), k), x + 16 * moments_of(i8(0), k)
        y, bias = op.y.data + few * op.y.stride + 64 * p0, w.bias + 64 * p0 if w.bias != 0 else i8(0)
        added = first, i8(0), x_scales, moments, w.scales + p0 * scales_step, y, bias, partial
        rest = count, ring, (first, last, tiles, k), 16 * op.x.stride, unpacked_bytes(k)
        rows, finished = (scales_step, op.y.stride, op.onto != 0), last == parts * groups_of(k)
        for m in range(0, count + 4, 4):
            acc, begun, added = stage_0(acc, begun, added, m, *rest, rows, finished)
            acc, begun, added = stage_1(acc, begun, added, m, *rest, rows, finished)
            acc, begun, added = stage_2(acc, begun, added, m, *rest, rows, finished)
            acc, begun, added = stage_3(acc, begun, added, m, *rest, rows, finished)

    @inline
    def linear_amx(call, op, tid, n, rows):
        """All whole groups of 16 tokens; how many tokens that were. Some panels at a time are unpacked, to be
        used for all tokens; some columns at a time, so that those of a few tokens stay in the first cache."""
        w, done = op.weight, rows // 16 * 16
        if done == 0:
            return done
        lo, hi = share(w.n // 16, tid, n)
        total = parts * groups_of(w.k)
        slices = max(1, w.k // SLICE)
        step = (total + slices - 1) // slices
        many = max(1, UNPACKED // unpacked_bytes(w.k))  # panels
        ring = call.scratch + tid * call.scratch_stride
        panels = ring + RING
        partial = panels + many * unpacked_bytes(w.k)
        configure(ring)
        for p0 in range(lo, hi, many):
            p1 = min(p0 + many, hi)
            for p in range(p0, p1):
                unpack(w, p, panels + unpacked_bytes(w.k) * (p - p0))
            for few in range(0, done, TOGETHER):
                tiles = min(TOGETHER, done - few) // 16
                for first in range(0, total, step):
                    last = min(first + step, total)
                    add_slice(op, few, tiles, first, last, p0, p1, panels, ring, partial)
        amx.release()
        return done

    @kernel(OPERATION, f"linear_{name}")
    def linear(call, op, tid, n):
        me, rows = reader(call, op, tid), rows_of(call, op)
        lo, hi = share(op.weight.n // 16, tid, n)
        first = linear_amx(call, op, tid, n, rows) if amx.AVAILABLE else i8(0)
        if rows == 1:
            half = (hi - lo) // 2
            for p in range(lo, lo + half):
                two_panels(op, p, p + half, row(op.x, 0, me), op.y.data)
            lo += 2 * half
        for p in range(lo, hi):
            t = first
            while t < rows:
                x, y = row(op.x, t, me), op.y.data + t * op.y.stride
                if rows - t == 1:
                    tile(tile1(), op, p, x, y, t == first)
                    t += 1
                elif rows - t <= 4:
                    tile(tile4(), op, p, x, y, t == first)
                    t += 4
                else:
                    tile(tile8(), op, p, x, y, t == first)
                    t += 8

    return linear


def _float_linear(name, panel, panels, element):
    """The kernel of a float format, element bytes a weight."""

    @inline
    def tile(zeros, w, p, x, x_stride, y, y_stride, onto):
        acc = panel(zeros, w.data + p * w.k * element * 16, x, w.k, x_stride)
        finish(acc, w.bias + 64 * p if w.bias != 0 else i8(0), onto, y + 64 * p, y_stride)

    @inline
    def one_token(zeros, w, p, x, y, onto):
        step = w.k * element * 16
        acc = panels(zeros, w.data + p * step, step, x, w.k)
        if w.bias != 0:
            acc = tile_add(acc, tile_load(acc, w.bias + 64 * p, 64))
        if onto:
            acc = tile_add(tile_load(acc, y + 64 * p, 64), acc)
        tile_store(acc, y + 64 * p, 64)
        return p + tile_rows(zeros)

    @kernel(OPERATION, f"linear_{name}")
    def linear(call, op, tid, n):
        w, me, rows = op.weight, reader(call, op, tid), rows_of(call, op)
        p, hi = share(w.n // 16, tid, n)
        xs, ys, onto = op.x.stride, op.y.stride, op.onto != 0
        if rows == 1:
            x, y = row(op.x, 0, me), op.y.data
            while p < hi:
                if hi - p >= 8:
                    p = one_token(tile8(), w, p, x, y, onto)
                elif hi - p >= 4:
                    p = one_token(tile4(), w, p, x, y, onto)
                else:
                    p = one_token(tile1(), w, p, x, y, onto)
            return
        while p < hi:
            t = 0
            while t < rows:
                x, y = row(op.x, t, me), op.y.data + t * ys
                if rows - t <= 4:
                    tile(tile4(), w, p, x, xs, y, ys, onto)
                    t += 4
                else:
                    tile(tile8(), w, p, x, xs, y, ys, onto)
                    t += 8
            p += 1

    return linear


LINEAR = {
    "f32": _float_linear("f32", panel_f32, panels_f32, 4),
    "f16": _float_linear("f16", panel_f16, panels_f16, 2),
    "bf16": _float_linear("bf16", panel_bf16, panels_bf16, 2),
} | {name: _block_linear(name, blocks) for name, blocks in BLOCKS.items()}


def scratch_bytes(k: int) -> int:
    """Private memory that a thread wants for linear maps over k columns: products, unpacked panels and
    sums that are not finished."""
    return RING + max(UNPACKED, 16 * k + 512) + 64 * TOGETHER * (1 + UNPACKED // (16 * SLICE))
