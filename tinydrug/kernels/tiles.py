"""Instructions on tiles: r vectors in r registers, row r of an operand at p + r * step."""

import functools
import struct

import numpy as np
from llvmlite import ir
from llvmlite.binding import llvm_version_info

from tinydrug.kernels import emit
from tinydrug.kernels.emit import i8, i16, i32, i64
from tinydrug.kernels.isa import ISA
from tinydrug.kernels.jit import inline
from tinydrug.kernels.kinds import ELEMENTS, LANES, B, F, I, Tile, address, f32, op, s32, void


def _zeros(r):
    @op(Tile(F, r)())
    def zeros(b):
        return ir.Constant(Tile(F, r).llvm, None)

    return zeros


TILES = {r: _zeros(r) for r in (1, *range(2, 17, 2))}  # a tile of zeros; its type carries r through kernels
tile1, tile2, tile4, tile8, tile16 = (TILES[r] for r in (1, 2, 4, 8, 16))


def by_rows(body, most):
    """An inline function (r, *args): body(tile of r rows of zeros, *args), r even and at most this."""
    if most == 0:
        return inline(lambda r, *args: None)
    zeros, fewer = TILES[most], by_rows(body, most - 2)

    @inline
    def choose(r, *args):
        if r == most:
            body(zeros(), *args)
        else:
            fewer(r, *args)

    return choose


def _fma(b, x, y, z):
    return emit.call(b, "llvm.fma.v16f32", x.type, [x, y, z])


def _number(b, p, step, r, kind=ELEMENTS["f32"]):
    """The number of row r, in every lane."""
    return emit.splat(b, emit.load(b, emit.row_address(b, p, step, r), kind, 4))


def _rowwise(b, t, make):
    """The tile whose row r is make(r, row r of t)."""
    rows = [make(r, b.extract_value(t, r)) for r in range(t.type.count)]
    out = ir.Constant(ir.ArrayType(rows[0].type, len(rows)), ir.Undefined)
    for r, row in enumerate(rows):
        out = b.insert_value(out, row, r)
    return out


@op(lambda t: address(t))
def tile_rows(b, t):
    return i64(t.type.count)


@op(lambda t, *a: t(t, address, address))
def tile_load(b, t, p, step):
    return _rowwise(b, t, lambda r, _: emit.load(b, emit.row_address(b, p, step, r), F.llvm, 4))


@op(lambda t, *a: void(t, address, address))
def tile_store(b, t, p, step):
    for r in range(t.type.count):
        emit.store(b, emit.row_address(b, p, step, r), b.extract_value(t, r), 4)


@op(lambda t, *a: t(t, F, address, address))
def tile_fma(b, t, v, p, step):
    """t[r] += v * the float at p + r * step."""

    def row(r, acc):
        return _fma(b, v, _number(b, p, step, r), acc)

    return _rowwise(b, t, row)


def _tile_fma_panels(load):
    """t[r] += x * the panel of weights at p + r * step: a tile whose rows are panels, for one token."""

    @op(lambda t, *a: t(t, address, address, f32))
    def tile_fma_panels(b, t, p, step, x):
        def row(r, acc):
            w = load(b, emit.row_address(b, p, step, r))
            return _fma(b, w, emit.splat(b, x), acc)

        return _rowwise(b, t, row)

    return tile_fma_panels


tile_fma_panels_f32 = _tile_fma_panels(lambda b, p: emit.load(b, p, F.llvm, 4))
tile_fma_panels_f16 = _tile_fma_panels(emit.load_halves)
tile_fma_panels_bf16 = _tile_fma_panels(emit.load_bfloats)


@op(lambda t, *a: t(t, t))
def tile_add(b, t, u):
    return _rowwise(b, t, lambda r, x: b.fadd(x, b.extract_value(u, r)))


@op(lambda t, *a: t(t, t))
def tile_add_ints(b, t, u):
    return _rowwise(b, t, lambda r, x: b.add(x, b.extract_value(u, r)))


@op(lambda t, *a: t(t, F))
def tile_add_vec(b, t, v):
    return _rowwise(b, t, lambda r, x: b.fadd(x, v))


@op(lambda t, *a: Tile(I, t.r)(t, address, address, s32))
def tile_splat_ints(b, t, p, step, shift):
    """Integer rows: the int at p + r * step, shifted left, in every lane."""
    return _rowwise(
        b, t, lambda r, _: emit.splat(b, b.shl(emit.load(b, emit.row_address(b, p, step, r), i32, 4), shift))
    )


@op(lambda t, *a: Tile(I, t.r)(t))
def tile_ints(b, t):
    return _rowwise(b, t, lambda r, _: emit.constant(I, 0))


@op(lambda t: Tile(F, t.r)(t))
def tile_as_floats(b, t):
    return _rowwise(b, t, lambda r, x: b.sitofp(x, F.llvm))


@op(lambda t: t(t))
def tile_hadamard(b, t):
    """The floats of a tile one after the other, in runs as long as a power of two divides them (a multiple of
    16), times the symmetric Hadamard matrix that keeps lengths."""
    rows = [b.extract_value(t, r) for r in range(t.type.count)]
    for n in (1, 2, 4, 8):
        swap = ir.Constant(ir.VectorType(i32, LANES), [k ^ n for k in range(LANES)])
        sign = ir.Constant(F.llvm, [-1.0 if k & n else 1.0 for k in range(LANES)])
        rows = [_fma(b, x, sign, b.shuffle_vector(x, x, swap)) for x in rows]
    n = 1
    while len(rows) % (2 * n) == 0:
        pairs = [(x, rows[r ^ n]) for r, x in enumerate(rows)]
        rows = [b.fsub(y, x) if r & n else b.fadd(x, y) for r, (x, y) in enumerate(pairs)]
        n *= 2
    root = emit.constant(F, float(np.float32((LANES * n) ** -0.5)))
    return _rowwise(b, t, lambda r, _: b.fmul(rows[r], root))


@op(lambda t: f32(t))
def tile_highest_magnitude(b, t):
    """The greatest absolute value of a tile; NaN if there is one: as integers, NaN are above infinity."""
    top = emit.constant(I, 0)
    for r in range(t.type.count):
        top = emit.higher(
            b, top, b.and_(b.bitcast(b.extract_value(t, r), I.llvm), emit.constant(I, 0x7FFFFFFF))
        )
    return b.bitcast(emit.reduce(b, top, lambda p, q: emit.higher(b, p, q)), ELEMENTS["f32"])


WHOLE = 3 << 22  # floats from here to 4/3 of it lie 1 apart, and so do their bits
WHOLE_BITS = struct.unpack("i", struct.pack("f", WHOLE))[0]


@op(lambda t, *a: Tile(I, t.r)(t, f32))
def tile_round(b, t, x):
    """t * x, less than 2^22, as the nearest integers, ties to even."""

    def row(r, v):
        nearest = b.fadd(b.fmul(v, emit.splat(b, x)), emit.constant(F, float(WHOLE)))
        return b.sub(b.bitcast(nearest, I.llvm), emit.constant(I, WHOLE_BITS))

    return _rowwise(b, t, row)


@op(lambda t, p: void(t, address))
def tile_store_low_bytes(b, t, p):
    """Integers -> 16 bytes a row, one row after the other."""
    for r in range(t.type.count):
        few = b.trunc(b.extract_value(t, r), ir.VectorType(i8, LANES))
        emit.store(b, b.add(p, i64(LANES * r)), few, 1)


@op(lambda t: I(t))
def tile_sum_alternate(b, t):
    """Lanes 0 and 8: the sums of the integers in even rows and in odd ones."""
    rows, n = [b.extract_value(t, r) for r in range(t.type.count)], LANES // 2
    x, y = (functools.reduce(b.add, rows[first::2]) for first in (0, 1))
    halves = [[*range(o, o + n), *range(LANES + o, LANES + o + n)] for o in (0, n)]
    total = b.add(*(b.shuffle_vector(x, y, ir.Constant(ir.VectorType(i32, LANES), pick)) for pick in halves))
    while n > 1:
        n //= 2
        pick = ir.Constant(ir.VectorType(i32, LANES), [(k + n) % LANES for k in range(LANES)])
        total = b.add(total, b.shuffle_vector(total, total, pick))
    return total


def _dot4_vnni(b, acc, w, x):
    if llvm_version_info[0] < 22:  # which wanted bytes as words
        w, x = b.bitcast(w, I.llvm), b.bitcast(x, I.llvm)
    return emit.call(b, "llvm.x86.avx512.vpdpbusd.512", acc.type, [acc, w, x])


def _dot4_avx2(b, acc, w, x):
    """Even and odd bytes as 16-bit pairs through vpmaddwd: exact, unlike vpmaddubsw, which saturates."""
    wide = ir.VectorType(i16, 2 * LANES)
    eight = ir.Constant(wide, [8] * 2 * LANES)
    w, x = b.bitcast(w, wide), b.bitcast(x, wide)
    w_even, w_odd = b.and_(w, ir.Constant(wide, [255] * 2 * LANES)), b.lshr(w, eight)
    x_even, x_odd = b.ashr(b.shl(x, eight), eight), b.ashr(x, eight)
    half = ir.VectorType(i32, 8)

    def madd(p, q):
        parts = []
        for o in (0, LANES):
            pick = ir.Constant(ir.VectorType(i32, LANES), list(range(o, o + LANES)))
            p_half, q_half = (b.shuffle_vector(v, ir.Constant(wide, ir.Undefined), pick) for v in (p, q))
            parts.append(emit.call(b, "llvm.x86.avx2.pmadd.wd", half, [p_half, q_half]))
        return b.shuffle_vector(*parts, ir.Constant(ir.VectorType(i32, LANES), list(range(LANES))))

    return b.add(acc, b.add(madd(w_even, x_even), madd(w_odd, x_odd)))


def _dot4_portable(b, acc, w, x):
    """Four 32-bit multiplications a lane, in plain LLVM: any machine."""
    w, x = b.bitcast(w, I.llvm), b.bitcast(x, I.llvm)
    for byte in range(4):
        w_byte = b.and_(b.lshr(w, emit.constant(I, 8 * byte)), emit.constant(I, 255))
        x_byte = b.ashr(b.shl(x, emit.constant(I, 24 - 8 * byte)), emit.constant(I, 24))
        acc = b.add(acc, b.mul(w_byte, x_byte))
    return acc


_DOT4 = {"amx": _dot4_vnni, "avx512vnni": _dot4_vnni, "avx2": _dot4_avx2, "portable": _dot4_portable}[ISA]


@op(lambda t, *a: t(t, B, address, address))
def tile_dot4(b, t, w, p, step):
    """t[r] += in each lane 4 unsigned bytes of w times the 4 signed bytes at p + r * step."""

    def row(r, acc):
        x = b.bitcast(emit.splat(b, emit.load(b, emit.row_address(b, p, step, r), i32, 1)), B.llvm)
        return _DOT4(b, acc, w, x)

    return _rowwise(b, t, row)


@op(lambda t, a, *rest: t(t, a, F, address, address))
def tile_scale_add(b, t, a, s, p, step):
    """t[r] += (float(a[r]) * s) * the float at p + r * step."""

    def row(r, acc):
        scaled = b.fmul(b.sitofp(b.extract_value(a, r), F.llvm), s)
        return _fma(b, scaled, _number(b, p, step, r), acc)

    return _rowwise(b, t, row)


def _scale_add_stored(by_sums):
    """The same for integers stored at a + 64 r and floats at p + 4 r; and one (t, a, s, p, v, q) that does
    t[r] += v * the float at q + 4 r after it.

    by_sums: while tiles are in use, a core has one port for products and conversions of floats, but two for
    sums of integers. Such a sum makes a number n below 2^22 the float WHOLE + n, and an fma makes that n * s,
    rounded once, since WHOLE * s is exact: a scale has few bits."""

    def every_row(b, t, a, s, p, finish):
        without = b.fmul(s, emit.constant(F, float(-WHOLE)))

        def row(r, acc):
            integers = emit.load(b, emit.row_address(b, a, i64(64), r), I.llvm, 4)
            if by_sums:
                above = b.bitcast(b.add(integers, emit.constant(I, WHOLE_BITS)), F.llvm)
                scaled = _fma(b, above, s, without)
            else:
                scaled = b.fmul(b.sitofp(integers, F.llvm), s)
            acc = finish(r, _fma(b, scaled, _number(b, p, i64(4), r), acc))
            # A row is done before the next begins, or the compiler loads all first and runs out of registers.
            return b.asm(ir.FunctionType(acc.type, [acc.type]), "", "=v,0,~{memory}", [acc], True)

        return _rowwise(b, t, row)

    @op(lambda t, *a: t(t, address, F, address))
    def tile_scale_add_stored(b, t, a, s, p):
        return every_row(b, t, a, s, p, lambda r, acc: acc)

    @op(lambda t, *a: t(t, address, F, address, F, address))
    def tile_scale_add_stored_fma(b, t, a, s, p, v, q):
        return every_row(b, t, a, s, p, lambda r, acc: _fma(b, v, _number(b, q, i64(4), r), acc))

    return tile_scale_add_stored, tile_scale_add_stored_fma


SCALE_ADD_STORED = {by_sums: _scale_add_stored(by_sums) for by_sums in (False, True)}
