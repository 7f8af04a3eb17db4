"""Advanced Matrix Extensions: tile registers of 16 rows by 64 bytes, and their int8 product.

t0          integers, 16 tokens by 16 output rows
t1, t2, t3  activations, 16 tokens by 64, 32 and 16 columns
t4, t5, t6  weights, 16, 8 and 4 quads by 16 output rows by 4 columns
"""

from llvmlite import ir

from tinydrug.kernels.isa import ISA
from tinydrug.kernels.vectors import address, i8, i64, op, void

AVAILABLE = ISA == "amx"
_ROWS = {0: 16, 1: 16, 2: 16, 3: 16, 4: 16, 5: 8, 6: 4}
_ROW_BYTES = {0: 64, 1: 64, 2: 32, 3: 16, 4: 64, 5: 64, 6: 64}


def _call(b, name, args):
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in args])
    b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), args)


def _pointer(b, p):
    return b.inttoptr(p, i8.as_pointer())


@op(void(address))
def configure(b, room):
    """Give the tile registers their shapes; 64 bytes at `room` are overwritten."""
    words = bytearray(64)
    words[0] = 1  # palette
    for tile, size in _ROW_BYTES.items():
        words[16 + 2 * tile], words[48 + tile] = size, _ROWS[tile]
    kind = ir.ArrayType(i8, 64)
    b.store(ir.Constant(kind, words), b.inttoptr(room, kind.as_pointer())).align = 1
    _call(b, "llvm.x86.ldtilecfg", [_pointer(b, room)])


@op(void())
def release(b):
    """Give the tile registers back: they are not saved any more when threads switch."""
    _call(b, "llvm.x86.tilerelease", [])


@op(void())
def begin(b):
    """Integers 0."""
    _call(b, "llvm.x86.tilezero", [i8(0)])


@op(void(address))
def end(b, out):
    """Integers -> out (16, 16) int32."""
    _call(b, "llvm.x86.tilestored64", [i8(0), _pointer(b, out), i64(64)])


def _multiply(x, w):
    @op(void(address, address, address))
    def multiply(b, x_at, stride, w_at):
        """Integers += activations, rows `stride` bytes apart, times weights: signed bytes."""
        _call(b, "llvm.x86.tileloadd64", [i8(x), _pointer(b, x_at), stride])
        _call(b, "llvm.x86.tileloadd64", [i8(w), _pointer(b, w_at), i64(64)])
        _call(b, "llvm.x86.tdpbssd", [i8(0), i8(x), i8(w)])

    return multiply


multiply_64, multiply_32, multiply_16 = _multiply(1, 4), _multiply(2, 5), _multiply(3, 6)  # so many columns
