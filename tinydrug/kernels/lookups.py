"""Instructions that take bits and bytes apart, and look entries up in small tables."""

from llvmlite import ir

from tinydrug.kernels import emit
from tinydrug.kernels.emit import i8, i32, i64
from tinydrug.kernels.isa import ISA, WIDE_LOOKUP
from tinydrug.kernels.kinds import LANES, B, F, I, address, op, s32


@op(B(B, s32))
def subtract_bytes(b, x, n):
    return b.sub(x, emit.splat(b, b.trunc(n, i8), 4 * LANES))


@op(B(B, B))
def either(b, x, y):
    return b.or_(x, y)


def _nibbles_under(b, x, upper):
    low = emit.constant(B, 15)
    if ISA in ("amx", "avx512vnni"):  # LLVM would spend two instructions
        words = [b.bitcast(v, I.llvm) for v in (low, x, upper)]
        return b.bitcast(
            emit.call(b, "llvm.x86.avx512.pternlog.d.512", words[0].type, [*words, i32(0xCA)]), x.type
        )
    return b.or_(b.and_(x, low), b.and_(upper, emit.constant(B, 0xF0)))


@op(B(B, B))
def low_nibbles_under(b, x, upper):
    """The low nibbles of x and the high ones of `upper`."""
    return _nibbles_under(b, x, upper)


@op(B(B, B))
def high_nibbles_under(b, x, upper):
    """The high nibbles of x, as low ones, and the high ones of `upper`."""
    down = b.bitcast(b.lshr(b.bitcast(x, I.llvm), emit.constant(I, 4)), B.llvm)
    return _nibbles_under(b, down, upper)


@op(B(address))
def load_byte_a_lane(b, p):
    """16 bytes, each in all four bytes of its lane."""
    few = emit.load(b, p, ir.VectorType(i8, LANES), 1)
    pick = ir.Constant(ir.VectorType(i32, 4 * LANES), [k // 4 for k in range(4 * LANES)])
    return b.shuffle_vector(few, ir.Constant(few.type, ir.Undefined), pick)


@op(B(B))
def next_pair(b, x):
    """The two bits above, of bytes that are the same in all of a lane: every lane turned right by two."""
    words = b.bitcast(x, I.llvm)
    return b.bitcast(b.or_(b.lshr(words, emit.constant(I, 2)), b.shl(words, emit.constant(I, 30))), B.llvm)


@op(B(B, address, address, s32))
def bits_to(b, x, low, place, mask):
    """Of every byte, the bits `mask` (at bit 0) found at bit `low`, moved to bit `place`."""
    words, up = b.bitcast(x, I.llvm), b.icmp_signed(">=", place, low)
    left = b.shl(words, emit.splat(b, b.trunc(b.select(up, b.sub(place, low), i64(0)), i32)))
    right = b.lshr(left, emit.splat(b, b.trunc(b.select(up, i64(0), b.sub(low, place)), i32)))
    keep = emit.splat(b, b.trunc(b.shl(mask, b.trunc(place, i32)), i8), 4 * LANES)
    return b.and_(b.bitcast(right, B.llvm), keep)


@op(B(B))
def low_nibbles(b, x):
    return b.and_(x, emit.constant(B, 15))


@op(B(B))
def high_nibbles(b, x):
    return b.and_(b.bitcast(b.lshr(b.bitcast(x, I.llvm), emit.constant(I, 4)), B.llvm), emit.constant(B, 15))


def _lookup_avx512(b, x, table):
    return emit.call(b, "llvm.x86.avx512.pshuf.b.512", x.type, [ir.Constant(x.type, 4 * table), x])


def _lookup_avx2(b, x, table):
    half, parts = ir.VectorType(i8, 2 * LANES), []
    for o in (0, 2 * LANES):
        pick = ir.Constant(ir.VectorType(i32, 2 * LANES), list(range(o, o + 2 * LANES)))
        part = b.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), pick)
        parts.append(emit.call(b, "llvm.x86.avx2.pshuf.b", half, [ir.Constant(half, 2 * table), part]))
    return b.shuffle_vector(*parts, ir.Constant(ir.VectorType(i32, 4 * LANES), list(range(4 * LANES))))


def _lookup_portable(b, x, table):
    """Every bit of a number halves what is left of the table."""
    left = [emit.constant(B, entry) for entry in table]
    for bit in range(4):
        odd = b.icmp_unsigned("!=", b.and_(x, emit.constant(B, 1 << bit)), emit.constant(B, 0))
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
    return emit.call(b, "llvm.x86.avx512.permvar.qi.512", x.type, [ir.Constant(x.type, table), x])


def _lookup_64_by_16(b, x, table):
    """Where no instruction knows 64 entries: the upper bits of a number choose among four tables of 16."""
    low, upper = b.and_(x, emit.constant(B, 15)), b.and_(x, emit.constant(B, 48))
    found = _LOOKUP(b, low, table[:16])
    for first in (16, 32, 48):
        here = b.icmp_unsigned("==", upper, emit.constant(B, first))
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
        padded = ir.Constant(F.llvm, [*table, *[0.0] * (LANES - len(table))])
        return emit.call(b, "llvm.x86.avx512.permvar.sf.512", padded.type, [padded, at])

    found = emit.constant(I, 0)
    for step in (8, 4, 2, 1):
        middle = b.add(found, emit.constant(I, step - 1))
        above = b.fcmp_ordered(">", x, pick(edges, middle))
        found = b.select(above, b.add(middle, emit.constant(I, 1)), found)
    return pick(entries, found)


def _between_portable(b, x, edges, entries):
    found = emit.constant(F, entries[0])
    for edge, entry in zip(edges, entries[1:], strict=True):
        found = b.select(b.fcmp_ordered(">", x, emit.constant(F, edge)), emit.constant(F, entry), found)
    return found


def between(edges, entries, emit=_between_avx512 if ISA in ("amx", "avx512vnni") else _between_portable):
    """The op x -> of 16 entries that which stands between the same two of 15 rising edges as x does."""
    edges, entries = list(map(float, edges)), list(map(float, entries))

    @op(F(F))
    def entry(b, x):
        return emit(b, x, edges, entries)

    return entry
