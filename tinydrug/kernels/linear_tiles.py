"""Linear maps of quantised weights in tile registers (amx.py): sixteens of tokens, and eights.

Panels are unpacked to bytes, and used for all tokens. A product is a tile of tokens by a panel by a group of
columns. Its weights are unpacked four products ahead; it begins in a tile, leaves it as integers two products
later and is scaled and added to floats another two later: tiles wait for their stores, and stores for what
reads them. A map of few tokens waits for memory: what is unpacked stays in the first cache, and while tiles
multiply the weights to come are asked for.
"""

import numpy as np

from tinydrug.kernels import amx
from tinydrug.kernels.blocks import widths
from tinydrug.kernels.epilogue import finish
from tinydrug.kernels.jit import inline
from tinydrug.kernels.lookups import subtract_bytes
from tinydrug.kernels.quantise import moments_of, scales_of
from tinydrug.kernels.tables import share
from tinydrug.kernels.tiles import SCALE_ADD_STORED, TILES, tile_load, tile_store
from tinydrug.kernels.vectors import no_bytes, prefetch_l1, prefetch_l2, store_bytes

i4, i8 = np.int32, np.int64
# Bytes of weights to ask for before they are needed, found by trial: what the hardware asks for by itself
# leaves a third of DRAM idle.
AHEAD = 2624
UNPACKED = 1 << 20  # bytes of panels that are unpacked together, for more tokens than are multiplied together
RING = 4096  # bytes of four products
WIDEST = 4096  # unpacked bytes of the widest group of a panel, 256 columns
LEAD = 4  # products between a group's unpacking and its first use
TOGETHER = 32  # tokens, and
SLICE = 512  # columns of them at least, that stay in a core's first cache while panels come from the second


def in_tiles(blocks):
    """The function (call, op, thread, threads, rows) of a format that does most rows, and says how many."""
    low, high, keys = blocks.planes.low, blocks.planes.high, blocks.keys
    group, many = blocks.group, blocks.group // 32
    offset, block_bytes, scale_bytes = blocks.offset, blocks.planes.nbytes, blocks.scale_bytes
    scale, second, minimum = blocks.scale, blocks.second_scale, blocks.minimum
    parts = 1 if second is None else 2  # products of a group,
    tile_columns = min(64, group // parts)  # and columns of a tile
    unit = 16 * group // parts  # unpacked bytes of a product
    groups_of, blocks_of = widths(group)
    # Where scales are many, they and not the activations are what takes time.
    at_once = TOGETHER if many > 1 else 4 * TOGETHER
    groups_ahead = -(-AHEAD // (many * block_bytes))

    # A product begins; and (addition) its integers are added to floats.
    if second is not None:

        def product(t):
            begin, multiply = amx.begin(t), amx.multiply(t)

            @inline
            def half(x, panel, i, k):
                begin()
                multiply(x + 256 * i - 240 * (i & 1), 32, panel)

            return half

    else:

        def product(t):
            begin, multiply = amx.begin(t), amx.multiply(t)

            @inline
            def whole(x, panel, i, k):
                x, width = x + 16 * group * i, 32 * blocks_of(i, k)
                begin()
                if width == group:  # a loop that can be unrolled
                    for c in range(0, group, tile_columns):
                        multiply(x + c, group, panel + 16 * c)
                else:
                    for c in range(0, width, tile_columns):
                        multiply(x + c, width, panel + 16 * c)

            return whole

    def addition(by_sums):
        """The function that adds a product; by_sums: see tiles.py."""
        add_scaled, add_scaled_fma = SCALE_ADD_STORED[by_sums]

        @inline
        def add_product(acc, integers, s, i, x_scales, moments):
            x = x_scales + 64 * (i // parts)
            if parts == 2:
                return add_scaled(acc, integers, second(s, i >> 1) if i & 1 else scale(s, i >> 1), x)
            if minimum is not None:
                return add_scaled_fma(acc, integers, scale(s, i), x, minimum(s, i), moments + 64 * i)
            return add_scaled(acc, integers, scale(s, i), x)

        return add_product

    @inline
    def unpack(block, s, g, k, out):
        """Group g of a panel -> signed bytes [columns/4][16][4]."""
        for j in range(0, scale_bytes, 64):
            prefetch_l2(s + scale_bytes * (g + groups_ahead) + j)
        for b in range(blocks_of(g, k)):
            key, key_8, key_16, key_24 = keys(s, g, b)
            for j in range(0, block_bytes, 64):
                prefetch_l2(block + AHEAD + j)
            for c in range(4):
                quad = low(block, c, key if c < 2 else key_8)
                store_bytes(out + 64 * c, subtract_bytes(quad, i4(offset)))
                quad = high(block, c, key_16 if c < 2 else key_24)
                store_bytes(out + 256 + 64 * c, subtract_bytes(quad, i4(offset)))
            block, out = block + block_bytes, out + 512
        if g == groups_of(k) - 1 and k % tile_columns != 0:
            # A tile is twice as wide as what is left: the rest is times zero.
            for j in range(0, 512, 64):
                store_bytes(out + j, no_bytes())

    @inline
    def unpack_panel(w, p, out):
        groups, data = groups_of(w.k), w.data + p * (w.k // 32) * block_bytes
        for g in range(groups):
            s = w.scales + p * groups * scale_bytes
            unpack(data + many * block_bytes * g, s, g, w.k, out + 16 * group * g)

    @inline
    def panel_bytes(k):
        """Of an unpacked panel."""
        return 16 * group * groups_of(k)

    def pipeline(tokens, unpacks):
        """The function that adds products, for tiles of so many tokens; unpacks: weights on the way."""
        zeros, lead = TILES[tokens], LEAD if unpacks else 0
        add_product = addition(by_sums=many == 1 and not unpacks)  # found by trial; no bit depends on it

        def stage(j):
            """A stage of the pipeline: weights of product m + j + LEAD are unpacked, product m + j begins,
            the one two before leaves its tile, and the one four before is added to the sums of its token
            tile and panel, which begin with it or are taken up again, and are left for later or finished."""
            multiply, end = product(j), amx.end(j ^ 2)

            @inline
            def step(acc, packed, begun, added, m, count, lengths, room, steps, onto):
                first, last, tiles, k = lengths  # products of a panel, tiles of tokens, columns
                ring, unpacked, full = room
                x_step, y_step, panel_step, block_step, scales_step = steps
                if unpacks and m + j + LEAD < count:
                    i, t, block, s, out = packed
                    if t == 0 and (parts == 1 or i & 1 == 0):
                        unpack(block + many * block_bytes * (i // parts), s, i // parts, k, out)
                    i, out = i + 1, out + unit
                    if i == last:
                        i, t, out = first, t + 1, out - (last - first) * unit
                        if t == tiles:
                            t, block, s, out = i8(0), block + block_step, s + scales_step, out + panel_step
                    packed = i, t, block, s, unpacked if out == full else out
                if 0 <= m + j < count:
                    i, t, x, panel = begun
                    multiply(x, panel, i, k)
                    i, panel = i + 1, panel + unit
                    if i == last:
                        i, t, x, panel = first, t + 1, x + x_step, panel - (last - first) * unit
                        if t == tiles:
                            t, x, panel = i8(0), x - tiles * x_step, panel + panel_step
                    begun = i, t, x, unpacked if unpacks and panel == full else panel
                end(ring + 1024 * (j ^ 2))
                if 4 <= m + j < count + 4:
                    i, t, x, moments, s, y, bias, partial = added
                    if i == first:
                        if onto and last == parts * groups_of(k):  # what it will be added to
                            for r in range(tokens):
                                prefetch_l1(y + r * (y_step >> 4))
                        acc = tile_load(acc, partial, 64) if first > 0 else zeros()
                    acc = add_product(acc, ring + 1024 * j, s, i, x, moments)
                    i += 1
                    if i == last:
                        if last == parts * groups_of(k):
                            finish(acc, bias, onto, y, y_step >> 4)
                        else:
                            tile_store(acc, partial, 64)
                        i, t, x, moments = first, t + 1, x + x_step, moments + x_step
                        y, partial = y + y_step, partial + 1024
                        if t == tiles:
                            t, x, moments = i8(0), x - tiles * x_step, moments - tiles * x_step
                            s, y = s + scales_step, y - tiles * y_step + 64
                            bias = bias + 64 if bias != 0 else bias
                    added = i, t, x, moments, s, y, bias, partial
                return acc, packed, begun, added

            return step

        stage_0, stage_1, stage_2, stage_3 = map(stage, range(4))
        configure = amx.configure(tokens, tile_columns)

        @inline
        def add(op, few, tiles, first, last, p0, p1, ring, unpacked, full, partial):
            """Products first .. last of so many token tiles from token `few` on and panels p0 .. p1."""
            configure(ring)
            w, acc, k = op.weight, zeros(), op.weight.k
            count, width = (p1 - p0) * tiles * (last - first), groups_of(k) * parts
            block_step, scales_step = (k // 32) * block_bytes, groups_of(k) * scale_bytes
            x, s, out = op.x.data + few * op.x.stride, w.scales + p0 * scales_step, unpacked + unit * first
            y, bias = op.y.data + few * op.y.stride + 64 * p0, w.bias + 64 * p0 if w.bias != 0 else i8(0)
            x_scales, moments = x + 16 * scales_of(i8(0), k), x + 16 * moments_of(i8(0), k)
            packed, begun = (first, i8(0), w.data + p0 * block_step, s, out), (first, i8(0), x, out)
            added = first, i8(0), x_scales, moments, s, y, bias, partial
            lengths, room = (first, last, tiles, k), (ring, unpacked, full)
            steps = 16 * op.x.stride, 16 * op.y.stride, width * unit, block_step, scales_step
            rest = count, lengths, room, steps, op.onto != 0
            for m in range(-lead, count + 4, 4):
                acc, packed, begun, added = stage_0(acc, packed, begun, added, m, *rest)
                acc, packed, begun, added = stage_1(acc, packed, begun, added, m, *rest)
                acc, packed, begun, added = stage_2(acc, packed, begun, added, m, *rest)
                acc, packed, begun, added = stage_3(acc, packed, begun, added, m, *rest)

        return add

    unpack_and_add_16, unpack_and_add_8 = pipeline(16, True), pipeline(8, True)
    add_16 = pipeline(16, False)

    @inline
    def in_one_go(op, lo, hi, rows, ring, unpacked, partial):
        """Few tokens: every product needs its weights at once, or again as the next panel's are
        being unpacked."""
        total, units = parts * groups_of(op.weight.k), 2 * LEAD
        if rows == 8:
            full = unpacked + units * unit
            unpack_and_add_8(op, 0, 1, 0, total, lo, hi, ring, unpacked, full, partial)
        else:
            if rows > 16:  # whole panels, of which one is in use
                units = (2 + LEAD // total) * total
            full = unpacked + units * unit
            unpack_and_add_16(op, 0, rows // 16, 0, total, lo, hi, ring, unpacked, full, partial)

    @inline
    def in_turn(op, lo, hi, rows, ring, unpacked, partial):
        """Some panels at a time are unpacked, to be used for all tokens; some columns at a time are
        multiplied, so that those of a few tokens stay in the first cache."""
        k = op.weight.k
        total, slices = parts * groups_of(k), max(1, k // SLICE)
        step, chunk = (groups_of(k) + slices - 1) // slices * parts, max(1, UNPACKED // panel_bytes(k))
        for p0 in range(lo, hi, chunk):
            p1 = min(p0 + chunk, hi)
            for p in range(p0, p1):
                unpack_panel(op.weight, p, unpacked + panel_bytes(k) * (p - p0))
            for few in range(0, rows, TOGETHER):
                tiles = min(TOGETHER, rows - few) // 16
                for first in range(0, total, step):
                    last = min(first + step, total)
                    add_16(op, few, tiles, first, last, p0, p1, ring, unpacked, i8(0), partial)

    @inline
    def linear_amx(call, op, tid, n, rows):
        done = amx.rows_in_tiles(rows)
        if done == 0:
            return done
        lo, hi = share(op.weight.n // 16, tid, n)
        ring = call.scratch + tid * call.scratch_stride
        unpacked, partial = ring + RING, ring + RING + unpacked_bytes(panel_bytes(op.weight.k))
        if done <= at_once:
            in_one_go(op, lo, hi, done, ring, unpacked, partial)
        else:
            in_turn(op, lo, hi, done, ring, unpacked, partial)
        amx.release()
        return done

    return linear_amx


@inline
def unpacked_bytes(panel):
    """Room for unpacked panels of so many bytes each: of two, and of what is unpacked ahead."""
    return max(UNPACKED, 2 * panel + LEAD * WIDEST)


def scratch_bytes(k: int) -> int:
    """Private memory that a thread wants for linear maps over k columns: products, unpacked panels and, where
    there are two slices or more, sums that are not finished."""
    unfinished = 64 * TOGETHER * (1 + UNPACKED // (32 * SLICE))
    return RING + max(UNPACKED, 2 * 16 * k + (2 + LEAD) * WIDEST) + unfinished
