"""Kinds of values that kernels compute with, and the instructions and signatures made of them.

    Vec(elt, n)    one LLVM <n x elt> in a register
    Tile(vec, r)   r such vectors, LLVM [r x <n x elt>]; LLVM takes it apart into r registers, so a kernel
                   written for a tile is compiled once per r and needs no generated source
    int64(f32, F)  the signature of a function of one float and a vector

All of this is plain Python: a process that finds its machine code in the cache never loads Numba. Numba asks
an object that it meets in a kernel for its `_numba_type_`, and compiler.py has the answer.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

LANES = 16  # lanes of 32 bits in every vector here
ELEMENTS = {
    "f64": ir.DoubleType(),
    "f32": ir.FloatType(),
    "f16": ir.HalfType(),
    **{f"i{bits}": ir.IntType(bits) for bits in (64, 32, 16, 8, 1)},
}


class Kind:
    """A kind of value, and how LLVM holds it."""

    def __init__(self, name: str, llvm: ir.Type):
        self.name, self.llvm = name, llvm

    def __call__(self, *args: "Kind") -> "Signature":
        """The signature of a function with this result."""
        return Signature(self, args)

    @functools.cached_property
    def _numba_type_(self):
        from tinydrug.kernels import compiler

        return compiler.type_of(self)


class Vec(Kind):
    """n lanes of one element type."""

    def __init__(self, elt: str, n: int):
        self.n = n
        super().__init__(f"Vec({elt} x {n})", ir.VectorType(ELEMENTS[elt], n))


class Tile(Kind):
    """r vectors of one kind: the accumulators of r tokens."""

    def __init__(self, vec: Vec, r: int):
        self.vec, self.r = vec, r
        super().__init__(f"Tile({vec.name} x {r})", ir.ArrayType(vec.llvm, r))


class Signature(NamedTuple):
    result: Kind
    args: tuple[Kind, ...]


void = Kind("void", ir.VoidType())
int64, s32 = Kind("int64", ELEMENTS["i64"]), Kind("int32", ELEMENTS["i32"])  # named as Numba does
f64, f32 = Kind("float64", ELEMENTS["f64"]), Kind("float32", ELEMENTS["f32"])
address = int64  # of a byte in memory
F, I, M = Vec("f32", LANES), Vec("i32", LANES), Vec("i1", LANES)  # noqa: E741 - floats, ints, mask
B = Vec("i8", 4 * LANES)  # bytes: four a lane


class Op:
    """An instruction, or a few: emit(builder, *LLVM values) -> LLVM value."""

    def __init__(self, sig: Signature | Callable, emit: Callable):
        self.sig, self.emit = sig, emit
        functools.update_wrapper(self, emit)

    @property
    def arity(self) -> int:
        if isinstance(self.sig, Signature):
            return len(self.sig.args)
        return len(inspect.signature(self.emit).parameters) - 1

    def signature(self, *args: Kind) -> Signature:
        return self.sig if isinstance(self.sig, Signature) else self.sig(*args)

    @functools.cached_property
    def _numba_type_(self):
        from tinydrug.kernels import compiler

        return compiler.type_of_op(self)


def op(sig: Signature | Callable) -> Callable:
    """Decorate `emit` into an instruction that kernels call like a function.

    sig is a signature, or a function of the arguments' kinds that gives one (for tiles, whose r is open)."""
    return functools.partial(Op, sig)
