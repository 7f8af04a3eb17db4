"""Noise in vectors: the operations that turn a vector towards a random direction, in memory or as it is read.

A vector x turns by an angle phi towards r (DRµGS):  x' = x cos phi + |x| o/|o| sin phi,  where o is the
part of r that is orthogonal to x. That is x' = a x + b r with a and b from x.x, r.x and r.r alone, so r
never has to be kept where x' is only multiplied with something. Other forms change a and b, laws (laws.py)
change r, generator.py says what a draw depends on.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import types

from tinydrug.kernels.embed import copy_row
from tinydrug.kernels.generator import draw_key, streams, word
from tinydrug.kernels.jit import Kernel, helper, inline, kernel
from tinydrug.kernels.laws import LAWS as DIRECTIONS
from tinydrug.kernels.laws import normal_pair
from tinydrug.kernels.maths import sin_cos_half
from tinydrug.kernels.rope import my_groups
from tinydrug.kernels.structs import Struct
from tinydrug.kernels.tables import DOSE, OP, my_rows, operation, row, rows_of
from tinydrug.kernels.vectors import (
    absolute,
    add_f64,
    atomic_add,
    both,
    call_at,
    floats,
    fma,
    ints,
    lane,
    load,
    load_f32,
    load_halves,
    load_i32,
    load_ints,
    round_even,
    select,
    shift_right,
    sqrt,
    store,
    store_f32,
    store_ints,
    sum_lanes,
    tile1,
    tile4,
    tile8,
    tile_axby,
    tile_fma,
    tile_store,
    to_floats,
)

f4, i4, i8 = np.float32, np.int32, np.int64
ADDED, NLERP = 1, 2  # codes of forms (0: rotation),
NORMAL = 1  # of angles (0: uniform), as in noise/laws.py,
HELD, WANDER = 1, 2  # of renewals (0: fresh),
COSINE, LINEAR = 1, 2  # and of ramps (0: constant), as in noise/time.py
SUBNORMAL = f4(1e-6)  # below this share of |r|^2 the orthogonal part is rounding, not a direction

DRAWN = Struct(  # a dose as it stands for one vector, or for the vectors that one query reads
    "Drawn",
    theta="f8",  # after the ramp
    form="i8",
    angle="i8",
    key="i8",  # of the direction,
    next_key="i8",  # and of the one it wanders to
    weight="f8",
    next_weight="f8",
    share="f8",  # of the way it has gone
    still="i8",  # 1: the vector's own position is no coordinate of the draw
    awake="i8",  # address: how many unprotected positions lie before each
    measured="i8",  # address of this thread's three sums for the site, or 0
    scratch="i8",
)
drawn_at = DRAWN.pointer()
DRAWN_BYTES = DRAWN.dtype.itemsize

ROTATE = types.void(DRAWN, *[types.int64] * 6)  # drawn, x, components, period, valid, position, scratch
SCORES = types.void(OP, DRAWN, *[types.int64] * 5)  # op, drawn, keys, q, rows, position, out
VALUES = types.void(OP, DRAWN, *[types.int64] * 4)  # op, drawn, values, position, out, scratch
SHOW = types.void(DRAWN, *[types.int64] * 3)  # drawn, position, components, out
PREPARE = types.void(DRAWN, DOSE, *[types.int64] * 6)  # drawn, dose, seed, site, head, step, age, cached
call_rotate, call_scores, call_values = call_at(ROTATE), call_at(SCORES), call_at(VALUES)


# --- when: what a draw is keyed by, and how much of the dose is left ---------------------------------------
@inline
def ramp(dose, age):
    """The share of theta that is left for the age-th generated token."""
    if dose.ramp == LINEAR:
        return max(0.0, 1.0 - age / dose.over)
    if dose.ramp == COSINE:
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, age / dose.over))
    return 1.0


@inline
def prepare(drawn, dose, seed, site, head, step, age, cached):
    """Fill in what the kernels of a law read. step: position of the token that reads; age: tokens since the
    prompt ended; cached: the vectors lie in the cache, and keep their own positions while a draw is held."""
    drawn.theta = dose.theta * ramp(dose, max(age, i8(0)))
    drawn.form, drawn.angle = dose.form, dose.angle
    drawn.weight, drawn.next_weight, drawn.share = 1.0, 0.0, 0.0
    drawn.still = i8(dose.renewal != 0 and not cached)
    if dose.renewal == WANDER:
        anchor = i8(step // dose.tokens)
        share = step / dose.tokens - anchor
        drawn.share, drawn.weight = share, math.cos(0.5 * math.pi * share)
        drawn.next_weight = math.sin(0.5 * math.pi * share)
        drawn.next_key = draw_key(seed, dose.layer, site, head, anchor + 1)
        step = anchor
    elif dose.renewal == HELD:
        step = i8(-1)
    drawn.key = draw_key(seed, dose.layer, site, head, step)


@kernel(PREPARE)
def prepare_draw(drawn, dose, seed, site, head, step, age, cached):
    prepare(drawn, dose, seed, site, head, step, age, cached != 0)


# --- from sums to the turn ---------------------------------------------------------------------------------
@inline
def one_angle(first, second, drawn):
    """phi of each lane in radians: U[0, theta), or |N(0, theta)|."""
    w = word(first, second, ints(i4(-1)))
    if drawn.angle == NORMAL:
        z, _ = normal_pair(w)
        return absolute(z) * f4(drawn.theta)
    return to_floats(shift_right(w, i4(8))) * f4(drawn.theta * 2.0**-24)


@inline
def coefficients(phi, xx, rx, rr, drawn):
    """Lanes of phi, x.x, r.x, r.r -> a, b of x' = a x + b r. x stays if it has no length, or r no
    direction."""
    zero, one = floats(f4(0.0)), floats(f4(1.0))
    if drawn.form == ADDED:  # x + phi |x| r/|r|
        turnable = both(rr > f4(0.0), xx > f4(0.0))
        return one, select(turnable, phi * sqrt(xx / rr), zero)
    along = rx / xx  # 0/0 where x = 0: not selected below
    orthogonal = rr - rx * along
    turnable = both(orthogonal > rr * SUBNORMAL, xx > f4(0.0))
    if drawn.form == NLERP:  # |x| (x/|x| + phi o/|o|) normalised: an angle of arctan(phi)
        cos = one / sqrt(fma(phi, phi, one))
        sin = phi * cos
    else:
        turns = phi * f4(0.5 / np.pi)
        turns = turns - round_even(turns)  # whole turns change nothing, and the polynomials stay in range
        sin, cos = sin_cos_half(turns * f4(np.pi))
    b = sin * sqrt(xx / orthogonal)
    return select(turnable, cos - b * along, one), select(turnable, b, zero)


@helper
def measure(drawn, lanes, a, b, xx, rx, rr):
    """Add the first lanes to the sums of this thread: vectors, angles of x to x', logs of |x'| / |x|."""
    at = drawn.scratch
    store(at, a)
    store(at + 64, b)
    store(at + 128, xx)
    store(at + 192, rx)
    store(at + 256, rr)
    for j in range(0, 4 * lanes, 4):
        a1, b1 = np.float64(load_f32(at + j)), np.float64(load_f32(at + 64 + j))
        x2, r1 = np.float64(load_f32(at + 128 + j)), np.float64(load_f32(at + 192 + j))
        r2 = np.float64(load_f32(at + 256 + j))
        if b1 != 0.0 and x2 > 0.0:
            along = a1 * math.sqrt(x2) + b1 * r1 / math.sqrt(x2)
            across = abs(b1) * math.sqrt(max(0.0, r2 - r1 * r1 / x2))
            add_f64(drawn.measured, 1.0)
            add_f64(drawn.measured + 8, math.atan2(across, along))
            add_f64(drawn.measured + 16, 0.5 * math.log((along * along + across * across) / x2))


@inline
def unprotected(drawn, position):
    """Lanes of 16 positions: whether noise may touch them."""
    before = drawn.awake + 4 * position
    return load_ints(before + 4) - load_ints(before) > i4(0)


@inline
def existing(r, i, period, valid):
    """r with zeros where component i + lane is padding: those beyond `valid` of every `period`."""
    return select(lane() + i4(i % period) < i4(valid), r, floats(f4(0.0)))


class Law(NamedTuple):
    """The kernels of a direction law: `scores` and `values` by the cache's element type."""

    rotate: Kernel
    scores: dict[str, Kernel]
    values: dict[str, Kernel]
    show: Kernel


def make_law(name, by_component, by_position, wandering=False, cached=True) -> Law:
    """The kernels of a law from its two views of a draw; wandering: between two draws, at a cost."""
    if wandering:
        name = f"{name}_wander"

    # `third` and `fourth` are the words of the next draw; a law that does not wander never looks at them.
    @inline
    def next_streams(positions, drawn, first, second):
        if wandering:
            return streams(positions, drawn.next_key)
        return first, second

    @inline
    def mixed(r, s, drawn):
        if wandering:
            return r * f4(drawn.weight) + s * f4(drawn.next_weight)
        return r

    @inline
    def components(drawn, first, second, third, fourth, block):
        r0, r1 = by_component(first, second, block)
        if wandering:
            s0, s1 = by_component(third, fourth, block)
            return mixed(r0, s0, drawn), mixed(r1, s1, drawn)
        return r0, r1

    @inline
    def by_lane(drawn, first, second, third, fourth, block, j):
        r0, r1 = by_position(first, second, block, j)
        if wandering:
            s0, s1 = by_position(third, fourth, block, j)
            return mixed(r0, s0, drawn), mixed(r1, s1, drawn)
        return r0, r1

    @inline
    def angle(drawn, first, second, third, fourth):
        phi = one_angle(first, second, drawn)
        if wandering:
            return phi * f4(1.0 - drawn.share) + one_angle(third, fourth, drawn) * f4(drawn.share)
        return phi

    @kernel(ROTATE, f"rotate_{name}", cached)
    def rotate(drawn, x, components_, period, valid, position, scratch):
        """Turn one vector in memory."""
        at = ints(i4(0 if drawn.still else position))
        first, second = streams(at, drawn.key)
        third, fourth = next_streams(at, drawn, first, second)
        zero = floats(f4(0.0))
        xx, rx, rr = zero, zero, zero
        for i in range(0, components_, 32):
            r0, r1 = components(drawn, first, second, third, fourth, i // 32)
            r0, r1 = existing(r0, i, period, valid), existing(r1, i + 16, period, valid)
            x0, x1 = load(x + 4 * i), load(x + 4 * i + 64)
            store(scratch + 4 * i, r0)
            store(scratch + 4 * i + 64, r1)
            xx, rx = fma(x1, x1, fma(x0, x0, xx)), fma(r1, x1, fma(r0, x0, rx))
            rr = fma(r1, r1, fma(r0, r0, rr))
        xx, rx, rr = floats(sum_lanes(xx)), floats(sum_lanes(rx)), floats(sum_lanes(rr))
        a, b = coefficients(angle(drawn, first, second, third, fourth), xx, rx, rr, drawn)
        for j in range(0, 4 * components_, 64):
            store(x + j, fma(load(scratch + j), b, a * load(x + j)))
        if drawn.measured != 0:
            measure(drawn, i8(1), a, b, xx, rx, rr)

    def scores_of(cell_name, load_cell, cell):
        @inline
        def tile(zeros, op, drawn, keys, q, position, out):
            positions = lane() + i4(position)
            first, second = streams(positions, drawn.key)
            third, fourth = next_streams(positions, drawn, first, second)
            zero = floats(f4(0.0))
            qx, qr, xx, rx, rr, d = zeros, zeros, zero, zero, zero, op.head_dim
            for i in range(d):  # as sober attention does, in its order: a protected key keeps its bits
                qx = tile_fma(qx, load_cell(keys + 16 * cell * i), q + 4 * i, 4 * d)
            for block in range(d // 32):
                for j in range(16):
                    i = 32 * block + j
                    r0, r1 = by_lane(drawn, first, second, third, fourth, block, j)
                    if i % op.period >= op.valid:
                        r0 = zero
                    if (i + 16) % op.period >= op.valid:
                        r1 = zero
                    x0, x1 = load_cell(keys + 16 * cell * i), load_cell(keys + 16 * cell * (i + 16))
                    qr = tile_fma(tile_fma(qr, r0, q + 4 * i, 4 * d), r1, q + 4 * i + 64, 4 * d)
                    xx, rx = fma(x1, x1, fma(x0, x0, xx)), fma(r1, x1, fma(r0, x0, rx))
                    rr = fma(r1, r1, fma(r0, r0, rr))
            a, b = coefficients(angle(drawn, first, second, third, fourth), xx, rx, rr, drawn)
            awake = unprotected(drawn, position)
            a, b = select(awake, a, floats(f4(1.0))), select(awake, b, zero)
            tile_store(tile_axby(a, qx, b, qr), out, 256)
            if drawn.measured != 0:
                measure(drawn, i8(16), a, b, xx, rx, rr)

        @kernel(SCORES, f"scores_{name}_{cell_name}", cached)
        def scores(op, drawn, keys, q, rows, position, out):
            """Multiply queries with 16 cached keys under noise; the noisy keys are never stored."""
            if rows == 1:
                tile(tile1(), op, drawn, keys, q, position, out)
            elif rows <= 4:
                tile(tile4(), op, drawn, keys, q, position, out)
            else:
                tile(tile8(), op, drawn, keys, q, position, out)

        return scores

    def values_of(cell_name, load_cell, cell):
        @kernel(VALUES, f"values_{name}_{cell_name}", cached)
        def values(op, drawn, source, position, out, scratch):
            """Make 16 cached values noisy: (16, d) of the cache -> (16, d) floats at out."""
            d, positions = op.head_dim, lane() + i4(position)
            first, second = streams(positions, drawn.key)
            third, fourth = next_streams(positions, drawn, first, second)
            zero = floats(f4(0.0))
            words, sums, ab = scratch, scratch + 256, scratch + 448  # [4][16], [3][16] and [2][16]
            store_ints(words, first)
            store_ints(words + 64, second)
            store_ints(words + 128, third)
            store_ints(words + 192, fourth)
            for p in range(16):
                one, two = ints(load_i32(words + 4 * p)), ints(load_i32(words + 64 + 4 * p))
                three, four = ints(load_i32(words + 128 + 4 * p)), ints(load_i32(words + 192 + 4 * p))
                x, r = source + cell * d * p, out + 4 * d * p
                xx, rx, rr = zero, zero, zero
                for i in range(0, d, 32):
                    r0, r1 = components(drawn, one, two, three, four, i // 32)
                    r0, r1 = existing(r0, i, op.period, op.valid), existing(r1, i + 16, op.period, op.valid)
                    store(r + 4 * i, r0)
                    store(r + 4 * i + 64, r1)
                    x0, x1 = load_cell(x + cell * i), load_cell(x + cell * (i + 16))
                    xx, rx = fma(x1, x1, fma(x0, x0, xx)), fma(r1, x1, fma(r0, x0, rx))
                    rr = fma(r1, r1, fma(r0, r0, rr))
                store_f32(sums + 4 * p, sum_lanes(xx))
                store_f32(sums + 64 + 4 * p, sum_lanes(rx))
                store_f32(sums + 128 + 4 * p, sum_lanes(rr))
            xx, rx, rr = load(sums), load(sums + 64), load(sums + 128)
            a, b = coefficients(angle(drawn, first, second, third, fourth), xx, rx, rr, drawn)
            awake = unprotected(drawn, position)
            a, b = select(awake, a, floats(f4(1.0))), select(awake, b, zero)
            store(ab, a)
            store(ab + 64, b)
            for p in range(16):
                a1, b1 = floats(load_f32(ab + 4 * p)), floats(load_f32(ab + 64 + 4 * p))
                x, r = source + cell * d * p, out + 4 * d * p
                for i in range(0, d, 16):
                    store(r + 4 * i, fma(load(r + 4 * i), b1, a1 * load_cell(x + cell * i)))
            if drawn.measured != 0:
                measure(drawn, i8(16), a, b, xx, rx, rr)

        return values

    @kernel(SHOW, f"show_{name}", cached)
    def show(drawn, position, components_, out):
        """A draw, for tests and records: r (components) at out, then phi in radians in 16 lanes."""
        at = ints(i4(0 if drawn.still else position))
        first, second = streams(at, drawn.key)
        third, fourth = next_streams(at, drawn, first, second)
        for i in range(0, components_, 32):
            r0, r1 = components(drawn, first, second, third, fourth, i // 32)
            store(out + 4 * i, r0)
            store(out + 4 * i + 64, r1)
        store(out + 4 * components_, angle(drawn, first, second, third, fourth))

    cells = {"f16": (load_halves, 2), "f32": (load, 4)}
    return Law(
        rotate,
        {cell: scores_of(cell, *how) for cell, how in cells.items()},
        {cell: values_of(cell, *how) for cell, how in cells.items()},
        show,
    )


# --- the operations of the forward pass --------------------------------------------------------------------
@inline
def is_protected(span, position):
    """Whether noise must leave the token at this position alone."""
    return load_i32(span.awake + 4 * position + 4) == load_i32(span.awake + 4 * position)


@inline
def rotate_heads(call, op, token, x, first, last, counted, tid):
    """Turn heads first .. last of the row at x, if this token's schedule says so."""
    span, position = call.spans[call.tokens[token].span], call.tokens[token].position
    dose = span.doses[op.layer * call.sites + op.site]
    if dose.theta <= 0.0 or is_protected(span, position):
        return
    scratch = call.scratch + tid * call.scratch_stride
    drawn = drawn_at(scratch)
    drawn.measured, drawn.scratch = i8(0), scratch + DRAWN_BYTES
    if counted and span.measured != 0:
        drawn.measured = span.measured + 24 * (tid * call.sites + op.site)
    for h in range(first, last):
        prepare(drawn, dose, span.seed, op.site, h, position, position - span.born, False)
        at = x + 4 * op.head_dim * h
        call_rotate(dose.rotate, drawn, at, op.head_dim, op.period, op.valid, position, scratch + 1024)
    if counted:
        atomic_add(span.moved + 8 * op.site, last - first)


@operation
def noise_rows(call, op, tid, n):
    """x (T, H, d) -> y (T, H, d), noise in every head of a row (H = 1: in the whole row)."""
    first, step, me = my_rows(call, op, tid, n)
    for i in range(first, rows_of(call, op), step):
        x, y = row(op.x, i, me), row(op.y, i, me)
        if x != y:
            copy_row(x, y, 4 * op.head_dim * op.heads)
        rotate_heads(call, op, i, y, i8(0), op.heads, me <= 0, tid)


@operation
def noise_heads(call, op, tid, n):
    """x (T, H, d) in place, as noise_rows, but split by kv head: between the projections and attention."""
    group = op.heads // op.kv_heads
    first, last, step = my_groups(call, op, tid, n)
    for u in range(first, last, step):
        token, g = u // op.kv_heads, u % op.kv_heads
        x = op.x.data + token * op.x.stride
        rotate_heads(call, op, token, x, g * group, (g + 1) * group, True, tid)


LAWS = {
    name: (make_law(name, *views), make_law(name, *views, wandering=True))
    for name, views in DIRECTIONS.items()
}
