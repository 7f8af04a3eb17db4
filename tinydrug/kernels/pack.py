"""Weights from the rows of a checkpoint to panels: converting, quantising, padding and permuting in one pass.

A panel is packed from 16 source rows. Rows come through a map (-1: a row of zeros), columns in groups of
`group` that are moved apart to `padded_group`: that is how heads are padded, and rotary rows put in order,
at no extra pass.
"""

from typing import NamedTuple

import numpy as np
from numba import types

from tinydrug.kernels.blocks import BLOCKS
from tinydrug.kernels.jit import Kernel, inline, kernel
from tinydrug.kernels.linear import LINEAR
from tinydrug.kernels.planes import LEVELS
from tinydrug.kernels.structs import Struct
from tinydrug.kernels.tables import GATHER
from tinydrug.kernels.vectors import (
    floats,
    fma,
    get_byte,
    get_lane,
    highest_magnitude,
    load,
    load_bf16,
    load_bfloats,
    load_f16,
    load_f32,
    load_halves,
    load_i32,
    max_lanes,
    maximum,
    round_even,
    select,
    shift_left,
    store,
    store_bf16,
    store_f16,
    store_f32,
    store_i32,
    store_low_bytes,
    sum_lanes,
    to_ints,
)

f4, i4, i8 = np.float32, np.int32, np.int64
EDGES = tuple(f4((low + high) / 2) for low, high in zip(LEVELS[:-1], LEVELS[1:], strict=True))

SOURCE = Struct(
    "Source",
    data="i8",  # address of element (0, 0)
    row_stride="i8",  # bytes from row to row,
    column_stride="i8",  # and from column to column (floats only)
    rows="i8",  # address of the map: source row of each output row, or -1
    k="i8",  # source columns
    group="i8",
    padded_group="i8",
    padded_k="i8",
    data_out="i8",
    scales_out="i8",
)
PACK = types.void(
    SOURCE, *[types.int64] * 3
)  # source, first panel, last panel, scratch (64 bytes and padded_k floats)


# --- readers: one element of a source row as a float, and 16 of them where they lie side by side ------------
@inline
def read_f32(row, column, stride):
    return load_f32(row + column * stride)


@inline
def read_f16(row, column, stride):
    return load_f16(row + column * stride)


@inline
def read_bf16(row, column, stride):
    return load_bf16(row + column * stride)


# --- writers: row r of a panel, k floats -> its lane of the panel -------------------------------------------
def _write_floats(store_one, element):
    @inline
    def write(row, r, k, data, scales, scratch):
        for i in range(k):
            store_one(data + element * (16 * i + r), load_f32(row + 4 * i))

    return write


@inline
def write_q8_0(row, r, k, data, scales, scratch):
    """absmax / 127, as ggml's q8_0."""
    for b in range(k // 32):
        u, v = load(row + 128 * b), load(row + 128 * b + 64)
        top = highest_magnitude(u, v)
        inverse = f4(127.0) / top if top > f4(0.0) else f4(0.0)
        store_f16(scales + 32 * b + 2 * r, top / f4(127.0))
        store_low_bytes(scratch, to_ints(round_even(u * inverse)) + i4(128))
        store_low_bytes(scratch + 16, to_ints(round_even(v * inverse)) + i4(128))
        for c in range(8):
            store_i32(data + 512 * b + 64 * c + 4 * r, load_i32(scratch + 4 * c))


def _nearest(entries):
    """16 floats in units of a scale -> of these entries, those of the nearest levels."""
    entries = tuple(map(f4, entries))

    @inline
    def nearest(x):
        y = floats(entries[0])
        for i in range(15):
            y = select(x > EDGES[i], floats(entries[i + 1]), y)
        return y

    return nearest


nearest_levels, nearest_numbers = _nearest(LEVELS), _nearest(range(16))


@inline
def write_iq4_nl(row, r, k, data, scales, scratch):
    """The value of largest magnitude becomes the least level, or the largest: whichever leads to levels q of
    the values v with smaller squares of errors, the scale being qv / qq; and then the levels nearest by that
    scale are tried, too."""
    for b in range(k // 32):
        u, v = load(row + 128 * b), load(row + 128 * b + 64)
        high = max_lanes(maximum(u, v))
        low = -max_lanes(maximum(u * f4(-1.0), v * f4(-1.0)))
        top = high if high > -low else low
        scale, best = top * f4(0.0), f4(0.0)  # NaN unless finite
        for end in (f4(LEVELS[0]), f4(LEVELS[15]), f4(0.0)):
            inverse = f4(0.0)
            if top != f4(0.0):
                inverse = end / top if end != f4(0.0) else f4(1.0) / scale
            p, q = nearest_levels(u * inverse), nearest_levels(v * inverse)
            along, square = sum_lanes(fma(p, u, q * v)), sum_lanes(fma(p, p, q * q))
            if along * along > best * square:
                scale, best = along / square, along * along / square
        at = scales + 32 * b + 2 * r
        store_f16(at, scale)
        scale = load_f16(at)
        inverse = f4(1.0) / scale if scale != f4(0.0) else f4(0.0)
        first, second = nearest_numbers(u * inverse), nearest_numbers(v * inverse)
        store_low_bytes(scratch, to_ints(first) | shift_left(to_ints(second), i4(4)))
        for c in range(4):
            store_i32(data + 256 * b + 64 * c + 4 * r, load_i32(scratch + 4 * c))


# --- packers ------------------------------------------------------------------------------------------------
def _pack(name, read, load_many, element, write, panel_bytes, scale_bytes):
    """The kernel that packs panels through floats. load_many reads 16 neighbours of `element` bytes."""

    @kernel(PACK, name)
    def pack(source, lo, hi, scratch):
        k, row = source.padded_k, scratch + 64
        plain = source.column_stride == element and source.group == source.padded_group
        for p in range(lo, hi):
            data = source.data_out + p * (k // 32) * panel_bytes
            scales = source.scales_out + p * (k // 32) * scale_bytes
            for r in range(16):
                index = load_i32(source.rows + 4 * (16 * p + r))
                if index < 0:
                    for j in range(0, 4 * k, 64):
                        store(row + j, floats(f4(0.0)))
                else:
                    start, done = source.data + index * source.row_stride, i8(0)
                    if plain:
                        done = source.k // 16 * 16
                        for c in range(0, done, 16):
                            store(row + 4 * c, load_many(start + element * c))
                    if done < k:
                        for c in range(done, k):
                            store_f32(row + 4 * c, f4(0.0))
                    for c in range(done, source.k):
                        at = c // source.group * source.padded_group + c % source.group
                        store_f32(row + 4 * at, read(start, c, source.column_stride))
                write(row, r, k, data, scales, scratch)

    return pack


def _repack(name, blocks):
    """The kernel that keeps a file's own blocks: bits are moved, none is computed."""
    place, integer, copy_scales = blocks.planes.place, blocks.integer, blocks.copy_scales
    block_bytes, scale_bytes = blocks.planes.nbytes, blocks.scale_bytes

    @kernel(PACK, name)
    def repack(source, lo, hi, scratch):
        n = source.padded_k // 32
        for p in range(lo, hi):
            for r in range(16):
                index = load_i32(source.rows + 4 * (16 * p + r))
                if index < 0:
                    continue  # the panels come zeroed: scale 0
                row = source.data + index * source.row_stride
                for b in range(n):
                    out = source.data_out + (p * n + b) * block_bytes
                    for c in range(32):
                        place(out, r, c, integer(row, 32 * b + c))
                    copy_scales(row, b, r, source.scales_out + p * n * scale_bytes)

    return repack


# --- one row of a packed matrix, as floats: for the embedding -----------------------------------------------
def _gather(name, load_one, element):
    @kernel(GATHER, f"gather_{name}")
    def gather(weight, index, out):
        panel, r = weight.data + 16 * element * weight.k * (index // 16), index % 16
        for c in range(weight.k):
            store_f32(out + 4 * c, load_one(panel + element * (16 * c + r)))

    return gather


def _gather_blocks(name, blocks):
    low, high, scale, offset = blocks.planes.low, blocks.planes.high, blocks.scale, blocks.offset
    minimum, second = blocks.minimum, blocks.second_scale or blocks.scale
    block_bytes, scale_bytes = blocks.planes.nbytes, blocks.scale_bytes
    if minimum is None:

        @inline
        def minimum(s, b):
            return floats(f4(0.0))

    @kernel(GATHER, f"gather_{name}")
    def gather(weight, index, out):
        p, r, n = index // 16, index % 16, weight.k // 32
        s = weight.scales + p * n * scale_bytes
        for b in range(n):
            w, to = weight.data + (p * n + b) * block_bytes, out + 128 * b
            first, other, least = (
                get_lane(scale(s, b), r),
                get_lane(second(s, b), r),
                get_lane(minimum(s, b), r),
            )
            for c in range(4):
                quad, next_quad = low(w, c), high(w, c)
                for i in range(4):
                    q, next_q = get_byte(quad, 4 * r + i), get_byte(next_quad, 4 * r + i)
                    store_f32(to + 16 * c + 4 * i, first * f4(q - offset) + least)
                    store_f32(to + 64 + 16 * c + 4 * i, other * f4(next_q - offset) + least)

    return gather


# --- the registry: kinds of tensors a file may hold, and formats a panel may have ---------------------------
class Format(NamedTuple):
    """How weights lie in memory: bytes of data and scales for 32 columns of a panel; what the kernel wants of
    activations."""

    panel_bytes: int
    scale_bytes: int
    linear: Kernel
    gather: Kernel
    quantised: bool  # activations come as int8


_READ = {  # kind of source -> element reader, vector reader, bytes of an element
    "f32": (read_f32, load, 4),
    "f16": (read_f16, load_halves, 2),
    "bf16": (read_bf16, load_bfloats, 2),
}
_WRITE = {
    "f32": _write_floats(store_f32, 4),
    "f16": _write_floats(store_f16, 2),
    "bf16": _write_floats(store_bf16, 2),
    "q8_0": write_q8_0,
    "iq4_nl": write_iq4_nl,
}
FORMATS = {
    name: Format(512 * element, 0, LINEAR[name], _gather(name, load_one, element), False)
    for name, load_one, element in (("f32", load_f32, 4), ("f16", load_f16, 2), ("bf16", load_bf16, 2))
} | {
    name: Format(blocks.planes.nbytes, blocks.scale_bytes, LINEAR[name], _gather_blocks(name, blocks), True)
    for name, blocks in BLOCKS.items()
}
PACKERS = {  # (kind of source, format) -> kernel
    (kind, name): _pack(
        f"pack_{kind}_{name}", *read, write, FORMATS[name].panel_bytes, FORMATS[name].scale_bytes
    )
    for kind, read in _READ.items()
    for name, write in _WRITE.items()
} | {(name, name): _repack(f"repack_{name}", blocks) for name, blocks in BLOCKS.items()}
