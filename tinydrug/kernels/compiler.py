"""Numba's side of kernels, imported when something has to be compiled and not before.

What kinds.py, structs.py and jit.py declare becomes Numba types with operators and fields, then functions,
then object code.
"""

import gc
import inspect
import operator

from llvmlite import ir
from numba import njit, types
from numba.core.ccallback import CFunc
from numba.core.compiler import Flags, compile_extra
from numba.core.compiler_lock import global_compiler_lock
from numba.core.imputils import lower_builtin, lower_getattr_generic, lower_setattr_generic
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_getattr, infer_global
from numba.extending import intrinsic, models, register_model

from tinydrug.kernels import emit
from tinydrug.kernels.kinds import F, I, Kind, M, Op, Signature, f32, s32, void
from tinydrug.kernels.structs import Struct

# The one place where Numba options are spelled. No fastmath: NaN and infinity mean something, and the order
# of a sum is a promise.
OPTIONS = {"error_model": "numpy"}
INTERPRETER = ("Py", "numba_", "NRT_")  # how names of functions begin that are not there without Numba


# --- kinds --------------------------------------------------------------------------------------------------
class Register(types.Type):
    """A vector or a tile."""

    def __init__(self, kind):
        self.kind = kind
        super().__init__(kind.name)


class Pointer(Register):
    """To rows of a Struct."""


@register_model(Register)
@register_model(Pointer)
class _Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.kind.llvm)


def type_of(kind: Kind) -> types.Type:
    """Numba's type of a kind."""
    if isinstance(kind, Struct):
        return Pointer(kind)
    return getattr(types, kind.name, None) or Register(kind)


def _signature(sig: Signature):
    return type_of(sig.result)(*map(type_of, sig.args))


# --- functions that kernels call ----------------------------------------------------------------------------
def jitted(function, **options):
    """Numba's function. It is optimised alone, and again in its kernel: only the latter would compile in a
    third of the time less, to tile kernels that are up to a fifth slower."""
    return njit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options, **OPTIONS)


def type_of_op(op: Op) -> types.Type:
    """Numba's type of an instruction, as that of a function."""

    def typer(typing_context, *args):
        sig = op.signature(*(getattr(arg, "kind", arg) for arg in args))

        def codegen(context, builder, _, values):
            out = op.emit(builder, *values)
            return context.get_dummy_value() if sig.result is void else out

        return _signature(sig), codegen

    # Numba matches what a call gives with the names of parameters.
    names = ["typing_context", *(f"arg{i}" for i in range(op.arity))]
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typer.__signature__ = inspect.Signature([inspect.Parameter(name, named) for name in names])
    typer.__name__ = op.__name__
    instruction, context = intrinsic(typer), cpu_target.typing_context
    context.refresh()  # or it would not be known
    return context.resolve_value_type(instruction)


# --- operators of vectors -----------------------------------------------------------------------------------
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


class _Arithmetic(AbstractTemplate):
    """Vector op vector, or vector op scalar (the scalar is splatted)."""

    def generic(self, args, kws):
        kind = getattr(args[0], "kind", None)
        if len(args) != 2 or kind not in (F, I):
            return None
        if args[1] == args[0] or isinstance(args[1], types.Number):
            other = kind if args[1] == args[0] else f32 if kind == F else s32
            return _signature((M if self.key in _COMPARE else kind)(kind, other))


def _register(key):
    infer_global(key)(type("_Arithmetic", (_Arithmetic,), {"key": key}))

    def lower(context, b, sig, args):
        x, y = args
        is_float = sig.args[0].kind == F
        y = y if sig.args[1] == sig.args[0] else emit.splat(b, y)
        if key in _COMPARE:
            return (b.fcmp_ordered if is_float else b.icmp_signed)(_COMPARE[key], x, y)
        return getattr(b, (_FLOAT if is_float else _INT)[key])(x, y)

    lower_builtin(key, Register, Register)(lower)
    lower_builtin(key, Register, types.Number)(lower)


for _key in {*_FLOAT, *_INT, *_COMPARE}:
    _register(_key)


# --- fields and rows of tables ------------------------------------------------------------------------------
@infer_getattr
class _Fields(AttributeTemplate):
    key = Pointer

    def generic_resolve(self, pointer, name):
        kind = pointer.kind.kinds.get(name)
        return kind and type_of(kind)


def _field(context, builder, struct, value, name):
    at = builder.add(value, context.get_constant(types.int64, struct.dtype.fields[name][1]))
    return builder.inttoptr(at, struct.kinds[name].llvm.as_pointer())


@lower_getattr_generic(Pointer)
def _get(context, builder, pointer, value, name):
    return builder.load(_field(context, builder, pointer.kind, value, name))


@lower_setattr_generic(Pointer)
def _set(context, builder, sig, args, name):
    struct = sig.args[0].kind
    value = context.cast(builder, args[1], sig.args[1], type_of(struct.kinds[name]))
    builder.store(value, _field(context, builder, struct, args[0], name))


@infer_global(operator.getitem)
class _Row(AbstractTemplate):
    def generic(self, args, kws):
        if len(args) == 2 and isinstance(args[0], Pointer) and isinstance(args[1], types.Integer):
            return args[0](args[0], types.int64)


@lower_builtin(operator.getitem, Pointer, types.Integer)
def _getitem(context, builder, sig, args):
    size = context.get_constant(types.int64, sig.args[0].kind.dtype.itemsize)
    return builder.add(args[0], builder.mul(args[1], size))


# --- kernels ------------------------------------------------------------------------------------------------
def object_code(function, sig: Signature, name: str) -> bytes:
    """An object file with the C function of this name. AssertionError for one that needs the interpreter."""
    flags = Flags()
    flags.error_model = OPTIONS["error_model"]
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    whole, context, collecting = _signature(sig), cpu_target.target_context, gc.isenabled()
    gc.disable()  # a tenth of the time is spent looking for garbage, and there is next to none
    try:
        with global_compiler_lock:
            result = compile_extra(
                cpu_target.typing_context, context, function, whole.args, whole.return_type, flags, locals={}
            )
            result.library.add_ir_module(_c_function(context, result.fndesc, sig, name))
            _, _, (code, _) = result.library.serialize_using_object_code()
    finally:
        if collecting:
            gc.enable()
    called = [f.name for f in result.library._final_module.functions if f.is_declaration]
    if any(name.startswith(INTERPRETER) for name in called):
        raise AssertionError(f"{name} needs the interpreter: it calls {', '.join(called)}")
    return code


def _c_function(context, descriptor, sig: Signature, name: str):
    """The LLVM module of a function without what Numba adds: a status (no kernel raises) and the
    interpreter."""
    module = context.create_module(name)
    whole = context.call_conv.get_function_type(descriptor.restype, descriptor.argtypes)
    callee = ir.Function(module, whole, descriptor.llvm_func_name)
    kind = ir.FunctionType(sig.result.llvm, [arg.llvm for arg in sig.args])
    function = ir.Function(module, kind, name)
    builder = ir.IRBuilder(function.append_basic_block())
    _, out = context.call_conv.call_function(
        builder, callee, descriptor.restype, descriptor.argtypes, function.args, attrs=("noinline",)
    )
    if sig.result is void:
        builder.ret_void()
    else:
        builder.ret(out)
    return module


def in_this_process(function, sig: Signature) -> CFunc:
    """A C function with a user's code in it, which may raise: `address` says where it lies."""
    whole = _signature(sig)
    c_function = CFunc(function, (whole.args, whole.return_type), {}, OPTIONS | {"nopython": True})
    c_function.compile()
    return c_function
