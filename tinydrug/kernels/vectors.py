"""Instructions on numbers in memory and on vectors of 16 in registers.

Memory is named by absolute byte addresses (int64). Every load and store states its alignment: LLVM's
default for a vector is its full size (64), and an address that is not a multiple of it would fault.
"""

from llvmlite import ir

from tinydrug.kernels import emit
from tinydrug.kernels.emit import i8, i16, i32, i64
from tinydrug.kernels.kinds import ELEMENTS, LANES, B, F, I, M, address, f32, f64, op, s32, void


# --- scalars at addresses -----------------------------------------------------------------------------------
@op(f32(address))
def load_f32(b, p):
    return emit.load(b, p, ELEMENTS["f32"], 4)


@op(void(address, f32))
def store_f32(b, p, x):
    emit.store(b, p, x, 4)


@op(f32(address))
def load_f16(b, p):
    return b.fpext(emit.load(b, p, ELEMENTS["f16"], 2), ELEMENTS["f32"])


@op(void(address, f32))
def store_f16(b, p, x):
    emit.store(b, p, b.fptrunc(x, ELEMENTS["f16"]), 2)


@op(f32(address))
def load_bf16(b, p):
    return b.bitcast(b.shl(b.zext(emit.load(b, p, i16, 2), i32), i32(16)), ELEMENTS["f32"])


@op(void(address, f32))
def store_bf16(b, p, x):
    """Truncated: exact for floats that came from bf16, and only used for those."""
    emit.store(b, p, b.trunc(b.lshr(b.bitcast(x, i32), i32(16)), i16), 2)


@op(void(address, f64))
def add_f64(b, p, x):
    """Add to the double at p (not atomic)."""
    emit.store(b, p, b.fadd(emit.load(b, p, x.type, 8), x), 8)


@op(s32(address))
def load_i32(b, p):
    return emit.load(b, p, i32, 1)


@op(void(address, s32))
def store_i32(b, p, x):
    emit.store(b, p, x, 1)


@op(address(address))
def load_u16(b, p):
    return b.zext(emit.load(b, p, i16, 2), i64)


@op(void(address, address))
def store_u16(b, p, x):
    emit.store(b, p, b.trunc(x, i16), 2)


@op(address(address))
def load_u8(b, p):
    return b.zext(emit.load(b, p, i8, 1), i64)


@op(void(address, address))
def store_u8(b, p, x):
    emit.store(b, p, b.trunc(x, i8), 1)


# --- vectors: loads and stores ------------------------------------------------------------------------------
@op(F(address))
def load(b, p):
    return emit.load(b, p, F.llvm, 4)


@op(void(address, F))
def store(b, p, x):
    emit.store(b, p, x, 4)


@op(I(address))
def load_ints(b, p):
    return emit.load(b, p, I.llvm, 4)


@op(void(address, I))
def store_ints(b, p, x):
    emit.store(b, p, x, 4)


@op(B(address))
def load_bytes(b, p):
    return emit.load(b, p, B.llvm, 1)


@op(B())
def no_bytes(b):
    return emit.constant(B, 0)


@op(void(address, I))
def store_low_bytes(b, p, x):
    emit.store(b, p, b.trunc(x, ir.VectorType(i8, LANES)), 1)


@op(void(address, B))
def store_bytes(b, p, x):
    emit.store(b, p, x, 1)


@op(F(address))
def load_halves(b, p):
    return emit.load_halves(b, p)


@op(void(address, F))
def store_halves(b, p, x):
    emit.store(b, p, b.fptrunc(x, ir.VectorType(ELEMENTS["f16"], LANES)), 2)


@op(F(address))
def load_bfloats(b, p):
    return emit.load_bfloats(b, p)


@op(F(address))
def load_unsigned_bytes(b, p):
    """16 bytes 0 .. 255 as floats."""
    return b.uitofp(emit.load(b, p, ir.VectorType(i8, LANES), 1), F.llvm)


@op(F(address))
def load_signed_bytes(b, p):
    """16 bytes -128 .. 127 as floats."""
    return b.sitofp(emit.load(b, p, ir.VectorType(i8, LANES), 1), F.llvm)


def _prefetch(level):
    @op(void(address))
    def prefetch(b, p):
        """Ask for the cache line at p, which need not exist. No load or store moves past it: LLVM would ask
        for the lines of a whole unrolled loop at its end, all at once."""
        args = [b.inttoptr(p, i8.as_pointer()), i32(0), i32(4 - level), i32(1)]
        emit.call(b, "llvm.prefetch.p0", ir.VoidType(), args)
        b.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)

    return prefetch


prefetch_l1, prefetch_l2 = map(_prefetch, (1, 2))  # for the first or the second level of cache


# --- vectors: making and converting -------------------------------------------------------------------------
@op(F(f32))
def floats(b, x):
    return emit.splat(b, x)


@op(I(s32))
def ints(b, x):
    return emit.splat(b, x)


@op(I())
def lane(b):
    return ir.Constant(I.llvm, list(range(LANES)))


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
    return b.sitofp(x, F.llvm)


@op(I(F))
def to_ints(b, x):
    return b.fptosi(x, I.llvm)


@op(F(I))
def as_floats(b, x):
    return b.bitcast(x, F.llvm)


@op(I(F))
def as_ints(b, x):
    return b.bitcast(x, I.llvm)


# --- vectors: arithmetic ------------------------------------------------------------------------------------
@op(F(F, F, F))
def fma(b, x, y, z):
    return emit.call(b, "llvm.fma.v16f32", x.type, [x, y, z])


@op(F(F))
def sqrt(b, x):
    return emit.call(b, "llvm.sqrt.v16f32", x.type, [x])


@op(F(F))
def absolute(b, x):
    return emit.call(b, "llvm.fabs.v16f32", x.type, [x])


@op(F(F))
def round_even(b, x):
    return emit.call(b, "llvm.roundeven.v16f32", x.type, [x])


@op(F(F, F))
def maximum(b, x, y):
    """The greater of each pair; NaN if either is."""
    return emit.maximum(b, x, y)


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
    return b.shl(x, emit.splat(b, n))


@op(I(I, s32))
def shift_right(b, x, n):
    return b.lshr(x, emit.splat(b, n))


@op(I(I, I))
def shift_left_each(b, x, n):
    """Every lane by its own count, 0 to 31."""
    return b.shl(x, n)


@op(f32(F))
def sum_lanes(b, x):
    return emit.reduce(b, x, b.fadd)


@op(f32(F))
def max_lanes(b, x):
    """The greatest lane; NaN if any is."""
    return emit.reduce(b, x, lambda p, q: emit.maximum(b, p, q))


@op(f32(F))
def highest_lane(b, x):
    """The greatest lane of numbers: with NaN among them, any."""
    return emit.reduce(b, x, lambda p, q: b.select(b.fcmp_ordered(">", p, q), p, q))


@op(F(address))
def sum_each(b, p):
    """Lane r: the sum of the 16 floats at p + 64 r, added in the order of `sum_lanes`."""
    rows = [emit.load(b, b.add(p, i64(64 * r)), F.llvm, 4) for r in range(LANES)]
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
    rows = [emit.load(b, b.add(p, b.mul(step, i64(r))), F.llvm, 4) for r in range(LANES)]
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
        emit.store(b, b.add(out, i64(64 * r)), row, 4)


@op(I(I, F))
def higher_magnitude(b, top, x):
    """The greater of each absolute value and top; as integers, NaN are above infinity, so they stay."""
    return emit.higher(b, top, b.and_(b.bitcast(x, I.llvm), emit.constant(I, 0x7FFFFFFF)))


@op(f32(I))
def highest_magnitude(b, top):
    """The greatest lane of `higher_magnitude`."""
    return b.bitcast(emit.reduce(b, top, lambda p, q: emit.higher(b, p, q)), ELEMENTS["f32"])


@op(s32(I, address))
def get_int(b, x, k):
    return b.extract_element(x, k)
