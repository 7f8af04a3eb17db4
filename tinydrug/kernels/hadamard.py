"""Spreading what stands out over its neighbours, before it is rounded.

A few columns of activations are far larger than all others, and decide the step that their whole group is
rounded by. Times a Hadamard matrix, a large component becomes many small ones, and numbers are nearly normal.
The matrix is orthogonal and its own inverse, (W H) (H x) = W x: weights are spread when they are packed,
activations when they are rounded. QuaRot (Ashkboos et al. 2024), here within groups of 256 columns: a
transform that stays in registers. A narrower last group is spread in runs of the power of two that divides
it.
"""

from tinydrug.kernels.jit import inline
from tinydrug.kernels.tiles import by_rows, tile16, tile_hadamard, tile_load, tile_store

WIDE = 256  # columns of a group


@inline
def _spread(zeros, x):
    tile_store(tile_hadamard(tile_load(zeros, x, 64)), x, 64)


_spread_narrow = by_rows(_spread, WIDE // 16 - 2)


@inline
def spread(k, x):
    """k floats at x, in place; again: back."""
    whole = k // WIDE * WIDE
    for c in range(0, whole, WIDE):
        _spread(tile16(), x + 4 * c)
    _spread_narrow((k - whole) // 16, x + 4 * whole)
