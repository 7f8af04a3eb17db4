"""Advanced Matrix Extensions: tile registers of 16 rows by 64 bytes, and their int8 product.

t0 .. t3  integers, 16 or 8 tokens by 16 output rows
t4        activations, as many tokens by 64, 32 or 16 columns
t5        weights, as many columns in quads: 16, 8 or 4 by 16 output rows by 4 columns
"""

from llvmlite import ir

from tinydrug.kernels import emit
from tinydrug.kernels.emit import i8, i64
from tinydrug.kernels.isa import ISA
from tinydrug.kernels.jit import inline
from tinydrug.kernels.kinds import address, op, void

AVAILABLE = ISA == "amx"
LEAST = 5  # rows that are worth a tile


@inline
def rows_in_tiles(rows):
    """How many of so many rows, and perhaps of memory past them, are done in tiles: eight, or sixteens."""
    if not AVAILABLE or rows < LEAST:
        return 0
    return 8 if rows <= 8 else (rows + 16 - LEAST) // 16 * 16


def _call(b, name, args):
    emit.call(b, name, ir.VoidType(), args)


def _pointer(b, p):
    return b.inttoptr(p, i8.as_pointer())


def configure(tokens, columns):
    """The op (room) that gives the tile registers their shapes; 64 bytes at `room` are overwritten."""
    words = bytearray(64)
    words[0] = 1  # palette
    for tile in range(6):
        words[16 + 2 * tile] = columns if tile == 4 else 64  # bytes of a row
        words[48 + tile] = columns // 4 if tile == 5 else tokens  # rows

    @op(void(address))
    def configure_tiles(b, room):
        kind = ir.ArrayType(i8, 64)
        b.store(ir.Constant(kind, words), b.inttoptr(room, kind.as_pointer())).align = 1
        _call(b, "llvm.x86.ldtilecfg", [_pointer(b, room)])

    return configure_tiles


@op(void())
def release(b):
    """Give the tile registers back: they are not saved any more when threads switch."""
    _call(b, "llvm.x86.tilerelease", [])


def begin(t):
    @op(void())
    def begin_tile(b):
        """Integers 0."""
        _call(b, "llvm.x86.tilezero", [i8(t)])

    return begin_tile


def end(t):
    @op(void(address))
    def end_tile(b, out):
        """Integers -> out (tokens, 16) int32."""
        _call(b, "llvm.x86.tilestored64", [i8(t), _pointer(b, out), i64(64)])

    return end_tile


def multiply(t):
    @op(void(address, address, address))
    def multiply_tiles(b, x, stride, w):
        """Integers += activations, rows `stride` bytes apart, times weights: signed bytes."""
        _call(b, "llvm.x86.tileloadd64", [i8(4), _pointer(b, x), stride])
        _call(b, "llvm.x86.tileloadd64", [i8(5), _pointer(b, w), i64(64)])
        _call(b, "llvm.x86.tdpbssd", [i8(t), i8(4), i8(5)])

    return multiply_tiles
