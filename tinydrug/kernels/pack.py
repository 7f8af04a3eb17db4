"""Weights from the rows of a checkpoint to panels: converting, quantising, padding and permuting in one pass.

A panel is packed from 16 source rows. Rows come through a map (-1: a row of zeros), columns in groups of
`group` that are moved apart to `padded_group`: that is how heads are padded, and rotary rows put in order,
at no extra pass.
"""

from typing import NamedTuple

import numpy as np
from numba import types

from tinydrug.kernels.jit import Kernel, inline, kernel
from tinydrug.kernels.linear import linear_bf16, linear_f16, linear_f32, linear_q4_0, linear_q4_1, linear_q8_0
from tinydrug.kernels.structs import Struct
from tinydrug.kernels.tables import GATHER
from tinydrug.kernels.vectors import (
    absolute,
    floats,
    load,
    load_bf16,
    load_bfloats,
    load_f16,
    load_f32,
    load_halves,
    load_i32,
    load_u8,
    load_u16,
    max_lanes,
    maximum,
    minimum,
    round_even,
    shift_left,
    store,
    store_bf16,
    store_f16,
    store_f32,
    store_i32,
    store_low_bytes,
    store_u16,
    to_ints,
)

f4, i4, i8 = np.float32, np.int32, np.int64

SOURCE = Struct(
    "Source",
    data="i8",  # address of element (0, 0)
    row_stride="i8",  # bytes from row to row,
    column_stride="i8",  # and from column to column (float kinds only)
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


@inline
def read_q8_0(row, column, stride):
    block = row + 34 * (column // 32)
    return load_f16(block) * f4((load_u8(block + 2 + column % 32) ^ 128) - 128)


@inline
def nibble(bytes_, column):
    return (load_u8(bytes_ + column % 16) >> (4 * (column % 32 // 16))) & 15


@inline
def read_q4_0(row, column, stride):
    block = row + 18 * (column // 32)
    return load_f16(block) * f4(nibble(block + 2, column) - 8)


@inline
def read_q4_1(row, column, stride):
    block = row + 20 * (column // 32)
    return load_f16(block) * f4(nibble(block + 4, column)) + load_f16(block + 2)


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
        top = max_lanes(maximum(absolute(u), absolute(v)))
        inverse = f4(127.0) / top if top > f4(0.0) else f4(0.0)
        store_f16(scales + 32 * b + 2 * r, top / f4(127.0))
        store_low_bytes(scratch, to_ints(round_even(u * inverse)) + i4(128))
        store_low_bytes(scratch + 16, to_ints(round_even(v * inverse)) + i4(128))
        for c in range(8):
            store_i32(data + 512 * b + 64 * c + 4 * r, load_i32(scratch + 4 * c))


@inline
def write_q4_0(row, r, k, data, scales, scratch):
    """The value of largest magnitude / -8, as ggml's q4_0."""
    for b in range(k // 32):
        u, v = load(row + 128 * b), load(row + 128 * b + 64)
        high = max_lanes(maximum(u, v))
        low = -max_lanes(maximum(u * f4(-1.0), v * f4(-1.0)))
        scale = (high if high > -low else low) / f4(-8.0)
        inverse = f4(1.0) / scale if scale != f4(0.0) else f4(0.0)
        store_f16(scales + 32 * b + 2 * r, scale)
        qu = to_ints(minimum(u * inverse + f4(8.5), floats(f4(15.0))))
        qv = to_ints(minimum(v * inverse + f4(8.5), floats(f4(15.0))))
        store_low_bytes(scratch, qu | shift_left(qv, i4(4)))
        for c in range(4):
            store_i32(data + 256 * b + 64 * c + 4 * r, load_i32(scratch + 4 * c))


# --- packers ------------------------------------------------------------------------------------------------
def _pack(name, read, load_many, element, write, panel_bytes, scale_bytes):
    """The kernel that packs panels through floats. load_many reads 16 neighbours of `element` bytes (element
    0: none)."""

    @kernel(PACK, name)
    def pack(source, lo, hi, scratch):
        k, row = source.padded_k, scratch + 64
        plain = element > 0 and source.column_stride == element and source.group == source.padded_group
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


def _repack(name, block_bytes, head, offset, panel_bytes, scale_bytes):
    """The kernel that keeps a file's own blocks: bytes are moved, none is computed. `head` bytes of scales
    open a block; bytes are xored with `offset` (q8_0's signed bytes become q + 128)."""

    @kernel(PACK, name)
    def repack(source, lo, hi, scratch):
        blocks, words = source.padded_k // 32, (block_bytes - head) // 4
        for p in range(lo, hi):
            for r in range(16):
                index = load_i32(source.rows + 4 * (16 * p + r))
                if index < 0:
                    continue  # the panels come zeroed: scale 0
                row = source.data + index * source.row_stride
                for b in range(blocks):
                    block = row + b * block_bytes
                    out = source.data_out + (p * blocks + b) * panel_bytes
                    for c in range(words):
                        store_i32(out + 64 * c + 4 * r, load_i32(block + head + 4 * c) ^ i4(offset))
                    scales = source.scales_out + (p * blocks + b) * scale_bytes
                    for s in range(head // 2):
                        store_u16(scales + 32 * s + 2 * r, load_u16(block + 2 * s))

    return repack


# --- one row of a packed matrix, as floats: for the embedding -----------------------------------------------
def _gather(name, element):
    @kernel(GATHER, f"gather_{name}")
    def gather(weight, index, out):
        p, r = index // 16, index % 16
        for c in range(weight.k):
            store_f32(out + 4 * c, element(weight, p, r, c))

    return gather


@inline
def element_f32(w, p, r, c):
    return load_f32(w.data + 4 * ((p * w.k + c) * 16 + r))


@inline
def element_f16(w, p, r, c):
    return load_f16(w.data + 2 * ((p * w.k + c) * 16 + r))


@inline
def element_bf16(w, p, r, c):
    return load_bf16(w.data + 2 * ((p * w.k + c) * 16 + r))


@inline
def element_q8_0(w, p, r, c):
    block = p * (w.k // 32) + c // 32
    q = load_u8(w.data + 512 * block + 64 * (c % 32 // 4) + 4 * r + c % 4)
    return load_f16(w.scales + 32 * block + 2 * r) * f4(q - 128)


@inline
def packed_nibble(w, block, r, c):
    byte = load_u8(w.data + 256 * block + 64 * (c % 16 // 4) + 4 * r + c % 4)
    return (byte >> (4 * (c % 32 // 16))) & 15


@inline
def element_q4_0(w, p, r, c):
    block = p * (w.k // 32) + c // 32
    return load_f16(w.scales + 32 * block + 2 * r) * f4(packed_nibble(w, block, r, c) - 8)


@inline
def element_q4_1(w, p, r, c):
    block = p * (w.k // 32) + c // 32
    scale = load_f16(w.scales + 64 * block + 2 * r)
    return scale * f4(packed_nibble(w, block, r, c)) + load_f16(w.scales + 64 * block + 32 + 2 * r)


# --- the registry: kinds of tensors a file may hold, and formats a panel may have ---------------------------
class Format(NamedTuple):
    """How weights lie in memory: bytes of data and scales for 32 columns of a panel; what the kernel wants of
    activations."""

    panel_bytes: int
    scale_bytes: int
    linear: Kernel
    gather: Kernel
    quantised: bool  # activations come as int8


_READ = {  # kind of source -> element reader, vector reader, bytes of an element (0: blocks)
    "f32": (read_f32, load, 4),
    "f16": (read_f16, load_halves, 2),
    "bf16": (read_bf16, load_bfloats, 2),
    "q8_0": (read_q8_0, load, 0),
    "q4_0": (read_q4_0, load, 0),
    "q4_1": (read_q4_1, load, 0),
}
_WRITE = {
    "f32": _write_floats(store_f32, 4),
    "f16": _write_floats(store_f16, 2),
    "bf16": _write_floats(store_bf16, 2),
    "q8_0": write_q8_0,
    "q4_0": write_q4_0,
}
FORMATS = {
    "f32": Format(2048, 0, linear_f32, _gather("f32", element_f32), False),
    "f16": Format(1024, 0, linear_f16, _gather("f16", element_f16), False),
    "bf16": Format(1024, 0, linear_bf16, _gather("bf16", element_bf16), False),
    "q8_0": Format(512, 32, linear_q8_0, _gather("q8_0", element_q8_0), True),
    "q4_0": Format(256, 32, linear_q4_0, _gather("q4_0", element_q4_0), True),
    "q4_1": Format(256, 64, linear_q4_1, _gather("q4_1", element_q4_1), True),
}
PACKERS = {  # (kind of source, format) -> kernel
    (kind, name): _pack(
        f"pack_{kind}_{name}", *read, write, FORMATS[name].panel_bytes, FORMATS[name].scale_bytes
    )
    for kind, read in _READ.items()
    for name, write in _WRITE.items()
} | {
    ("q8_0", "q8_0"): _repack(
        "repack_q8_0", 34, 2, -2139062144, 512, 32
    ),  # 0x80808080: signed bytes to q + 128
    ("q4_0", "q4_0"): _repack("repack_q4_0", 18, 2, 0, 256, 32),
    ("q4_1", "q4_1"): _repack("repack_q4_1", 20, 4, 0, 256, 64),
}
