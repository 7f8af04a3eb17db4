"""LLVM vectors and register tiles as Numba values, so that a kernel says exactly which registers it uses.

    Vec(elt, n)    one LLVM <n x elt> in a register
    Tile(vec, r)   r such vectors, LLVM [r x <n x elt>]; LLVM takes it apart into r registers, so a kernel
    written for
                   a tile is compiled once per r and needs no generated source

Memory is named by absolute byte addresses (int64). Every load and store states its alignment: LLVM's
default for a vector is its full size (64), and an address that is not a multiple of it would fault.
"""

import functools
import inspect
import operator
import struct

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

from tinydrug.kernels.isa import ISA, WIDE_LOOKUP
from tinydrug.kernels.jit import inline

LANES = 16  # lanes of 32 bits in every vector here
ELEMENTS = {
    "f32": ir.FloatType(),
    "f16": ir.HalfType(),
    **{f"i{bits}": ir.IntType(bits) for bits in (64, 32, 16, 8, 1)},
}
i8, i16, i32, i64 = (ELEMENTS[f"i{bits}"] for bits in (8, 16, 32, 64))


class Vec(types.Type):
    """n lanes of one element type."""

    def __init__(self, elt, n):
        self.elt, self.n = elt, n
        super().__init__(f"Vec({elt} x {n})")


class Tile(types.Type):
    """r vectors of one type: the accumulators of r tokens."""

    def __init__(self, vec, r):
        self.vec, self.r = vec, r
        super().__init__(f"Tile({vec.name} x {r})")


def _llvm(t):
    if isinstance(t, Tile):
        return ir.ArrayType(_llvm(t.vec), t.r)
    return ir.VectorType(ELEMENTS[t.elt], t.n)


@register_model(Vec)
@register_model(Tile)
class _RegisterModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _llvm(fe_type))


F, I, M = Vec("f32", LANES), Vec("i32", LANES), Vec("i1", LANES)  # noqa: E741 - floats, ints, mask
B = Vec("i8", 4 * LANES)  # bytes: four a lane
address, f32, s32, void = types.int64, types.float32, types.int32, types.void


def op(sig):
    """Decorate emit(builder, *llvm values) -> llvm value into an intrinsic.

    sig is a signature, or a function of the argument types that gives one (for tiles, whose r is open)."""

    def wrap(emit):
        names = ["typing_context", *list(inspect.signature(emit).parameters)[1:]]

        def typer(typing_context, *args):
            s = sig(*args) if inspect.isfunction(sig) else sig

            def codegen(context, builder, _, values):
                out = emit(builder, *values)
                return context.get_dummy_value() if s.return_type == void else out

            return s, codegen

        named = inspect.Parameter.POSITIONAL_OR_KEYWORD
        typer.__signature__ = inspect.Signature([inspect.Parameter(name, named) for name in names])
        typer.__name__ = emit.__name__
        return intrinsic(typer)

    return wrap


def _load(b, p, llvm_type, align):
    value = b.load(b.inttoptr(p, llvm_type.as_pointer()))
    value.align = align
    return value


def _store(b, p, value, align):
    b.store(value, b.inttoptr(p, value.type.as_pointer())).align = align


def _splat(b, x, n=LANES):
    empty = ir.Constant(ir.VectorType(x.type, n), ir.Undefined)
    return b.shuffle_vector(
        b.insert_element(empty, x, i32(0)), empty, ir.Constant(ir.VectorType(i32, n), [0] * n)
    )


def _const(vec, x):
    return ir.Constant(_llvm(vec), [x] * vec.n)


def _call(b, name, ret, args):
    fn = b.module.globals.get(name) or ir.Function(
        b.module, ir.FunctionType(ret, [a.type for a in args]), name
    )
    return b.call(fn, args)


# --- scalars at addresses -----------------------------------------------------------------------------------
@op(f32(address))
def load_f32(b, p):
    return _load(b, p, ELEMENTS["f32"], 4)


@op(void(address, f32))
def store_f32(b, p, x):
    _store(b, p, x, 4)


@op(f32(address))
def load_f16(b, p):
    return b.fpext(_load(b, p, ELEMENTS["f16"], 2), ELEMENTS["f32"])


@op(void(address, f32))
def store_f16(b, p, x):
    _store(b, p, b.fptrunc(x, ELEMENTS["f16"]), 2)


@op(f32(address))
def load_bf16(b, p):
    return b.bitcast(b.shl(b.zext(_load(b, p, i16, 2), i32), i32(16)), ELEMENTS["f32"])


@op(void(address, f32))
def store_bf16(b, p, x):
    """Truncated: exact for floats that came from bf16, and only used for those."""
    _store(b, p, b.trunc(b.lshr(b.bitcast(x, i32), i32(16)), i16), 2)


@op(void(address, types.float64))
def add_f64(b, p, x):
    """Add to the double at p (not atomic)."""
    b.store(b.fadd(_load(b, p, ir.DoubleType(), 8), x), b.inttoptr(p, ir.DoubleType().as_pointer()))


@op(s32(address))
def load_i32(b, p):
    return _load(b, p, i32, 1)


@op(void(address, s32))
def store_i32(b, p, x):
    _store(b, p, x, 1)


@op(types.int64(address))
def load_u16(b, p):
    return b.zext(_load(b, p, i16, 2), i64)


@op(void(address, types.int64))
def store_u16(b, p, x):
    _store(b, p, b.trunc(x, i16), 2)


@op(types.int64(address))
def load_u8(b, p):
    return b.zext(_load(b, p, i8, 1), i64)


@op(void(address, types.int64))
def store_u8(b, p, x):
    _store(b, p, b.trunc(x, i8), 1)


# --- vectors: loads and stores ------------------------------------------------------------------------------
@op(F(address))
def load(b, p):
    return _load(b, p, _llvm(F), 4)


@op(void(address, F))
def store(b, p, x):
    _store(b, p, x, 4)


@op(I(address))
def load_ints(b, p):
    return _load(b, p, _llvm(I), 4)


@op(void(address, I))
def store_ints(b, p, x):
    _store(b, p, x, 4)


@op(B(address))
def load_bytes(b, p):
    return _load(b, p, _llvm(B), 1)


@op(B())
def no_bytes(b):
    return _const(B, 0)


@op(void(address, I))
def store_low_bytes(b, p, x):
    _store(b, p, b.trunc(x, ir.VectorType(i8, LANES)), 1)


@op(void(address, B))
def store_bytes(b, p, x):
    _store(b, p, x, 1)


def _load_halves(b, p):
    return b.fpext(_load(b, p, ir.VectorType(ELEMENTS["f16"], LANES), 2), _llvm(F))


@op(F(address))
def load_halves(b, p):
    return _load_halves(b, p)


@op(void(address, F))
def store_halves(b, p, x):
    _store(b, p, b.fptrunc(x, ir.VectorType(ELEMENTS["f16"], LANES)), 2)


def _load_bfloats(b, p):
    wide = b.zext(_load(b, p, ir.VectorType(i16, LANES), 2), _llvm(I))
    return b.bitcast(b.shl(wide, _const(I, 16)), _llvm(F))


@op(F(address))
def load_bfloats(b, p):
    return _load_bfloats(b, p)


@op(F(address))
def load_unsigned_bytes(b, p):
    """16 bytes 0 .. 255 as floats."""
    return b.uitofp(_load(b, p, ir.VectorType(i8, LANES), 1), _llvm(F))


@op(F(address))
def load_signed_bytes(b, p):
    """16 bytes -128 .. 127 as floats."""
    return b.sitofp(_load(b, p, ir.VectorType(i8, LANES), 1), _llvm(F))


@op(void(address))
def prefetch(b, p):
    """Ask for the cache line at p, for the second level of cache: it need not exist."""
    pointer = i8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
    fn = b.module.globals.get("llvm.prefetch.p0") or ir.Function(b.module, kind, "llvm.prefetch.p0")
    b.call(fn, [b.inttoptr(p, pointer), i32(0), i32(2), i32(1)])


# --- vectors: making and converting -------------------------------------------------------------------------
@op(F(f32))
def floats(b, x):
    return _splat(b, x)


@op(I(s32))
def ints(b, x):
    return _splat(b, x)


@op(I())
def lane(b):
    return ir.Constant(_llvm(I), list(range(LANES)))


@op(f32(F, address))
def get_lane(b, x, k):
    return b.extract_element(x, k)


@op(address(B, address))
def get_byte(b, x, k):
    return b.zext(b.extract_element(x, k), i64)


@op(F(F, address, f32))
def set_lane(b, x, k, value):
    return b.insert_element(x, value, k)


@op(F(I))
def to_floats(b, x):
    return b.sitofp(x, _llvm(F))


@op(I(F))
def to_ints(b, x):
    return b.fptosi(x, _llvm(I))


@op(F(I))
def as_floats(b, x):
    return b.bitcast(x, _llvm(F))


@op(I(F))
def as_ints(b, x):
    return b.bitcast(x, _llvm(I))


# --- vectors: arithmetic ------------------------------------------------------------------------------------
@op(F(F, F, F))
def fma(b, x, y, z):
    return _call(b, "llvm.fma.v16f32", x.type, [x, y, z])


@op(F(F))
def sqrt(b, x):
    return _call(b, "llvm.sqrt.v16f32", x.type, [x])


@op(F(F))
def absolute(b, x):
    return _call(b, "llvm.fabs.v16f32", x.type, [x])


@op(F(F))
def round_even(b, x):
    return _call(b, "llvm.roundeven.v16f32", x.type, [x])


def _maximum(b, x, y):
    """Compare and select, then NaN of x: LLVM's maxnum would swallow NaN."""
    return b.select(b.fcmp_unordered("uno", x, x), x, b.select(b.fcmp_ordered(">", x, y), x, y))


@op(F(F, F))
def maximum(b, x, y):
    """The greater of each pair; NaN if either is."""
    return _maximum(b, x, y)


@op(F(F, F))
def higher(b, x, y):
    """The greater of each pair in one instruction; y where either is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@op(F(F, F))
def minimum(b, x, y):
    """The lesser of each pair; y where x is NaN."""
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@op(F(M, F, F))
def select(b, m, x, y):
    return b.select(m, x, y)


@op(M(M, M))
def both(b, x, y):
    return b.and_(x, y)


@op(I(I, s32))
def shift_left(b, x, n):
    return b.shl(x, _splat(b, n))


@op(I(I, s32))
def shift_right(b, x, n):
    return b.lshr(x, _splat(b, n))


@op(I(I, I))
def shift_left_each(b, x, n):
    """Every lane by its own count, 0 to 31."""
    return b.shl(x, n)


@op(B(B, s32))
def subtract_bytes(b, x, n):
    return b.sub(x, _splat(b, b.trunc(n, i8), 4 * LANES))


@op(B(B, B))
def either(b, x, y):
    return b.or_(x, y)


def _nibbles_under(b, x, upper):
    low = _const(B, 15)
    if ISA in ("amx", "avx512vnni"):  # LLVM would spend two instructions
        words = [b.bitcast(v, _llvm(I)) for v in (low, x, upper)]
        return b.bitcast(
            _call(b, "llvm.x86.avx512.pternlog.d.512", words[0].type, [*words, i32(0xCA)]), x.type
        )
    return b.or_(b.and_(x, low), b.and_(upper, _const(B, 0xF0)))


@op(B(B, B))
def low_nibbles_under(b, x, upper):
    """The low nibbles of x and the high ones of `upper`."""
    return _nibbles_under(b, x, upper)


@op(B(B, B))
def high_nibbles_under(b, x, upper):
    """The high nibbles of x, as low ones, and the high ones of `upper`."""
    down = b.bitcast(b.lshr(b.bitcast(x, _llvm(I)), _const(I, 4)), _llvm(B))
    return _nibbles_under(b, down, upper)


@op(B(address))
def load_byte_a_lane(b, p):
    """16 bytes, each in all four bytes of its lane."""
    few = _load(b, p, ir.VectorType(i8, LANES), 1)
    pick = ir.Constant(ir.VectorType(i32, 4 * LANES), [k // 4 for k in range(4 * LANES)])
    return b.shuffle_vector(few, ir.Constant(few.type, ir.Undefined), pick)


@op(B(B))
def next_pair(b, x):
    """The two bits above, of bytes that are the same in all of a lane: every lane turned right by two."""
    words = b.bitcast(x, _llvm(I))
    return b.bitcast(b.or_(b.lshr(words, _const(I, 2)), b.shl(words, _const(I, 30))), _llvm(B))


@op(B(B, address, address, s32))
def bits_to(b, x, low, place, mask):
    """Of every byte, the bits `mask` (at bit 0) found at bit `low`, moved to bit `place`."""
    words, up = b.bitcast(x, _llvm(I)), b.icmp_signed(">=", place, low)
    left = b.shl(words, _splat(b, b.trunc(b.select(up, b.sub(place, low), i64(0)), i32)))
    right = b.lshr(left, _splat(b, b.trunc(b.select(up, i64(0), b.sub(low, place)), i32)))
    keep = _splat(b, b.trunc(b.shl(mask, b.trunc(place, i32)), i8), 4 * LANES)
    return b.and_(b.bitcast(right, _llvm(B)), keep)


@op(B(B))
def low_nibbles(b, x):
    return b.and_(x, _const(B, 15))


@op(B(B))
def high_nibbles(b, x):
    return b.and_(b.bitcast(b.lshr(b.bitcast(x, _llvm(I)), _const(I, 4)), _llvm(B)), _const(B, 15))


def _lookup_avx512(b, x, table):
    return _call(b, "llvm.x86.avx512.pshuf.b.512", x.type, [ir.Constant(x.type, 4 * table), x])


def _lookup_avx2(b, x, table):
    half, parts = ir.VectorType(i8, 2 * LANES), []
    for o in (0, 2 * LANES):
        pick = ir.Constant(ir.VectorType(i32, 2 * LANES), list(range(o, o + 2 * LANES)))
        part = b.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), pick)
        parts.append(_call(b, "llvm.x86.avx2.pshuf.b", half, [ir.Constant(half, 2 * table), part]))
    return b.shuffle_vector(*parts, ir.Constant(ir.VectorType(i32, 4 * LANES), list(range(4 * LANES))))


def _lookup_portable(b, x, table):
    """Every bit of a number halves what is left of the table."""
    left = [_const(B, entry) for entry in table]
    for bit in range(4):
        odd = b.icmp_unsigned("!=", b.and_(x, _const(B, 1 << bit)), _const(B, 0))
        left = [b.select(odd, *pair) for pair in zip(left[1::2], left[::2], strict=True)]
    return left[0]


_LOOKUP = {
    "amx": _lookup_avx512,
    "avx512vnni": _lookup_avx512,
    "avx2": _lookup_avx2,
    "portable": _lookup_portable,
}[ISA]


def lookup(table):
    """The op that replaces every byte, 0 to 15, by its entry in this table of 16 bytes."""

    @op(B(B))
    def entry(b, x):
        return _LOOKUP(b, x, list(table))

    return entry


def _lookup_64_vbmi(b, x, table):
    return _call(b, "llvm.x86.avx512.permvar.qi.512", x.type, [ir.Constant(x.type, table), x])


def _lookup_64_by_16(b, x, table):
    """Where no instruction knows 64 entries: the upper bits of a number choose among four tables of 16."""
    low, upper = b.and_(x, _const(B, 15)), b.and_(x, _const(B, 48))
    found = _LOOKUP(b, low, table[:16])
    for first in (16, 32, 48):
        here = b.icmp_unsigned("==", upper, _const(B, first))
        found = b.select(here, _LOOKUP(b, low, table[first : first + 16]), found)
    return found


def lookup_64(table, emit=_lookup_64_vbmi if WIDE_LOOKUP else _lookup_64_by_16):
    """The op that replaces every byte by the entry its lower six bits number in this table of 64 bytes."""

    @op(B(B))
    def entry(b, x):
        return emit(b, x, list(table))

    return entry


def _between_avx512(b, x, edges, entries):
    """Halves what is left of the edges, four times."""

    def pick(table, at):
        padded = ir.Constant(_llvm(F), [*table, *[0.0] * (LANES - len(table))])
        return _call(b, "llvm.x86.avx512.permvar.sf.512", padded.type, [padded, at])

    found = _const(I, 0)
    for step in (8, 4, 2, 1):
        middle = b.add(found, _const(I, step - 1))
        above = b.fcmp_ordered(">", x, pick(edges, middle))
        found = b.select(above, b.add(middle, _const(I, 1)), found)
    return pick(entries, found)


def _between_portable(b, x, edges, entries):
    found = _const(F, entries[0])
    for edge, entry in zip(edges, entries[1:], strict=True):
        found = b.select(b.fcmp_ordered(">", x, _const(F, edge)), _const(F, entry), found)
    return found


def between(edges, entries, emit=_between_avx512 if ISA in ("amx", "avx512vnni") else _between_portable):
    """The op x -> of 16 entries that which stands between the same two of 15 rising edges as x does."""
    edges, entries = list(map(float, edges)), list(map(float, entries))

    @op(F(F))
    def entry(b, x):
        return emit(b, x, edges, entries)

    return entry


def _reduce(b, x, combine):
    """A fixed tree (8+8, 4+4, 2+2, 1+1): one order of summation on every machine."""
    n = x.type.count
    while n > 1:
        n //= 2
        halves = [
            b.shuffle_vector(
                x,
                ir.Constant(x.type, ir.Undefined),
                ir.Constant(ir.VectorType(i32, n), list(range(o, o + n))),
            )
            for o in (0, n)
        ]
        x = combine(*halves)
    return b.extract_element(x, i32(0))


@op(f32(F))
def sum_lanes(b, x):
    return _reduce(b, x, b.fadd)


@op(f32(F))
def max_lanes(b, x):
    """The greatest lane; NaN if any is."""
    return _reduce(b, x, lambda p, q: _maximum(b, p, q))


@op(f32(F))
def highest_lane(b, x):
    """The greatest lane of numbers: with NaN among them, any."""
    return _reduce(b, x, lambda p, q: b.select(b.fcmp_ordered(">", p, q), p, q))


@op(F(address))
def sum_each(b, p):
    """Lane r: the sum of the 16 floats at p + 64 r, added in the order of `sum_lanes`."""
    rows = [_load(b, b.add(p, i64(64 * r)), _llvm(F), 4) for r in range(LANES)]
    while len(rows) > 1:  # two vectors of m sums each become one of 2 m: the halves of each sum are added
        n = len(rows) // 2
        lower = [k // n % 2 == 0 for k in range(LANES)]  # lanes of a sum's first half go to the first vector
        kept = [k if low else LANES + k for k, low in enumerate(lower)]
        crossed = [k + n if low else LANES + k - n for k, low in enumerate(lower)]
        picks = [ir.Constant(ir.VectorType(i32, LANES), pick) for pick in (kept, crossed)]
        pairs = zip(rows[:n], rows[n:], strict=True)
        rows = [b.fadd(*(b.shuffle_vector(x, y, pick) for pick in picks)) for x, y in pairs]
    return rows[0]


@op(void(address, address, address))
def transpose(b, p, step, out):
    """16 rows of 16 floats, `step` bytes apart at p -> their columns, 64 bytes apart at out."""
    rows = [_load(b, b.add(p, b.mul(step, i64(r))), _llvm(F), 4) for r in range(LANES)]
    n = LANES // 2
    while n:  # rows r and r + n trade squares of n: the first's upper lanes for the second's lower ones
        kept = [k if k % (2 * n) < n else LANES + k - n for k in range(LANES)]
        traded = [k + n if k % (2 * n) < n else LANES + k for k in range(LANES)]
        for r in [r for r in range(LANES) if r % (2 * n) < n]:
            pair = rows[r], rows[r + n]
            for at, pick in ((r, kept), (r + n, traded)):
                rows[at] = b.shuffle_vector(*pair, ir.Constant(ir.VectorType(i32, LANES), pick))
        n //= 2
    for r, row in enumerate(rows):
        _store(b, b.add(out, i64(64 * r)), row, 4)


def _higher_int(b, p, q):
    return b.select(b.icmp_signed(">", p, q), p, q)


@op(I(I, F))
def higher_magnitude(b, top, x):
    """The greater of each absolute value and top; as integers, NaN are above infinity, so they stay."""
    return _higher_int(b, top, b.and_(b.bitcast(x, _llvm(I)), _const(I, 0x7FFFFFFF)))


@op(f32(I))
def highest_magnitude(b, top):
    """The greatest lane of `higher_magnitude`."""
    return b.bitcast(_reduce(b, top, lambda p, q: _higher_int(b, p, q)), ELEMENTS["f32"])


@op(s32(I, address))
def get_int(b, x, k):
    return b.extract_element(x, k)


class _Arithmetic(AbstractTemplate):
    """Vec op Vec, or Vec op scalar (the scalar is splatted)."""

    def generic(self, args, kws):
        if len(args) != 2 or args[0] not in (F, I):
            return None
        x, y = args
        if x == y or isinstance(y, types.Number):
            y = x if x == y else (f32 if x == F else s32)
            return signature(M if self.key in _COMPARE else x, x, y)


_FLOAT = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}
_INT = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.and_: "and_",
    operator.or_: "or_",
    operator.xor: "xor",
}
_COMPARE = {operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">="}


def _register(key):
    infer_global(key)(type("_Arithmetic", (_Arithmetic,), {"key": key}))

    def lower(context, b, sig, args):
        x, y = args
        is_float = sig.args[0] == F
        y = y if sig.args[1] == sig.args[0] else _splat(b, y)
        if key in _COMPARE:
            return (b.fcmp_ordered if is_float else b.icmp_signed)(_COMPARE[key], x, y)
        return getattr(b, (_FLOAT if is_float else _INT)[key])(x, y)

    lower_builtin(key, Vec, Vec)(lower)
    lower_builtin(key, Vec, types.Number)(lower)


for _key in {*_FLOAT, *_INT, *_COMPARE}:
    _register(_key)


# --- tiles: row r of an operand lies at p + r * step --------------------------------------------------------
def _zeros(r):
    @op(Tile(F, r)())
    def zeros(b):
        return ir.Constant(_llvm(Tile(F, r)), None)

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


def _row_address(b, p, step, r):
    return b.add(p, b.mul(step, i64(r)))


def _rowwise(b, t, emit):
    """The tile whose row r is emit(r, row r of t)."""
    rows = [emit(r, b.extract_value(t, r)) for r in range(t.type.count)]
    out = ir.Constant(ir.ArrayType(rows[0].type, len(rows)), ir.Undefined)
    for r, row in enumerate(rows):
        out = b.insert_value(out, row, r)
    return out


@op(lambda t: types.int64(t))
def tile_rows(b, t):
    return i64(t.type.count)


@op(lambda t, *a: t(t, address, address))
def tile_load(b, t, p, step):
    return _rowwise(b, t, lambda r, _: _load(b, _row_address(b, p, step, r), _llvm(F), 4))


@op(lambda t, *a: void(t, address, address))
def tile_store(b, t, p, step):
    for r in range(t.type.count):
        _store(b, _row_address(b, p, step, r), b.extract_value(t, r), 4)


@op(lambda t, *a: t(t, F, address, address))
def tile_fma(b, t, v, p, step):
    """t[r] += v * the float at p + r * step."""

    def row(r, acc):
        x = _splat(b, _load(b, _row_address(b, p, step, r), ELEMENTS["f32"], 4))
        return _call(b, "llvm.fma.v16f32", acc.type, [v, x, acc])

    return _rowwise(b, t, row)


def _tile_fma_panels(load):
    """t[r] += x * the panel of weights at p + r * step: a tile whose rows are panels, for one token."""

    @op(lambda t, *a: t(t, address, address, f32))
    def tile_fma_panels(b, t, p, step, x):
        def row(r, acc):
            w = load(b, _row_address(b, p, step, r))
            return _call(b, "llvm.fma.v16f32", acc.type, [w, _splat(b, x), acc])

        return _rowwise(b, t, row)

    return tile_fma_panels


tile_fma_panels_f32 = _tile_fma_panels(lambda b, p: _load(b, p, _llvm(F), 4))
tile_fma_panels_f16 = _tile_fma_panels(_load_halves)
tile_fma_panels_bf16 = _tile_fma_panels(_load_bfloats)


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
    return _rowwise(b, t, lambda r, _: _splat(b, b.shl(_load(b, _row_address(b, p, step, r), i32, 4), shift)))


@op(lambda t, *a: Tile(I, t.r)(t))
def tile_ints(b, t):
    return _rowwise(b, t, lambda r, _: _const(I, 0))


@op(lambda t: Tile(F, t.r)(t))
def tile_as_floats(b, t):
    return _rowwise(b, t, lambda r, x: b.sitofp(x, _llvm(F)))


@op(lambda t: t(t))
def tile_hadamard(b, t):
    """The floats of a tile one after the other, in runs as long as a power of two divides them (a multiple of
    16), times the symmetric Hadamard matrix that keeps lengths."""
    rows = [b.extract_value(t, r) for r in range(t.type.count)]
    for n in (1, 2, 4, 8):
        swap = ir.Constant(ir.VectorType(i32, LANES), [k ^ n for k in range(LANES)])
        sign = ir.Constant(_llvm(F), [-1.0 if k & n else 1.0 for k in range(LANES)])
        rows = [_call(b, "llvm.fma.v16f32", x.type, [x, sign, b.shuffle_vector(x, x, swap)]) for x in rows]
    n = 1
    while len(rows) % (2 * n) == 0:
        pairs = [(x, rows[r ^ n]) for r, x in enumerate(rows)]
        rows = [b.fsub(y, x) if r & n else b.fadd(x, y) for r, (x, y) in enumerate(pairs)]
        n *= 2
    root = _const(F, float(np.float32((LANES * n) ** -0.5)))
    return _rowwise(b, t, lambda r, _: b.fmul(rows[r], root))


@op(lambda t: f32(t))
def tile_highest_magnitude(b, t):
    """The greatest absolute value of a tile; NaN if there is one: as integers, NaN are above infinity."""
    top = _const(I, 0)
    for r in range(t.type.count):
        top = _higher_int(b, top, b.and_(b.bitcast(b.extract_value(t, r), _llvm(I)), _const(I, 0x7FFFFFFF)))
    return b.bitcast(_reduce(b, top, lambda p, q: _higher_int(b, p, q)), ELEMENTS["f32"])


@op(lambda t, *a: Tile(I, t.r)(t, f32))
def tile_round(b, t, x):
    """t * x, less than 2^22, as the nearest integers, ties to even."""
    whole = 3 << 22  # floats from here to 4/3 of it lie 1 apart, and so do their bits
    bits = struct.unpack("i", struct.pack("f", whole))[0]

    def row(r, v):
        nearest = b.fadd(b.fmul(v, _splat(b, x)), _const(F, float(whole)))
        return b.sub(b.bitcast(nearest, _llvm(I)), _const(I, bits))

    return _rowwise(b, t, row)


@op(lambda t, p: void(t, address))
def tile_store_low_bytes(b, t, p):
    """Integers -> 16 bytes a row, one row after the other."""
    for r in range(t.type.count):
        few = b.trunc(b.extract_value(t, r), ir.VectorType(i8, LANES))
        _store(b, b.add(p, i64(LANES * r)), few, 1)


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
    return _call(b, "llvm.x86.avx512.vpdpbusd.512", acc.type, [acc, w, x])


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
            parts.append(_call(b, "llvm.x86.avx2.pmadd.wd", half, [p_half, q_half]))
        return b.shuffle_vector(*parts, ir.Constant(ir.VectorType(i32, LANES), list(range(LANES))))

    return b.add(acc, b.add(madd(w_even, x_even), madd(w_odd, x_odd)))


def _dot4_portable(b, acc, w, x):
    """Four 32-bit multiplications a lane, in plain LLVM: any machine."""
    w, x = b.bitcast(w, _llvm(I)), b.bitcast(x, _llvm(I))
    for byte in range(4):
        w_byte = b.and_(b.lshr(w, _const(I, 8 * byte)), _const(I, 255))
        x_byte = b.ashr(b.shl(x, _const(I, 24 - 8 * byte)), _const(I, 24))
        acc = b.add(acc, b.mul(w_byte, x_byte))
    return acc


_DOT4 = {"amx": _dot4_vnni, "avx512vnni": _dot4_vnni, "avx2": _dot4_avx2, "portable": _dot4_portable}[ISA]


@op(lambda t, *a: t(t, B, address, address))
def tile_dot4(b, t, w, p, step):
    """t[r] += in each lane 4 unsigned bytes of w times the 4 signed bytes at p + r * step."""

    def row(r, acc):
        x = b.bitcast(_splat(b, _load(b, _row_address(b, p, step, r), i32, 1)), _llvm(B))
        return _DOT4(b, acc, w, x)

    return _rowwise(b, t, row)


@op(lambda t, a, *rest: t(t, a, F, address, address))
def tile_scale_add(b, t, a, s, p, step):
    """t[r] += float(a[r]) * (s * the float at p + r * step)."""

    def row(r, acc):
        x = _splat(b, _load(b, _row_address(b, p, step, r), ELEMENTS["f32"], 4))
        ints_as_floats = b.sitofp(b.extract_value(a, r), _llvm(F))
        return _call(b, "llvm.fma.v16f32", acc.type, [ints_as_floats, b.fmul(s, x), acc])

    return _rowwise(b, t, row)


def _scale_add_stored(b, t, a, s, p, finish):
    def row(r, acc):
        x = _splat(b, _load(b, _row_address(b, p, i64(4), r), ELEMENTS["f32"], 4))
        ints_as_floats = b.sitofp(_load(b, _row_address(b, a, i64(64), r), _llvm(I), 4), _llvm(F))
        acc = finish(r, _call(b, "llvm.fma.v16f32", acc.type, [ints_as_floats, b.fmul(s, x), acc]))
        # A row is done before the next is begun, or the compiler loads all first and runs out of registers.
        return b.asm(ir.FunctionType(acc.type, [acc.type]), "", "=v,0,~{memory}", [acc], True)

    return _rowwise(b, t, row)


@op(lambda t, *a: t(t, address, F, address))
def tile_scale_add_stored(b, t, a, s, p):
    """The same for integers stored at a + 64 r, and floats at p + 4 r."""
    return _scale_add_stored(b, t, a, s, p, lambda r, acc: acc)


@op(lambda t, *a: t(t, address, F, address, F, address))
def tile_scale_add_stored_fma(b, t, a, s, p, v, q):
    """The same, then t[r] += v * the float at q + 4 r."""

    def finish(r, acc):
        x = _splat(b, _load(b, _row_address(b, q, i64(4), r), ELEMENTS["f32"], 4))
        return _call(b, "llvm.fma.v16f32", acc.type, [v, x, acc])

    return _scale_add_stored(b, t, a, s, p, finish)


# --- calls and threads --------------------------------------------------------------------------------------
def call_at(sig):
    """An intrinsic (address, *args of sig): call the C function of this signature that lies at an address."""
    names = ["typing_context", "target", *[f"arg{i}" for i in range(len(sig.args))]]

    def typer(typing_context, target, *args):
        def codegen(context, b, _, values):
            kinds = [context.get_value_type(a) for a in sig.args]
            ret = ir.VoidType() if sig.return_type == void else context.get_value_type(sig.return_type)
            out = b.call(b.inttoptr(values[0], ir.FunctionType(ret, kinds).as_pointer()), values[1:])
            return context.get_dummy_value() if sig.return_type == void else out

        return sig.return_type(address, *sig.args), codegen

    named = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typer.__signature__ = inspect.Signature([inspect.Parameter(name, named) for name in names])
    return intrinsic(typer)


@op(address(address, address))
def atomic_add(b, p, x):
    return b.atomic_rmw("add", b.inttoptr(p, i64.as_pointer()), x, "seq_cst")


@op(address(address, address))
def atomic_swap(b, p, x):
    return b.atomic_rmw("xchg", b.inttoptr(p, i64.as_pointer()), x, "seq_cst")


@op(address(address))
def atomic_load(b, p):
    return b.load_atomic(b.inttoptr(p, i64.as_pointer()), "seq_cst", 8)


@op(void(address, address))
def atomic_store(b, p, x):
    b.store_atomic(x, b.inttoptr(p, i64.as_pointer()), "seq_cst", 8)


@op(void())
def pause(b):
    """Tell the core that this is a waiting loop (nothing on machines without such an instruction)."""
    if ISA != "portable":
        _call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])


@op(void())
def yield_core(b):
    _call(b, "sched_yield", i32, [])


@op(address())
def cycles(b):
    return _call(b, "llvm.readcyclecounter", i64, [])
