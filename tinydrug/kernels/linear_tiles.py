"""Linear maps of quantised weights in tile registers (amx.py): whole sixteens of tokens.

Panels are unpacked to bytes, some at a time, and used for all tokens. A product is 16 tokens by a panel by a
group of columns. It begins in a tile, leaves it as integers two products later and is scaled and added to
floats another two later: tiles wait for their stores, and stores for what reads them.
"""

import numpy as np

from tinydrug.kernels import amx
from tinydrug.kernels.blocks import widths
from tinydrug.kernels.epilogue import finish
from tinydrug.kernels.jit import inline
from tinydrug.kernels.quantise import moments_of, scales_of
from tinydrug.kernels.tables import share
from tinydrug.kernels.vectors import (
    no_bytes,
    store_bytes,
    subtract_bytes,
    tile16,
    tile_load,
    tile_scale_add_stored,
    tile_scale_add_stored_fma,
    tile_store,
)

i4, i8 = np.int32, np.int64
UNPACKED = 1 << 20  # bytes of panels that are unpacked together
RING = 4096  # bytes of four products
TOGETHER = 32  # tokens, and
SLICE = 512  # columns of them at least, that stay in a core's first cache while panels come from the second


def in_tiles(blocks):
    """The function (call, op, thread, threads, rows) of a format that does whole sixteens of rows, and says
    how many those were."""
    low, high, keys, group = blocks.planes.low, blocks.planes.high, blocks.keys, blocks.group
    offset, block_bytes, scale_bytes = blocks.offset, blocks.planes.nbytes, blocks.scale_bytes
    scale, second, minimum = blocks.scale, blocks.second_scale, blocks.minimum
    parts = 1 if second is None else 2  # products of a group,
    tile_columns = min(64, group // parts)  # and columns of a tile
    groups_of, blocks_of = widths(group)

    # A product begins; and its integers are added to floats.
    if second is not None:

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
        pipeline of four."""
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
        """Some panels at a time are unpacked, to be used for all tokens; some columns at a time are
        multiplied, so that those of a few tokens stay in the first cache."""
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

    return linear_amx


def scratch_bytes(k: int) -> int:
    """Private memory that a thread wants for linear maps over k columns: products, unpacked panels and, where
    there are two slices or more, sums that are not finished."""
    unfinished = 64 * TOGETHER * (1 + UNPACKED // (32 * SLICE))
    return RING + max(UNPACKED, 16 * k + 512) + unfinished
