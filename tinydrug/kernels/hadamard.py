"""Spreading what stands out over its neighbours, before it is rounded.

A few columns of activations are far larger than all others, and decide the step that their whole group is
rounded by. Times a Hadamard matrix, a large component becomes many small ones, and numbers are nearly normal.
The matrix is orthogonal and its own inverse, (W H) (H x) = W x: weights are spread when they are packed,
activations when they are rounded. QuaRot (Ashkboos et al. 2024), here within groups of 128 columns: a
transform that stays in registers. A narrower last group is spread in runs of 64 or 32.
"""

from tinydrug.kernels.jit import inline
from tinydrug.kernels.vectors import tile2, tile4, tile6, tile8, tile_hadamard, tile_load, tile_store


@inline
def spread(k, x):
    """k floats at x, in place; again: back."""
    whole = k // 128 * 128
    for c in range(0, whole, 128):
        _spread(tile8(), x + 4 * c)
    if k - whole == 32:
        _spread(tile2(), x + 4 * whole)
    elif k - whole == 64:
        _spread(tile4(), x + 4 * whole)
    elif k - whole == 96:
        _spread(tile6(), x + 4 * whole)


@inline
def _spread(zeros, x):
    tile_store(tile_hadamard(tile_load(zeros, x, 64)), x, 64)
