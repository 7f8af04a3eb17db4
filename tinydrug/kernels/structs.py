"""Tables that Python and kernels share: rows of named fields, NumPy structured arrays on one side, pointers
on the other.

    Point = Struct("Point", x="f4", next="i8")        Point.dtype: the NumPy side
    in a kernel, p of type Point: p.x, p.x = 1, p[3].x (the third row after p), Point(address) makes one

A field may be another Struct: then it holds the address of its first row and reads as a pointer to it.
"""

import numpy as np

from tinydrug.kernels.kinds import Kind, Op, address, f32, f64, int64, op

_SCALARS = {"i8": int64, "f4": f32, "f8": f64}


class Struct(Kind):
    """A pointer to rows of these fields. Fields keep their order and lie without gaps."""

    def __init__(self, name, **fields):
        self.dtype = np.dtype([(f, kind if kind in _SCALARS else "i8") for f, kind in fields.items()])
        self.kinds = {f: kind if isinstance(kind, Struct) else _SCALARS[kind] for f, kind in fields.items()}
        super().__init__(f"Struct({name})", address.llvm)

    def rows(self, count=1):
        """A zeroed NumPy table of this many rows."""
        return np.zeros(count, self.dtype)

    def pointer(self) -> Op:
        """The instruction address (int64) -> pointer to rows, for use in kernels."""

        @op(self(address))
        def at(builder, value):
            return value

        return at
