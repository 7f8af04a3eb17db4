"""Weights from the rows of a checkpoint to panels: converting, quantising, padding and permuting in one pass.

A panel is packed from 16 source rows. Rows come through a map (-1: a row of zeros), columns in groups of
`group` that are moved apart to `padded_group`: that is how heads are padded, and rotary rows put in order,
at no extra pass.
"""

from typing import NamedTuple

import numpy as np

from tinydrug.kernels.blocks import BLOCKS, load_scale
from tinydrug.kernels.hadamard import spread
from tinydrug.kernels.jit import Kernel, inline, kernel
from tinydrug.kernels.kinds import int64, void
from tinydrug.kernels.linear import LINEAR
from tinydrug.kernels.lookups import between
from tinydrug.kernels.planes import LEVELS, SHRINKS
from tinydrug.kernels.structs import Struct
from tinydrug.kernels.tables import GATHER
from tinydrug.kernels.vectors import (
    absolute,
    floats,
    fma,
    get_byte,
    get_lane,
    higher,
    higher_magnitude,
    highest_magnitude,
    ints,
    load,
    load_bf16,
    load_bfloats,
    load_f16,
    load_f32,
    load_halves,
    load_i32,
    maximum,
    round_even,
    select,
    shift_left,
    store,
    store_bf16,
    store_f16,
    store_f32,
    store_halves,
    store_i32,
    store_ints,
    store_low_bytes,
    store_u16,
    to_ints,
    transpose,
)

f4, i4, i8 = np.float32, np.int32, np.int64
SHRINKS = tuple(map(f4, SHRINKS))
OVER = 1.1  # how far beyond a table's last level a value may be, for that table to be tried
ENDS = tuple(map(f4, (-127, 113, -137, 121)))  # what the largest value of a group is tried as
EDGES = tuple((low + high) / 2 for low, high in zip(LEVELS[:-1], LEVELS[1:], strict=True))

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
PACK = void(SOURCE, *[int64] * 3)  # source, first panel, last panel, scratch


def scratch_bytes(k: int) -> int:
    """Memory for packing k padded columns, beside source and panels: a row, 16 rows, a group of those."""
    return 64 + 4 * k + 64 * k + 64 * 128


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


def _write_bytes(group):
    @inline
    def write(row, r, k, data, scales, scratch):
        """absmax / 127, as ggml's q8_0."""
        for first in range(0, k, group):
            last, highest = min(first + group, k), ints(i4(0))
            for c in range(first, last, 16):
                highest = higher_magnitude(highest, load(row + 4 * c))
            top = highest_magnitude(highest)
            inverse = f4(127.0) / top if top > f4(0.0) else f4(0.0)
            at = scales + 32 * (first // group) + 2 * r
            store_f16(at, top / f4(127.0))
            store_u16(at, load_scale(at))
            for c in range(first, last, 16):
                store_low_bytes(scratch, to_ints(round_even(load(row + 4 * c) * inverse)) + i4(128))
                for quad in range(4):
                    store_i32(data + 16 * c + 64 * quad + 4 * r, load_i32(scratch + 4 * quad))

    return write


nearest_levels, nearest_numbers = between(EDGES, LEVELS), between(EDGES, range(16))  # in units of a scale


@inline
def shrink_of(table):
    """Lanes that number tables -> how much smaller those are, and one over that."""
    shrink, inverse = floats(SHRINKS[0]), floats(f4(1.0) / SHRINKS[0])
    for t in range(1, 4):
        here = table >= f4(t)
        shrink = select(here, floats(SHRINKS[t]), shrink)
        inverse = select(here, floats(f4(1.0) / SHRINKS[t]), inverse)
    return shrink, inverse


@inline
def try_table(columns, inverse, table):
    """8 columns, times inverse in units of a scale -> sums over the nearest levels q of the values v: of the
    squares of errors, of qv and of qq. A lane is a row."""
    shrink, larger = shrink_of(table)
    errors, along, square = floats(f4(0.0)), floats(f4(0.0)), floats(f4(0.0))
    for c in range(8):
        v = load(columns + 64 * c)
        q = round_even(nearest_levels(v * inverse * larger) * shrink)
        error = q - v * inverse
        errors, along, square = fma(error, error, errors), fma(q, v, along), fma(q, q, square)
    return errors, along, square


@inline
def smallest_table(columns, inverse):
    """The number of the smallest table that reaches about as far as 8 columns do. A lane is a row."""
    reach, table = floats(f4(0.0)), floats(f4(0.0))
    for c in range(8):
        x = load(columns + 64 * c) * inverse
        reach = higher(higher(x * f4(1 / LEVELS[15]), x * f4(1 / LEVELS[0])), reach)
    for t in range(1, 4):
        table = select(floats(SHRINKS[t] * f4(OVER)) >= reach, floats(f4(t)), table)
    return table


@inline
def best_table(columns, inverse):
    """The smallest table, or one of the two before it that leaves 8 columns less error."""
    best = table = smallest_table(columns, inverse)
    least, _, _ = try_table(columns, inverse, best)
    for _ in range(2):
        table = higher(table - f4(1.0), floats(f4(0.0)))
        error, _, _ = try_table(columns, inverse, table)
        best, least = select(error < least, table, best), select(error < least, error, least)
    return best


@inline
def write_q4_128(row, r, k, data, scales, scratch):
    """Rows are collected, [16][k]; the last one has all of them quantised together.

    The value of largest magnitude is tried as the least level and the largest, and a bit beyond each:
    whichever leads to levels q of the values v with the least squares of errors, the scale being qv / qq."""
    rows = row + 4 * k
    columns = rows + 64 * k  # of a group: [128][16]
    for c in range(0, k, 16):
        store(rows + 4 * (k * r + c), load(row + 4 * c))
    if r < 15:
        return
    for g in range((k + 127) // 128):
        width, at = min(128, k - 128 * g), scales + 96 * g
        for c in range(0, width, 16):
            transpose(rows + 4 * (128 * g + c), 4 * k, columns + 64 * c)
        high, low = load(columns), load(columns) * f4(-1.0)
        for c in range(1, width):
            v = load(columns + 64 * c)
            high, low = maximum(high, v), maximum(low, v * f4(-1.0))
        top = select(high > low, high, low * f4(-1.0))
        scale, best = top * f4(0.0), floats(f4(0.0))
        for end in ENDS:
            inverse = select(absolute(top) > f4(0.0), floats(end) / top, floats(f4(0.0)))
            along, square = floats(f4(0.0)), floats(f4(0.0))
            for c in range(0, width, 8):
                table = smallest_table(columns + 64 * c, inverse)
                _, more, squares = try_table(columns + 64 * c, inverse, table)
                along, square = along + more, square + squares
            better = along * along > best * square
            scale = select(better, along / square, scale)
            best = select(better, along * along / square, best)
        store_halves(at, scale)
        for i in range(16):
            store_u16(at + 2 * i, load_scale(at + 2 * i))
        scale = load_halves(at)
        inverse = select(absolute(scale) > f4(0.0), floats(f4(1.0)) / scale, floats(f4(0.0)))
        for b in range(width // 32):
            first, key = columns + 64 * 32 * b, ints(i4(0))
            for half in range(2):  # columns 8 half .. 8 half + 7, and those 16 further
                at_low = first + 64 * 8 * half
                table, other = best_table(at_low, inverse), best_table(at_low + 64 * 16, inverse)
                key = key | shift_left(to_ints(table), i4(4 + 2 * half))
                key = key | shift_left(to_ints(other), i4(2 * half))
                unit, other_unit = inverse * shrink_of(table)[1], inverse * shrink_of(other)[1]
                for c in range(2):
                    quad = ints(i4(0))
                    for i in range(4):
                        v = at_low + 64 * (4 * c + i)
                        number = to_ints(nearest_numbers(load(v) * unit))
                        other_number = to_ints(nearest_numbers(load(v + 64 * 16) * other_unit))
                        quad = quad | shift_left(number | shift_left(other_number, i4(4)), i4(8 * i))
                    store_ints(data + 256 * (4 * g + b) + 64 * (2 * half + c), quad)
            store_low_bytes(at + 32 + 16 * b, key)


# --- packers ------------------------------------------------------------------------------------------------
def _pack(name, read, load_many, element, write, format_):
    """The kernel that packs panels through floats. load_many reads 16 neighbours of `element` bytes."""

    panel_bytes, scale_bytes, group = format_.panel_bytes, format_.scale_bytes, format_.group or 32
    is_spread = format_.spread

    @kernel(PACK, name)
    def pack(source, lo, hi, scratch):
        k, row = source.padded_k, scratch + 64
        plain = source.column_stride == element and source.group == source.padded_group
        for p in range(lo, hi):
            data = source.data_out + p * (k // 32) * panel_bytes
            scales = source.scales_out + p * ((k + group - 1) // group) * scale_bytes
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
                if is_spread:
                    spread(k, row)
                write(row, r, k, data, scales, scratch)

    return pack


def _repack(name, blocks):
    """The kernel that keeps a file's own blocks: bits are moved, none is computed."""
    copy_integers, copy_scales = blocks.copy_integers, blocks.copy_scales
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
                    copy_integers(row, b, r, source.data_out + (p * n + b) * block_bytes)
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
    block_bytes, scale_bytes, group = blocks.planes.nbytes, blocks.scale_bytes, blocks.group
    keys, is_spread = blocks.keys, blocks.spread
    if minimum is None:

        @inline
        def minimum(s, b):
            return floats(f4(0.0))

    @kernel(GATHER, f"gather_{name}")
    def gather(weight, index, out):
        p, r, n = index // 16, index % 16, weight.k // 32
        s = weight.scales + p * ((weight.k + group - 1) // group) * scale_bytes
        for b in range(n):
            w, to, g = weight.data + (p * n + b) * block_bytes, out + 128 * b, 32 * b // group
            first, other, least = (
                get_lane(scale(s, g), r),
                get_lane(second(s, g), r),
                get_lane(minimum(s, g), r),
            )
            key, key_8, key_16, key_24 = keys(s, g, b % (group // 32))
            for c in range(4):
                quad = low(w, c, key if c < 2 else key_8)
                next_quad = high(w, c, key_16 if c < 2 else key_24)
                for i in range(4):
                    q, next_q = get_byte(quad, 4 * r + i), get_byte(next_quad, 4 * r + i)
                    store_f32(to + 16 * c + 4 * i, first * f4(q - offset) + least)
                    store_f32(to + 64 + 16 * c + 4 * i, other * f4(next_q - offset) + least)
        if is_spread:
            spread(weight.k, out)

    return gather


# --- the registry: kinds of tensors a file may hold, and formats a panel may have ---------------------------
class Format(NamedTuple):
    """How weights lie in memory, and what the kernel wants of activations."""

    panel_bytes: int  # of 32 columns of a panel
    scale_bytes: int  # of a group of a panel
    group: int  # columns that share scales; activations come as int8 in such groups. 0: as floats
    spread: bool  # before they are rounded
    linear: Kernel
    gather: Kernel


_READ = {  # kind of source -> element reader, vector reader, bytes of an element
    "f32": (read_f32, load, 4),
    "f16": (read_f16, load_halves, 2),
    "bf16": (read_bf16, load_bfloats, 2),
}
_WRITE = {
    "f32": _write_floats(store_f32, 4),
    "f16": _write_floats(store_f16, 2),
    "bf16": _write_floats(store_bf16, 2),
    "q8_0": _write_bytes(32),
    "q8_256": _write_bytes(256),
    "q4_128": write_q4_128,
}
FORMATS = {
    name: Format(512 * element, 0, 0, False, LINEAR[name], _gather(name, load_one, element))
    for name, load_one, element in (("f32", load_f32, 4), ("f16", load_f16, 2), ("bf16", load_bf16, 2))
} | {
    name: Format(
        blocks.planes.nbytes,
        blocks.scale_bytes,
        blocks.group,
        blocks.spread,
        LINEAR[name],
        _gather_blocks(name, blocks),
    )
    for name, blocks in BLOCKS.items()
}
PACKERS = {  # (kind of source, format) -> kernel
    (kind, name): _pack(f"pack_{kind}_{name}", *read, write, FORMATS[name])
    for kind, read in _READ.items()
    for name, write in _WRITE.items()
} | {
    (name, name): _repack(f"repack_{name}", blocks) for name, blocks in BLOCKS.items() if blocks.copy_integers
}
