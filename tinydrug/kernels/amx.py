"""Advanced Matrix Extensions: tile registers of 16 rows by 64 bytes, and their int8 product.

t0, t1   integers, 16 tokens by 16 output rows
t2, t3   activations, 16 tokens by 32 (t3: 16) columns
t4, t5   weights, 8 (t5: 4) quads by 16 output rows by 4 columns
"""

from llvmlite import ir

from tinydrug.kernels.isa import ISA
from tinydrug.kernels.vectors import address, i8, i64, op, void

AVAILABLE = ISA == "amx"
_ROWS = {0: 16, 1: 16, 2: 16, 3: 16, 4: 8, 5: 4}
_ROW_BYTES = {0: 64, 1: 64, 2: 32, 3: 16, 4: 64, 5: 64}


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


def _product(sum_, x, w):
    """The intrinsic (x address, w address, out address): int32 products, stored (16, 16)."""

    @op(void(address, address, address))
    def product(b, x_at, w_at, out):
        t, n, m = i8(sum_), i8(x), i8(w)
        _call(b, "llvm.x86.tilezero", [t])
        _call(b, "llvm.x86.tileloadd64", [n, _pointer(b, x_at), i64(32)])
        _call(b, "llvm.x86.tileloadd64", [m, _pointer(b, w_at), i64(64)])
        _call(b, "llvm.x86.tdpbssd", [t, n, m])
        _call(b, "llvm.x86.tilestored64", [t, _pointer(b, out), i64(64)])

    return product


product_32 = _product(0, 2, 4)  # of 32 columns, signed bytes
product_16 = _product(1, 3, 5)  # of 16
