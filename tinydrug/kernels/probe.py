"""What the machine can do: reading memory, and integer dot products on registers. Benchmarks hold kernels
against it."""

import numpy as np
from numba import types

from tinydrug.kernels.jit import kernel
from tinydrug.kernels.vectors import (
    floats,
    load,
    load_bytes,
    store_f32,
    sum_lanes,
    tile8,
    tile_as_floats,
    tile_dot4,
    tile_ints,
    tile_store,
)

f4 = np.float32


@kernel(types.void(types.int64, types.int64, types.int64))
def read_memory(start, nbytes, out):
    """Load every byte once, four streams of 64 bytes; the sum goes to out so that nothing is left away."""
    a, b, c, d = floats(f4(0.0)), floats(f4(0.0)), floats(f4(0.0)), floats(f4(0.0))
    for p in range(start, start + nbytes, 256):
        a, b, c, d = a + load(p), b + load(p + 64), c + load(p + 128), d + load(p + 192)
    store_f32(out, sum_lanes(a + b + c + d))


@kernel(types.void(types.int64, types.int64, types.int64))
def dot_products(rounds, data, out):
    """rounds x 8 x 16 dot products of 4 bytes, operands in registers or the first cache lines."""
    acc = tile_ints(tile8())
    w = load_bytes(data)
    for _ in range(rounds):
        acc = tile_dot4(acc, w, data + 64, 4)
    tile_store(tile_as_floats(acc), out, 64)
