"""Instructions as LLVM spells them: what the functions behind ops (kinds.py) write with."""

from llvmlite import ir

from tinydrug.kernels.kinds import ELEMENTS, LANES, F, I

i8, i16, i32, i64 = (ELEMENTS[f"i{bits}"] for bits in (8, 16, 32, 64))


def load(b, p, llvm_type, align):
    value = b.load(b.inttoptr(p, llvm_type.as_pointer()))
    value.align = align
    return value


def store(b, p, value, align):
    b.store(value, b.inttoptr(p, value.type.as_pointer())).align = align


def constant(vec, x):
    return ir.Constant(vec.llvm, [x] * vec.n)


def call(b, name, ret, args):
    """The function of this name, as an instruction of LLVM's or of the C library."""
    fn = b.module.globals.get(name) or ir.Function(
        b.module, ir.FunctionType(ret, [a.type for a in args]), name
    )
    return b.call(fn, args)


def splat(b, x, n=LANES):
    """A vector of n times x."""
    empty = ir.Constant(ir.VectorType(x.type, n), ir.Undefined)
    first = ir.Constant(ir.VectorType(i32, n), [0] * n)
    return b.shuffle_vector(b.insert_element(empty, x, i32(0)), empty, first)


def load_halves(b, p):
    return b.fpext(load(b, p, ir.VectorType(ELEMENTS["f16"], LANES), 2), F.llvm)


def load_bfloats(b, p):
    wide = b.zext(load(b, p, ir.VectorType(i16, LANES), 2), I.llvm)
    return b.bitcast(b.shl(wide, constant(I, 16)), F.llvm)


def maximum(b, x, y):
    """Compare and select, then NaN of x: LLVM's maxnum would swallow NaN."""
    return b.select(b.fcmp_unordered("uno", x, x), x, b.select(b.fcmp_ordered(">", x, y), x, y))


def higher(b, p, q):
    """The greater of integers."""
    return b.select(b.icmp_signed(">", p, q), p, q)


def reduce(b, x, combine):
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


def row_address(b, p, step, r):
    return b.add(p, b.mul(step, i64(r)))
