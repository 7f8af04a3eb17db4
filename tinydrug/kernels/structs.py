"""Tables that Python and kernels share: rows of named fields, NumPy structured arrays on one side, pointers
on the other.

    Point = Struct("Point", x="f4", next="i8")        Point.dtype: the NumPy side
    in a kernel, p of type Point: p.x, p.x = 1, p[3].x (the third row after p), Point(address) makes one

A field may be another Struct: then it holds the address of its first row and reads as a pointer to it.
"""

import operator

import numpy as np
from numba import types
from numba.core.imputils import lower_builtin, lower_getattr_generic, lower_setattr_generic
from numba.core.typing.templates import (
    AbstractTemplate,
    AttributeTemplate,
    infer_getattr,
    infer_global,
    signature,
)
from numba.extending import intrinsic, models, register_model

_SCALARS = {"i8": types.int64, "f4": types.float32, "f8": types.float64}


class Struct(types.Type):
    """The type of a pointer to rows of these fields. Fields keep their order and lie without gaps."""

    def __init__(self, name, **fields):
        self.dtype = np.dtype([(f, kind if kind in _SCALARS else "i8") for f, kind in fields.items()])
        self.types = {f: _SCALARS.get(kind, kind) for f, kind in fields.items() if isinstance(kind, str)}
        self.types |= {f: kind for f, kind in fields.items() if isinstance(kind, Struct)}
        super().__init__(f"Struct({name})")

    def rows(self, count=1):
        """A zeroed NumPy table of this many rows."""
        return np.zeros(count, self.dtype)

    def pointer(self):
        """An intrinsic address (int64) -> pointer to rows, for use in kernels."""
        struct = self

        @intrinsic
        def at(typing_context, address):
            return struct(types.int64), lambda context, builder, sig, args: args[0]

        return at


@register_model(Struct)
class _PointerModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, dmm.lookup(types.int64).get_value_type())


@infer_getattr
class _Fields(AttributeTemplate):
    key = Struct

    def generic_resolve(self, struct, name):
        return struct.types.get(name)


def _field(context, builder, struct, value, name):
    offset = struct.dtype.fields[name][1]
    llvm_type = context.get_value_type(struct.types[name])
    at = builder.add(value, context.get_constant(types.int64, offset))
    return builder.inttoptr(at, llvm_type.as_pointer())


@lower_getattr_generic(Struct)
def _get(context, builder, struct, value, name):
    return builder.load(_field(context, builder, struct, value, name))


@lower_setattr_generic(Struct)
def _set(context, builder, sig, args, name):
    struct, kind = sig.args
    value = context.cast(builder, args[1], kind, struct.types[name])
    builder.store(value, _field(context, builder, struct, args[0], name))


@infer_global(operator.getitem)
class _Row(AbstractTemplate):
    def generic(self, args, kws):
        if len(args) == 2 and isinstance(args[0], Struct) and isinstance(args[1], types.Integer):
            return signature(args[0], args[0], types.int64)


@lower_builtin(operator.getitem, Struct, types.Integer)
def _getitem(context, builder, sig, args):
    size = context.get_constant(types.int64, sig.args[0].dtype.itemsize)
    return builder.add(args[0], builder.mul(args[1], size))
