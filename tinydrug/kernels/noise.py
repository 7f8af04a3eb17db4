"""Noise in vectors: the operations that turn a vector towards a random direction, in memory or as it is read.

A vector x turns by an angle phi towards r (DRµGS):  x' = x cos phi + |x| o/|o| sin phi,  where o is the
part of r that is orthogonal to x. That is x' = a x + b r with a and b from x.x, r.x and r.r alone, so r
never has to be kept where x' is only multiplied with something. Other forms change a and b, laws (laws.py)
change r, generator.py says what a draw depends on.
"""

import math
from typing import NamedTuple

import numpy as np

from tinydrug.kernels.atomics import atomic_add, call_at
from tinydrug.kernels.embed import copy_row
from tinydrug.kernels.generator import draw_key, streams, word
from tinydrug.kernels.jit import Kernel, helper, inline, kernel
from tinydrug.kernels.kinds import int64, void
from tinydrug.kernels.laws import LAWS as DIRECTIONS
from tinydrug.kernels.laws import Law as Directions
from tinydrug.kernels.laws import half_square, normal_pair
from tinydrug.kernels.maths import sin_cos_half
from tinydrug.kernels.rope import my_groups
from tinydrug.kernels.structs import Struct
from tinydrug.kernels.tables import DOSE, OP, my_rows, operation, row
from tinydrug.kernels.vectors import (
    absolute,
    add_f64,
    both,
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
    store_ints,
    sum_each,
    sum_lanes,
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
    lowest="i8",  # positions of the cached vectors that are seen
    highest="i8",
    measured="i8",  # address of this thread's three sums for the site, or 0
)
drawn_at = DRAWN.pointer()
DRAWN_BYTES = DRAWN.dtype.itemsize

ROTATE = void(DRAWN, *[int64] * 6)  # drawn, x, components, period, valid, position, scratch
TURNED = 64  # cached vectors that are turned in one call, at most
ROW = 4 * TURNED  # bytes of one number each. In scratch there are, of each vector:
WORDS, SUMS, DRAWS = 0, 4 * ROW, 9 * ROW  # four words; x.x, r.x, r.r, a and b; what a law draws ahead
A, B = SUMS + 3 * ROW, SUMS + 4 * ROW
# op, drawn, keys or values, position of the first (a multiple of 16), count, out, scratch
TURN = void(OP, DRAWN, *[int64] * 5)
SHOW = void(DRAWN, *[int64] * 3)  # drawn, position, components, out
PREPARE = void(DRAWN, DOSE, *[int64] * 6)  # drawn, dose, seed, site, head, step, age, cached
call_rotate, call_turn = call_at(ROTATE), call_at(TURN)


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
        z, _ = normal_pair(w, half_square(w))
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
    across = fma(rr, xx, zero - rx * rx)  # x.x o.o
    turnable = both(across > rr * xx * SUBNORMAL, xx > f4(0.0))
    if drawn.form == NLERP:  # |x| (x/|x| + phi o/|o|) normalised: an angle of arctan(phi)
        cos = one / sqrt(fma(phi, phi, one))
        sin = phi * cos
    else:
        turns = phi * f4(0.5 / np.pi)
        turns = turns - round_even(turns)  # whole turns change nothing, and the polynomials stay in range
        sin, cos = sin_cos_half(turns * f4(np.pi))
    share = sin / sqrt(across)  # not finite where it is not selected
    return select(turnable, cos - share * rx, one), select(turnable, share * xx, zero)


@helper
def measure(drawn, sums, row, first, last):
    """Add vectors first .. last to the sums of this thread: how many, angles of x to x', logs of |x'| / |x|.
    sums: x.x, r.x, r.r, a and b of each, `row` bytes from one to the next."""
    for at in range(sums + 4 * first, sums + 4 * last, 4):
        x2, r1 = np.float64(load_f32(at)), np.float64(load_f32(at + row))
        r2, a = np.float64(load_f32(at + 2 * row)), np.float64(load_f32(at + 3 * row))
        b = np.float64(load_f32(at + 4 * row))
        if b != 0.0 and x2 > 0.0:
            along = a * math.sqrt(x2) + b * r1 / math.sqrt(x2)
            across = abs(b) * math.sqrt(max(0.0, r2 - r1 * r1 / x2))
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
    """The kernels of a direction law: `keys` and `values` by the cache's element type."""

    rotate: Kernel
    keys: dict[str, Kernel]
    values: dict[str, Kernel]
    show: Kernel


def turn_bytes(d: int) -> int:
    """Scratch of `keys` and `values` for heads of this (padded) width."""
    return DRAWS + 8 * TURNED * d + 3 * 1024


def make_law(name, law: Directions, wandering=False, cached=True) -> Law:
    """The kernels of a direction law; wandering: between two draws, at a cost."""
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
        return r * f4(drawn.weight) + s * f4(drawn.next_weight)

    @inline
    def components(drawn, first, second, third, fourth, block):
        r0, r1 = law.components(first, second, block)
        if wandering:
            s0, s1 = law.components(third, fourth, block)
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
        """Turn one vector in memory. At scratch: x.x, r.x, r.r, a and b, 16 lanes each, then r."""
        direction = scratch + 5 * 64
        at = ints(i4(0 if drawn.still else position))
        first, second = streams(at, drawn.key)
        third, fourth = next_streams(at, drawn, first, second)
        zero = floats(f4(0.0))
        xx, rx, rr = zero, zero, zero
        for i in range(0, components_, 32):
            r0, r1 = components(drawn, first, second, third, fourth, i // 32)
            if valid < period:
                r0, r1 = existing(r0, i, period, valid), existing(r1, i + 16, period, valid)
            x0, x1 = load(x + 4 * i), load(x + 4 * i + 64)
            store(direction + 4 * i, r0)
            store(direction + 4 * i + 64, r1)
            xx, rx = fma(x1, x1, fma(x0, x0, xx)), fma(r1, x1, fma(r0, x0, rx))
            rr = fma(r1, r1, fma(r0, r0, rr))
        xx, rx, rr = floats(sum_lanes(xx)), floats(sum_lanes(rx)), floats(sum_lanes(rr))
        a, b = coefficients(angle(drawn, first, second, third, fourth), xx, rx, rr, drawn)
        for j in range(0, 4 * components_, 64):
            store(x + j, fma(load(direction + j), b, a * load(x + j)))
        if drawn.measured != 0:
            store(scratch, xx)
            store(scratch + 64, rx)
            store(scratch + 128, rr)
            store(scratch + 192, a)
            store(scratch + 256, b)
            measure(drawn, scratch, 64, 0, 1)

    @inline
    def draw_words(drawn, position, groups, scratch):
        """The words of 16 positions a group."""
        for at in range(scratch, scratch + 64 * groups, 64):
            positions = lane() + i4(position + (at - scratch) // 4)
            first, second = streams(positions, drawn.key)
            third, fourth = next_streams(positions, drawn, first, second)
            store_ints(at + WORDS, first)
            store_ints(at + WORDS + ROW, second)
            store_ints(at + WORDS + 2 * ROW, third)
            store_ints(at + WORDS + 3 * ROW, fourth)

    @inline
    def factors(drawn, position, groups, scratch):
        """From x.x, r.x and r.r to a and b: 1 and 0 for who is protected."""
        for at in range(scratch, scratch + 64 * groups, 64):
            first, second = load_ints(at + WORDS), load_ints(at + WORDS + ROW)
            third, fourth = load_ints(at + WORDS + 2 * ROW), load_ints(at + WORDS + 3 * ROW)
            xx, rx, rr = load(at + SUMS), load(at + SUMS + ROW), load(at + SUMS + 2 * ROW)
            a, b = coefficients(angle(drawn, first, second, third, fourth), xx, rx, rr, drawn)
            awake = unprotected(drawn, position + (at - scratch) // 4)
            store(at + A, select(awake, a, floats(f4(1.0))))
            store(at + B, select(awake, b, floats(f4(0.0))))
        if drawn.measured != 0:
            first = max(0, drawn.lowest - position)
            measure(drawn, scratch + SUMS, ROW, first, min(16 * groups, drawn.highest + 1 - position))

    def in_memory(draw, view):
        """A law's draw into memory, and its view of that; wandering: of both draws, one behind the other."""

        @inline
        def draw_both(words, d, at):
            draw(words, words + ROW, d, at)
            if wandering:
                draw(words + 2 * ROW, words + 3 * ROW, d, at + 64 * d)

        @inline
        def pair(drawn, words, d, at, block, i):
            r0, r1 = view(words, words + ROW, d, at, block, i)
            if wandering:
                s0, s1 = view(words + 2 * ROW, words + 3 * ROW, d, at + 64 * d, block, i)
                return mixed(r0, s0, drawn), mixed(r1, s1, drawn)
            return r0, r1

        return draw_both, pair

    draw_keys, by_lane = in_memory(law.draw_keys, law.keys)
    draw_values, by_row = in_memory(law.draw_values, law.values)

    unit = law.unit and not wandering  # then r.r is the number of components

    @inline
    def square_of(op, rr):
        """r.r, given its sums; of signs it is known."""
        return floats(f4(op.head_dim // op.period * op.valid)) if unit else rr

    def keys_of(cell_name, load_cell, cell):
        @inline
        def directions(op, drawn, at, source, r, draws):
            """The directions of 16 cached keys -> r (d, 16), and their sums."""
            d, padded, zero = op.head_dim, op.valid < op.period, floats(f4(0.0))
            xx, rx, rr, xx1, rx1, rr1 = zero, zero, zero, zero, zero, zero
            for block in range(d // 32):
                for j in range(16):
                    i = 32 * block + j
                    r0, r1 = by_lane(drawn, at + WORDS, d, draws, block, j)
                    if padded:
                        if i % op.period >= op.valid:
                            r0 = zero
                        if (i + 16) % op.period >= op.valid:
                            r1 = zero
                    x0, x1 = load_cell(source + 16 * cell * i), load_cell(source + 16 * cell * (i + 16))
                    xx, rx, xx1, rx1 = fma(x0, x0, xx), fma(r0, x0, rx), fma(x1, x1, xx1), fma(r1, x1, rx1)
                    if not unit:
                        rr, rr1 = fma(r0, r0, rr), fma(r1, r1, rr1)
                    store(r + 64 * i, r0)
                    store(r + 64 * i + 1024, r1)
            store(at + SUMS, xx + xx1)
            store(at + SUMS + ROW, rx + rx1)
            store(at + SUMS + 2 * ROW, square_of(op, rr + rr1))

        @kernel(TURN, f"keys_{name}_{cell_name}", cached)
        def keys(op, drawn, source, position, count, out, scratch):
            """Make cached keys noisy, 16 by 16: (d, 16) of the cache -> (d, 16) floats at out."""
            d, groups, draws = op.head_dim, (count + 15) // 16, scratch + DRAWS
            draw_words(drawn, position, groups, scratch)
            for j in range(groups):
                at, to = scratch + 64 * j, draws + 128 * d * j
                draw_keys(at + WORDS, d, to)
            for j in range(groups):
                o, at, to = 16 * d * j, scratch + 64 * j, draws + 128 * d * j
                directions(op, drawn, at, source + cell * o, out + 4 * o, to)
            factors(drawn, position, groups, scratch)
            for j in range(groups):
                a, b = load(scratch + A + 64 * j), load(scratch + B + 64 * j)
                for i in range(16 * d * j, 16 * d * (j + 1), 16):
                    store(out + 4 * i, fma(load(out + 4 * i), b, a * load_cell(source + cell * i)))

        return keys

    def values_of(cell_name, load_cell, cell):
        @inline
        def directions(op, drawn, at, source, r, draws, products):
            """The directions of 16 cached values -> r (16, d), and their sums."""
            d, padded, zero = op.head_dim, op.valid < op.period, floats(f4(0.0))
            for p in range(16):
                xx, rx, rr, xx1, rx1, rr1 = zero, zero, zero, zero, zero, zero
                for block in range(d // 32):
                    i = d * p + 32 * block
                    r0, r1 = by_row(drawn, at + WORDS, d, draws, block, p)
                    if padded:
                        r0 = existing(r0, 32 * block, op.period, op.valid)
                        r1 = existing(r1, 32 * block + 16, op.period, op.valid)
                    x0, x1 = load_cell(source + cell * i), load_cell(source + cell * (i + 16))
                    xx, rx, xx1, rx1 = fma(x0, x0, xx), fma(r0, x0, rx), fma(x1, x1, xx1), fma(r1, x1, rx1)
                    if not unit:
                        rr, rr1 = fma(r0, r0, rr), fma(r1, r1, rr1)
                    store(r + 4 * i, r0)
                    store(r + 4 * i + 64, r1)
                store(products + 64 * p, xx + xx1)
                store(products + 64 * p + 1024, rx + rx1)
                if not unit:
                    store(products + 64 * p + 2048, rr + rr1)
            store(at + SUMS, sum_each(products))
            store(at + SUMS + ROW, sum_each(products + 1024))
            store(at + SUMS + 2 * ROW, square_of(op, sum_each(products + 2048)))

        @kernel(TURN, f"values_{name}_{cell_name}", cached)
        def values(op, drawn, source, position, count, out, scratch):
            """Make cached values noisy: (count, d) of the cache -> (count, d) floats at out, count rounded up
            to 16."""
            d, groups, draws = op.head_dim, (count + 15) // 16, scratch + DRAWS
            products = draws + 8 * TURNED * d
            draw_words(drawn, position, groups, scratch)
            for j in range(groups):
                at, to = scratch + 64 * j, draws + 128 * d * j
                draw_values(at + WORDS, d, to)
            for j in range(groups):
                o, at, to = 16 * d * j, scratch + 64 * j, draws + 128 * d * j
                directions(op, drawn, at, source + cell * o, out + 4 * o, to, products)
            factors(drawn, position, groups, scratch)
            for p in range(16 * groups):
                at = scratch + 4 * p
                a, b = floats(load_f32(at + A)), floats(load_f32(at + B))
                for i in range(d * p, d * (p + 1), 16):
                    store(out + 4 * i, fma(load(out + 4 * i), b, a * load_cell(source + cell * i)))

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
        {cell: keys_of(cell, *how) for cell, how in cells.items()},
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
    drawn.measured = i8(0)
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
    lo, hi, me = my_rows(call, op, tid, n)
    for i in range(lo, hi):
        x, y = row(op.x, i, me), row(op.y, i, me)
        if x != y:
            copy_row(x, y, 4 * op.head_dim * op.heads)
        rotate_heads(call, op, i, y, i8(0), op.heads, me <= 0, tid)


@operation
def noise_heads(call, op, tid, n):
    """x (T, H, d) in place, as noise_rows, but split by kv head: between the projections and attention."""
    group = op.heads // op.kv_heads
    lo, hi = my_groups(call, op, tid, n)
    for u in range(lo, hi):
        token, g = u // op.kv_heads, u % op.kv_heads
        x = op.x.data + token * op.x.stride
        rotate_heads(call, op, token, x, g * group, (g + 1) * group, True, tid)


LAWS = {
    name: (make_law(name, entry.law), make_law(name, entry.law, wandering=True))
    for name, entry in DIRECTIONS.items()
}
