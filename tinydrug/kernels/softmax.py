"""Partial softmaxes: what up to 8 query rows have seen of some positions, and how two such are put together.

One lies at an address as row maxima [16 f32], row sums [16 f32], outputs [ROWS][d] f32. Powers are of two:
log2(e) is in the scale of the queries.
"""

import math

import numpy as np

from tinydrug.kernels.isa import ISA
from tinydrug.kernels.jit import helper, inline
from tinydrug.kernels.maths import exp2_falling
from tinydrug.kernels.tiles import tile1, tile2, tile4, tile8, tile_fma, tile_load, tile_rows, tile_store
from tinydrug.kernels.vectors import (
    both,
    floats,
    fma,
    higher,
    highest_lane,
    lane,
    load,
    load_f32,
    load_i32,
    maximum,
    prefetch_l2,
    select,
    store,
    store_f32,
    sum_lanes,
)

f4, i4 = np.float32, np.int32
ROWS = 8  # query rows of a partial softmax
CHUNK = 256  # positions of one
NOTHING = f4(-1e30)  # the maximum of no scores; not -inf: -inf - -inf would be NaN
SCALE = f4(math.log2(math.e))
# Rows whose products with two columns' vectors fit into 32 registers, or 16.
WIDE, NARROW = (tile8, tile4) if ISA in ("amx", "avx512vnni") else (tile2, tile2)


@inline
def partial_bytes(d):
    return 128 + 4 * ROWS * d


# --- matrix products ----------------------------------------------------------------------------------------
def multiplier(load_cell, cell):
    """The product with a matrix whose numbers take `cell` bytes each; load_cell: address of 16 -> F."""

    @inline
    def one_tile(zeros, a, a_step, n, b, b_step, panel, panels, onto, out, out_step, ahead):
        """Two panels at a time: they share what is read of a."""
        for c in range(0, panels, 2):
            left, right, s, t = b + cell * panel * c, b + cell * panel * (c + 1), zeros, zeros
            if onto:
                s, t = tile_load(zeros, out + 64 * c, out_step), tile_load(zeros, out + 64 * c + 64, out_step)
            for i in range(n):
                prefetch_l2(ahead + 64 * (c // 2 * n + i))
                s = tile_fma(s, load_cell(left + cell * b_step * i), a + 4 * i, a_step)
                t = tile_fma(t, load_cell(right + cell * b_step * i), a + 4 * i, a_step)
            tile_store(s, out + 64 * c, out_step)
            tile_store(t, out + 64 * c + 64, out_step)

    @inline
    def tiles(zeros, rows, a, a_step, n, b, b_step, panel, panels, onto, out, out_step, ahead):
        for r in range(0, rows, tile_rows(zeros)):
            x, y = a + a_step * r, out + out_step * r
            one_tile(zeros, x, a_step, n, b, b_step, panel, panels, onto, y, out_step, ahead)

    @helper
    def multiply(rows, a, a_step, n, b, b_step, panel, panels, onto, out, out_step, ahead):
        """a (rows, n) f32 times b (n, panels of 16 columns) -> out (rows, 16 panels), or added to it; each
        element in the order of n. Steps of a and out are in bytes, those of b (from row to row and panel to
        panel) in numbers. Computed and written are 1, 4 or 8 rows, and an even number of panels. Meanwhile
        memory is asked for as many bytes at `ahead` as float16s of b take."""
        if rows == 1:
            one_tile(tile1(), a, a_step, n, b, b_step, panel, panels, onto, out, out_step, ahead)
        elif rows <= 4:
            tiles(NARROW(), rows, a, a_step, n, b, b_step, panel, panels, onto, out, out_step, ahead)
        else:
            tiles(WIDE(), rows, a, a_step, n, b, b_step, panel, panels, onto, out, out_step, ahead)

    return multiply


# --- softmax ------------------------------------------------------------------------------------------------
@helper
def weigh(scores, positions, rows, first, groups, window, part, ahead):
    """Scores (rows, 16 groups) of positions from `first` on -> weights 2^(score - highest), with the highest
    and the sums in `part`. What a row does not see gets no weight. Meanwhile memory is asked for as many
    bytes at `ahead` as scores take."""
    for r in range(rows):
        own, at = load_i32(positions + 4 * r), scores + 4 * CHUNK * r
        seen = 0 if first <= own - window else min(max((own + 1 - first) // 16, 0), groups)  # in full
        top = floats(NOTHING)
        for j in range(seen):
            top = higher(load(at + 64 * j), top)
        for j in range(seen, groups):
            position = lane() + i4(first + 16 * j)
            visible = both(position <= own, position > own - i4(window))
            s = select(visible, load(at + 64 * j), floats(f4(-np.inf)))
            store(at + 64 * j, s)
            top = higher(s, top)
        store_f32(part + 4 * r, highest_lane(top))
    for r in range(rows):  # in a loop of its own: no row waits for another's maximum
        at, highest, total = scores + 4 * CHUNK * r, load_f32(part + 4 * r), floats(f4(0.0))
        for j in range(groups):
            prefetch_l2(ahead + 64 * (groups * r + j))
            weight = exp2_falling(load(at + 64 * j) - highest)
            store(at + 64 * j, weight)
            total = total + weight
        store_f32(part + 64 + 4 * r, sum_lanes(total))


@inline
def clear(part, d):
    """Nothing seen."""
    store(part, floats(NOTHING))
    for j in range(64, partial_bytes(d), 64):
        store(part + j, floats(f4(0.0)))


@helper
def merge(total, part, rows, d):
    """Add what was seen next to what was seen before. `part` is spent."""
    top = maximum(load(total), load(part))
    a, b = exp2_falling(load(total) - top), exp2_falling(load(part) - top)
    store(total, top)
    store(total + 64, fma(load(part + 64), b, load(total + 64) * a))
    store(part, a)
    store(part + 64, b)
    for r in range(rows):
        a, b = floats(load_f32(part + 4 * r)), floats(load_f32(part + 64 + 4 * r))
        for j in range(128 + 4 * r * d, 128 + 4 * (r + 1) * d, 64):
            store(total + j, fma(load(part + j), b, load(total + j) * a))


@inline
def softmax_output(part, r, d, out):
    """Output of row r, divided by its sum of weights -> d floats at out."""
    inverse = f4(1.0) / load_f32(part + 64 + 4 * r)
    for j in range(0, 4 * d, 64):
        store(out + j, load(part + 128 + 4 * r * d + j) * inverse)
