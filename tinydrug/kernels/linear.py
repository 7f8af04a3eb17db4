"""Linear maps: y (T, N) = x (T, K) @ weight (N, K)^T, one kernel a weight format.

Weights lie in panels of 16 output rows; a lane is an output row, so there is no horizontal sum:

    f32, f16, bf16   [panel][k][16]
    q8_0   [panel][k/32][8][16][4] bytes q + 128; scales f16 [panel][k/32][16]
    q4_0   [panel][k/32][4][16][4] bytes: low nibbles columns 0..15, high 16..31, both q + 8; scales as q8_0
    q4_1   the same nibbles holding q; scales f16 [panel][k/32][2][16]: scale, minimum

An output element is one sum over k in one order whatever the tile that holds it, so its bits depend
neither on how many tokens came with it nor on the threads. Tiles reach up to 7 rows past T: buffers have
room for them.
"""

import numpy as np

from tinydrug.kernels.jit import inline, kernel
from tinydrug.kernels.quantise import moments_of, scales_of, sums_of
from tinydrug.kernels.tables import OPERATION, reader, row, rows_of, share
from tinydrug.kernels.vectors import (
    high_nibbles,
    load,
    load_bfloats,
    load_bytes,
    load_f32,
    load_halves,
    low_nibbles,
    tile1,
    tile4,
    tile8,
    tile_add,
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
    tile_splat_ints,
    tile_store,
)

i4, i8 = np.int32, np.int64


# --- one panel: tile of zeros, addresses of weights, scales and activations, k, activation stride -> tile of
@inline
def panel_f32(acc, w, s, x, k, stride):
    for i in range(k):
        acc = tile_fma(acc, load(w + 64 * i), x + 4 * i, stride)
    return acc


@inline
def panel_f16(acc, w, s, x, k, stride):
    for i in range(k):
        acc = tile_fma(acc, load_halves(w + 32 * i), x + 4 * i, stride)
    return acc


@inline
def panel_bf16(acc, w, s, x, k, stride):
    for i in range(k):
        acc = tile_fma(acc, load_bfloats(w + 32 * i), x + 4 * i, stride)
    return acc


@inline
def panel_q8_0(acc, w, s, x, k, stride):
    scales, sums = scales_of(x, k), sums_of(x, k)
    for b in range(k // 32):
        dots = tile_splat_ints(acc, sums + 4 * b, stride, i4(7))  # -128 * sum: the weights are q + 128
        for c in range(8):
            dots = tile_dot4(dots, load_bytes(w + 512 * b + 64 * c), x + 32 * b + 4 * c, stride)
        acc = tile_scale_add(acc, dots, load_halves(s + 32 * b), scales + 4 * b, stride)
    return acc


@inline
def panel_q4_0(acc, w, s, x, k, stride):
    scales, sums = scales_of(x, k), sums_of(x, k)
    for b in range(k // 32):
        dots = tile_splat_ints(acc, sums + 4 * b, stride, i4(3))  # -8 * sum: the weights are q + 8
        for c in range(4):
            nibbles = load_bytes(w + 256 * b + 64 * c)
            dots = tile_dot4(dots, low_nibbles(nibbles), x + 32 * b + 4 * c, stride)
            dots = tile_dot4(dots, high_nibbles(nibbles), x + 32 * b + 16 + 4 * c, stride)
        acc = tile_scale_add(acc, dots, load_halves(s + 32 * b), scales + 4 * b, stride)
    return acc


@inline
def panel_q4_1(acc, w, s, x, k, stride):
    scales, moments = scales_of(x, k), moments_of(x, k)
    for b in range(k // 32):
        dots = tile_ints(acc)
        for c in range(4):
            nibbles = load_bytes(w + 256 * b + 64 * c)
            dots = tile_dot4(dots, low_nibbles(nibbles), x + 32 * b + 4 * c, stride)
            dots = tile_dot4(dots, high_nibbles(nibbles), x + 32 * b + 16 + 4 * c, stride)
        acc = tile_scale_add(acc, dots, load_halves(s + 64 * b), scales + 4 * b, stride)
        acc = tile_fma(acc, load_halves(s + 64 * b + 32), moments + 4 * b, stride)
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


def _linear(name, panel, panel_bytes, scale_bytes):
    """The kernel of a format: bytes of weights and of scales for 32 columns of a panel."""

    @inline
    def tile(zeros, w, p, x, x_stride, y, y_stride, onto):
        blocks = w.k // 32
        data, scales = w.data + p * blocks * panel_bytes, w.scales + p * blocks * scale_bytes
        acc = panel(zeros, data, scales, x, w.k, x_stride)
        finish(acc, w.bias + 64 * p if w.bias != 0 else i8(0), onto, y + 64 * p, y_stride)

    @kernel(OPERATION, f"linear_{name}")
    def linear(call, op, tid, n):
        w, me, rows = op.weight, reader(call, op, tid), rows_of(call, op)
        lo, hi = share(w.n // 16, tid, n)
        xs, ys, onto = op.x.stride, op.y.stride, op.onto != 0
        for p in range(lo, hi):
            t = 0
            while t < rows:
                x, y = row(op.x, t, me), op.y.data + t * ys
                if rows - t == 1:
                    tile(tile1(), w, p, x, xs, y, ys, onto)
                    t += 1
                elif rows - t <= 4:
                    tile(tile4(), w, p, x, xs, y, ys, onto)
                    t += 4
                else:
                    tile(tile8(), w, p, x, xs, y, ys, onto)
                    t += 8

    return linear


def _float_linear(name, panel, panels, element):
    """The kernel of a float format, element bytes a weight."""

    @inline
    def tile(zeros, w, p, x, x_stride, y, y_stride, onto):
        acc = panel(zeros, w.data + p * w.k * element * 16, i8(0), x, w.k, x_stride)
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


linear_f32 = _float_linear("f32", panel_f32, panels_f32, 4)
linear_f16 = _float_linear("f16", panel_f16, panels_f16, 2)
linear_bf16 = _float_linear("bf16", panel_bf16, panels_bf16, 2)
linear_q8_0 = _linear("q8_0", panel_q8_0, 512, 32)
linear_q4_0 = _linear("q4_0", panel_q4_0, 256, 32)
linear_q4_1 = _linear("q4_1", panel_q4_1, 256, 64)
