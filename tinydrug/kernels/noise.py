"""Noise in vectors: the operations that turn a vector towards a random direction, in memory or as it is read.

A vector x turns by an angle phi towards r (DRµGS):  x' = x cos phi + |x| o/|o| sin phi,  where o is the
part of r that is orthogonal to x. That is x' = a x + b r with a and b from x.x, r.x and r.r alone, so r
never has to be kept where x' is only multiplied with something. Other forms change a and b, laws (laws.py)
change r, generator.py says what a draw depends on.
"""

from typing import NamedTuple

import numpy as np
from numba import types

from tinydrug.kernels.embed import copy_row
from tinydrug.kernels.generator import draw_key, streams, word
from tinydrug.kernels.jit import Kernel, inline, kernel
from tinydrug.kernels.laws import LAWS as DIRECTIONS
from tinydrug.kernels.laws import normal_pair
from tinydrug.kernels.maths import sin_cos_half
from tinydrug.kernels.rope import my_groups
from tinydrug.kernels.tables import DOSE, OP, my_rows, operation, row, rows_of
from tinydrug.kernels.vectors import (
    absolute,
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
ADDED, NLERP = 1, 2  # codes of forms (0: rotation) and
NORMAL = 1  # of angles (0: uniform), as in noise/laws.py
SUBNORMAL = f4(1e-6)  # below this share of |r|^2 the orthogonal part is rounding, not a direction

ROTATE = types.void(DOSE, *[types.int64] * 7)  # dose, x, components, period, valid, key, position, scratch
SCORES = types.void(OP, DOSE, *[types.int64] * 7)  # op, dose, keys, q, rows, position, key, sink, out
VALUES = types.void(OP, DOSE, *[types.int64] * 6)  # op, dose, values, position, key, sink, out, scratch
DRAW = types.void(DOSE, *[types.int64] * 8)  # dose, seed, layer, site, head, position, step, components, out
call_rotate, call_scores, call_values = call_at(ROTATE), call_at(SCORES), call_at(VALUES)


# --- from sums to the rotation ------------------------------------------------------------------------------
@inline
def angle(first, second, dose):
    """The angle phi of each lane in radians: U[0, theta), or |N(0, theta)|."""
    w = word(first, second, ints(i4(-1)))
    if dose.angle == NORMAL:
        z, _ = normal_pair(w)
        return absolute(z) * f4(dose.theta)
    return to_floats(shift_right(w, i4(8))) * f4(dose.theta * 2.0**-24)


@inline
def coefficients(first, second, xx, rx, rr, dose):
    """Lanes of x.x, r.x, r.r -> a, b of x' = a x + b r. x stays where it has no length or r no direction to
    offer."""
    phi, zero, one = angle(first, second, dose), floats(f4(0.0)), floats(f4(1.0))
    if dose.form == ADDED:  # x + phi |x| r/|r|
        turnable = both(rr > f4(0.0), xx > f4(0.0))
        return one, select(turnable, phi * sqrt(xx / rr), zero)
    along = rx / xx  # 0/0 where x = 0: not selected below
    orthogonal = rr - rx * along
    turnable = both(orthogonal > rr * SUBNORMAL, xx > f4(0.0))
    if dose.form == NLERP:  # |x| (x/|x| + phi o/|o|) normalised: an angle of arctan(phi)
        cos = one / sqrt(fma(phi, phi, one))
        sin = phi * cos
    else:
        turns = phi * f4(0.5 / np.pi)
        turns = turns - round_even(turns)  # whole turns change nothing, and the polynomials stay in range
        sin, cos = sin_cos_half(turns * f4(np.pi))
    b = sin * sqrt(xx / orthogonal)
    return select(turnable, cos - b * along, one), select(turnable, b, zero)


@inline
def existing(r, i, period, valid):
    """r with zeros where component i + lane is padding: the last of every `period` components beyond `valid`.
    r with zeros where component i + lane is padding: the last of every `period` components beyond `valid`."""
    return select(lane() + i4(i % period) < i4(valid), r, floats(f4(0.0)))


def _rotate(name, by_component):
    """The kernel that turns one vector in memory."""

    @kernel(ROTATE, f"rotate_{name}")
    def rotate(dose, x, components, period, valid, key, position, scratch):
        first, second = streams(ints(i4(position)), key)
        zero = floats(f4(0.0))
        xx, rx, rr = zero, zero, zero
        for i in range(0, components, 32):
            r0, r1 = by_component(first, second, i // 32)
            r0, r1 = existing(r0, i, period, valid), existing(r1, i + 16, period, valid)
            x0, x1 = load(x + 4 * i), load(x + 4 * i + 64)
            store(scratch + 4 * i, r0)
            store(scratch + 4 * i + 64, r1)
            xx, rx, rr = (
                fma(x1, x1, fma(x0, x0, xx)),
                fma(r1, x1, fma(r0, x0, rx)),
                fma(r1, r1, fma(r0, r0, rr)),
            )
        xx, rx, rr = floats(sum_lanes(xx)), floats(sum_lanes(rx)), floats(sum_lanes(rr))
        a, b = coefficients(first, second, xx, rx, rr, dose)
        for j in range(0, 4 * components, 64):
            store(x + j, fma(load(scratch + j), b, a * load(x + j)))

    return rotate


def _scores(name, by_position, load_cell, cell):
    """The kernel that multiplies queries with 16 cached keys under noise; the noisy keys are never stored."""

    @inline
    def tile(zeros, op, dose, keys, q, position, key, sink, out):
        positions = lane() + i4(position)
        first, second = streams(positions, key)
        zero = floats(f4(0.0))
        qx, qr, xx, rx, rr, d = zeros, zeros, zero, zero, zero, op.head_dim
        for block in range(d // 32):
            for j in range(16):
                i = 32 * block + j
                r0, r1 = by_position(first, second, block, j)
                if i % op.period >= op.valid:
                    r0 = zero
                if (i + 16) % op.period >= op.valid:
                    r1 = zero
                x0, x1 = load_cell(keys + 16 * cell * i), load_cell(keys + 16 * cell * (i + 16))
                qx = tile_fma(tile_fma(qx, x0, q + 4 * i, 4 * d), x1, q + 4 * i + 64, 4 * d)
                qr = tile_fma(tile_fma(qr, r0, q + 4 * i, 4 * d), r1, q + 4 * i + 64, 4 * d)
                xx, rx = fma(x1, x1, fma(x0, x0, xx)), fma(r1, x1, fma(r0, x0, rx))
                rr = fma(r1, r1, fma(r0, r0, rr))
        a, b = coefficients(first, second, xx, rx, rr, dose)
        awake = positions >= i4(sink)
        a, b = select(awake, a, floats(f4(1.0))), select(awake, b, zero)
        tile_store(tile_axby(a, qx, b, qr), out, 256)

    @kernel(SCORES, f"scores_{name}")
    def scores(op, dose, keys, q, rows, position, key, sink, out):
        if rows == 1:
            tile(tile1(), op, dose, keys, q, position, key, sink, out)
        elif rows <= 4:
            tile(tile4(), op, dose, keys, q, position, key, sink, out)
        else:
            tile(tile8(), op, dose, keys, q, position, key, sink, out)

    return scores


def _values(name, by_component, load_cell, cell):
    """The kernel that makes 16 cached values noisy: (16, d) of the cache -> (16, d) floats at out."""

    @kernel(VALUES, f"values_{name}")
    def values(op, dose, source, position, key, sink, out, scratch):
        d, positions = op.head_dim, lane() + i4(position)
        first, second = streams(positions, key)
        zero = floats(f4(0.0))
        words, sums, ab = (
            scratch,
            scratch + 128,
            scratch + 320,
        )  # [2][16] words, [3][16] sums, [2][16] coefficients
        store_ints(words, first)
        store_ints(words + 64, second)
        for p in range(16):
            one, two = ints(load_i32(words + 4 * p)), ints(load_i32(words + 64 + 4 * p))
            x, r = source + cell * d * p, out + 4 * d * p
            xx, rx, rr = zero, zero, zero
            for i in range(0, d, 32):
                r0, r1 = by_component(one, two, i // 32)
                r0, r1 = existing(r0, i, op.period, op.valid), existing(r1, i + 16, op.period, op.valid)
                store(r + 4 * i, r0)
                store(r + 4 * i + 64, r1)
                x0, x1 = load_cell(x + cell * i), load_cell(x + cell * (i + 16))
                xx, rx = fma(x1, x1, fma(x0, x0, xx)), fma(r1, x1, fma(r0, x0, rx))
                rr = fma(r1, r1, fma(r0, r0, rr))
            store_f32(sums + 4 * p, sum_lanes(xx))
            store_f32(sums + 64 + 4 * p, sum_lanes(rx))
            store_f32(sums + 128 + 4 * p, sum_lanes(rr))
        a, b = coefficients(first, second, load(sums), load(sums + 64), load(sums + 128), dose)
        awake = positions >= i4(sink)
        store(ab, select(awake, a, floats(f4(1.0))))
        store(ab + 64, select(awake, b, zero))
        for p in range(16):
            a, b = floats(load_f32(ab + 4 * p)), floats(load_f32(ab + 64 + 4 * p))
            x, r = source + cell * d * p, out + 4 * d * p
            for i in range(0, d, 16):
                store(r + 4 * i, fma(load(r + 4 * i), b, a * load_cell(x + cell * i)))

    return values


def _draw(name, by_component):
    """The kernel that shows a draw, for tests and records: r (components) at out, then phi in radians in 16
    lanes."""

    @kernel(DRAW, f"draw_{name}")
    def draw(dose, seed, layer, site, head, position, step, components, out):
        first, second = streams(ints(i4(position)), draw_key(seed, layer, site, head, step))
        for i in range(0, components, 32):
            r0, r1 = by_component(first, second, i // 32)
            store(out + 4 * i, r0)
            store(out + 4 * i + 64, r1)
        store(out + 4 * components, angle(first, second, dose))

    return draw


# --- the operations of the forward pass ---------------------------------------------------------------------
@inline
def dose_at(call, op, token):
    """The dose of this operation's site for a token's sequence; theta 0 where its position is protected."""
    return call.spans[call.tokens[token].span].doses[op.layer * call.sites + op.site]


@inline
def rotate_heads(call, op, dose, token, x, first, last, counted, scratch):
    """Turn heads first .. last of the row at x."""
    span, position = call.spans[call.tokens[token].span], call.tokens[token].position
    if position < span.sink:
        return
    for h in range(first, last):
        key = draw_key(span.seed, op.layer, op.site, h, position)
        at = x + 4 * op.head_dim * h
        call_rotate(dose.rotate, dose, at, op.head_dim, op.period, op.valid, key, position, scratch)
    if counted:
        atomic_add(span.moved + 8 * op.site, last - first)


@operation
def noise_rows(call, op, tid, n):
    """x (T, H, d) -> y (T, H, d), noise in every head of a row (H = 1: in the whole row)."""
    first, step, me = my_rows(call, op, tid, n)
    scratch = call.scratch + tid * call.scratch_stride
    for i in range(first, rows_of(call, op), step):
        x, y = row(op.x, i, me), row(op.y, i, me)
        if x != y:
            copy_row(x, y, 4 * op.head_dim * op.heads)
        dose = dose_at(call, op, i)
        if dose.theta > 0.0:
            rotate_heads(call, op, dose, i, y, i8(0), op.heads, me <= 0, scratch)


@operation
def noise_heads(call, op, tid, n):
    """x (T, H, d) in place, as noise_rows, but split by kv head: for what lies between the projections and
    attention."""
    group = op.heads // op.kv_heads
    first, last, step = my_groups(call, op, tid, n)
    scratch = call.scratch + tid * call.scratch_stride
    for u in range(first, last, step):
        token, g = u // op.kv_heads, u % op.kv_heads
        dose = dose_at(call, op, token)
        if dose.theta > 0.0:
            x = op.x.data + token * op.x.stride
            rotate_heads(call, op, dose, token, x, g * group, (g + 1) * group, True, scratch)


class Law(NamedTuple):
    """The kernels of a direction law: `scores` and `values` by the cache's element type."""

    rotate: Kernel
    scores: dict[str, Kernel]
    values: dict[str, Kernel]
    draw: Kernel


def _law(name, by_component, by_position) -> Law:
    cells = {"f16": (load_halves, 2), "f32": (load, 4)}
    return Law(
        _rotate(name, by_component),
        {cell: _scores(f"{name}_{cell}", by_position, *how) for cell, how in cells.items()},
        {cell: _values(f"{name}_{cell}", by_component, *how) for cell, how in cells.items()},
        _draw(name, by_component),
    )


LAWS = {name: _law(name, *views) for name, views in DIRECTIONS.items()}
