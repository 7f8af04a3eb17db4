"""Linear maps: y (T, N) = x (T, K) @ weight (N, K)^T, one kernel a weight format.

Weights lie in panels of 16 output rows; a lane is an output row, so there is no horizontal sum:

    f32, f16, bf16   [panel][k][16]
    quantised        [panel][k/32] blocks (planes.py), and the scales of their groups (blocks.py)

An output element is one sum over k in one order whatever the tile that holds it, so its bits depend
neither on how many tokens came with it nor on the threads: products of integers are exact, and what is
rounded is rounded alike. Tiles reach up to 15 rows past T: buffers have room for them. Five tokens or
more go to tile registers where there are any (linear_tiles.py).
"""

import numpy as np

from tinydrug.kernels import amx
from tinydrug.kernels.blocks import BLOCKS, widths
from tinydrug.kernels.epilogue import finish
from tinydrug.kernels.jit import inline, kernel
from tinydrug.kernels.linear_tiles import AHEAD, in_tiles
from tinydrug.kernels.quantise import half_sums_of, moments_of, scales_of, sums_of
from tinydrug.kernels.tables import OPERATION, reader, row, rows_of, share
from tinydrug.kernels.tiles import (
    tile1,
    tile4,
    tile8,
    tile_add,
    tile_add_ints,
    tile_dot4,
    tile_fma,
    tile_fma_panels_bf16,
    tile_fma_panels_f16,
    tile_fma_panels_f32,
    tile_ints,
    tile_load,
    tile_rows,
    tile_scale_add,
    tile_splat_ints,
    tile_store,
)
from tinydrug.kernels.vectors import load, load_bfloats, load_f32, load_halves, prefetch_l1, prefetch_l2

i4, i8 = np.int32, np.int64
# Bytes to ask for ahead in each of four panels of a float format, for one token; found by trial as AHEAD is.
AHEAD_OF_EACH = 2048
FLOAT_ROWS = 64  # rows of x that stay in the second cache while all panels of a float format pass


# --- a quantised format -------------------------------------------------------------------------------------
def _block_linear(name, blocks):
    """The kernel of a quantised format; activations come as int8."""
    low, high, scale, minimum = blocks.planes.low, blocks.planes.high, blocks.scale, blocks.minimum
    keys, group, many = blocks.keys, blocks.group, blocks.group // 32
    second, offset, shift = blocks.second_scale, blocks.offset, max(blocks.offset, 1).bit_length() - 1
    block_bytes, scale_bytes = blocks.planes.nbytes, blocks.scale_bytes
    groups_of, blocks_of = widths(group)
    groups_ahead = -(-AHEAD // (many * block_bytes))
    # Found by trial: the second level can wait for more lines than the first, but a load finds them later.
    prefetch = prefetch_l1 if block_bytes < 512 else prefetch_l2
    # Bytes of whole lines up to each quarter: 5 lines are asked for as 2, 1, 1 and 1.
    quarters = tuple((block_bytes // 64 * quarter + 3) // 4 * 64 for quarter in range(5))
    linear_amx = in_tiles(blocks)

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
    def ask(ahead, w, quarter):
        """For a quarter of a block to come, between dot products: many lines at once hold up loads."""
        if ahead:
            for j in range(quarters[quarter], quarters[quarter + 1], 64):
                prefetch(w + AHEAD + j)

    # The ways a group adds to floats: by one scale; with a minimum; by a scale for each half of a block.
    # w and columns are the group's, s the panel's, x the row's.
    if second is not None:

        @inline
        def add_group(acc, w, s, g, columns, x, k, stride, ahead):
            key, key_8, key_16, key_24 = keys(s, g, 0)
            scales, sums = scales_of(x, k) + 4 * g, half_sums_of(x, k) + 8 * g
            ask(ahead, w, 0)
            dots = dots_low(start(acc, sums, stride), w, 0, key, columns, stride)
            ask(ahead, w, 1)
            dots = dots_low(dots, w, 2, key_8, columns, stride)
            acc = tile_scale_add(acc, dots, scale(s, g), scales, stride)
            ask(ahead, w, 2)
            dots = dots_high(start(acc, sums + 4, stride), w, 0, key_16, columns, stride)
            ask(ahead, w, 3)
            dots = dots_high(dots, w, 2, key_24, columns, stride)
            return tile_scale_add(acc, dots, second(s, g), scales, stride)

    else:

        @inline
        def add_group(acc, w, s, g, columns, x, k, stride, ahead):
            # Sums of their own hide each other's latency; eight tokens have no registers for more than two.
            few = tile_rows(acc) <= 4
            dots, others = start(acc, sums_of(x, k) + 4 * g, stride), tile_ints(acc)
            dots_8, others_8 = tile_ints(acc), tile_ints(acc)
            for b in range(blocks_of(g, k)):
                key, key_8, key_16, key_24 = keys(s, g, b)
                ask(ahead, w, 0)
                dots = dots_low(dots, w, 0, key, columns, stride)
                ask(ahead, w, 1)
                others = dots_high(others, w, 0, key_16, columns, stride)
                ask(ahead, w, 2)
                if few:
                    dots_8 = dots_low(dots_8, w, 2, key_8, columns, stride)
                else:
                    dots = dots_low(dots, w, 2, key_8, columns, stride)
                ask(ahead, w, 3)
                if few:
                    others_8 = dots_high(others_8, w, 2, key_24, columns, stride)
                else:
                    others = dots_high(others, w, 2, key_24, columns, stride)
                w, columns = w + block_bytes, columns + 32
            dots = tile_add_ints(tile_add_ints(dots, others), tile_add_ints(dots_8, others_8))
            acc = tile_scale_add(acc, dots, scale(s, g), scales_of(x, k) + 4 * g, stride)
            if minimum is not None:
                acc = tile_fma(acc, minimum(s, g), moments_of(x, k) + 4 * g, stride)
            return acc

    @inline
    def add_group_of(acc, op, p, g, x, ahead):
        """Group g of panel p."""
        w, groups = op.weight, groups_of(op.weight.k)
        data = w.data + p * (w.k // 32) * block_bytes + many * block_bytes * g
        s = w.scales + p * groups * scale_bytes
        if ahead:
            for j in range(0, scale_bytes, 64):
                prefetch(s + scale_bytes * (g + groups_ahead) + j)
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

    @kernel(OPERATION, f"linear_{name}", big=True)
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
                elif amx.AVAILABLE or rows - t <= 4:  # with tiles, no more than four are left
                    tile(tile4(), op, p, x, y, t == first)
                    t += 4
                else:
                    tile(tile8(), op, p, x, y, t == first)
                    t += 8

    return linear


def _float_linear(name, load_weights, tile_fma_panels, element):
    """The kernel of a float format, element bytes a weight."""
    column = 16 * element  # bytes of a panel
    line = 64 // column  # columns in a cache line

    @inline
    def panels(acc, w, step, x, k):
        """One token's products with a tile of panels: one alone would be one chain of sums, each waiting."""
        for i in range(0, k, line):
            for r in range(tile_rows(acc)):
                prefetch_l1(w + step * r + column * i + AHEAD_OF_EACH)
            for j in range(i, i + line):
                acc = tile_fma_panels(acc, w + column * j, step, load_f32(x + 4 * j))
        return acc

    @inline
    def two_panels(zeros, w, p, q, x, x_stride, y, y_stride, onto, ahead):
        """A tile of tokens and two panels (or one, twice), which share what is read of x."""
        left, right = w.data + p * w.k * column, w.data + q * w.k * column
        one, other = zeros, zeros
        for i in range(0, w.k, line):
            if ahead:
                prefetch_l2(left + column * i + AHEAD)
                prefetch_l2(right + column * i + AHEAD)
            for j in range(i, i + line):
                one = tile_fma(one, load_weights(left + column * j), x + 4 * j, x_stride)
                other = tile_fma(other, load_weights(right + column * j), x + 4 * j, x_stride)
        end(one, w, p, y, y_stride, onto)
        if q != p:
            end(other, w, q, y, y_stride, onto)

    @inline
    def end(acc, w, p, y, y_stride, onto):
        finish(acc, w.bias + 64 * p if w.bias != 0 else i8(0), onto, y + 64 * p, y_stride)

    @inline
    def one_token(zeros, w, p, x, y, onto):
        step = w.k * column
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
        lo, hi = share(w.n // 16, tid, n)
        xs, ys, onto = op.x.stride, op.y.stride, op.onto != 0
        if rows == 1:
            p, x, y = lo, row(op.x, 0, me), op.y.data
            while p < hi:
                if hi - p >= 4:
                    p = one_token(tile4(), w, p, x, y, onto)
                else:
                    p = one_token(tile1(), w, p, x, y, onto)
            return
        for first in range(0, rows, FLOAT_ROWS):
            last = min(first + FLOAT_ROWS, rows)
            for p in range(lo, hi, 2):
                q = min(p + 1, hi - 1)
                for t in range(first, last, 8):
                    x, y = op.x.data + t * xs, op.y.data + t * ys
                    if rows - t <= 4:
                        two_panels(tile4(), w, p, q, x, xs, y, ys, onto, t == first)
                    else:
                        two_panels(tile8(), w, p, q, x, xs, y, ys, onto, t == first)

    return linear


LINEAR = {
    "f32": _float_linear("f32", load, tile_fma_panels_f32, 4),
    "f16": _float_linear("f16", load_halves, tile_fma_panels_f16, 2),
    "bf16": _float_linear("bf16", load_bfloats, tile_fma_panels_bf16, 2),
} | {name: _block_linear(name, blocks) for name, blocks in BLOCKS.items()}
