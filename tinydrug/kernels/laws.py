"""Direction laws: how the components of a random direction r are drawn. Only ratios of components matter.

A law is two views of the same draws, in blocks of 32 components, so that vectors of either layout are served:

    by_component(first, second, block) -> components 0..15 and 16..31 of the block, in lanes, for one vector
    by_position(first, second, block, j) -> components j and 16 + j of the block, for the 16 vectors in lanes

first, second: the generator's words of each lane. A new law is these two functions and a line in LAWS.
"""

import numpy as np

from tinydrug.kernels.generator import word
from tinydrug.kernels.jit import inline
from tinydrug.kernels.maths import log, sin_cos_half
from tinydrug.kernels.vectors import (
    as_floats,
    floats,
    get_lane,
    ints,
    lane,
    set_lane,
    shift_left,
    shift_right,
    shift_right_each,
    sqrt,
    to_floats,
)

f4, i4 = np.float32, np.int32
LOW = i4(0xFFFF)
SIGN, ONE = i4(-0x80000000), i4(0x3F800000)  # the sign bit, and the bits of 1.0


# --- uniform: U[0, 1) each, as DRµGS published it. One-sided: two directions have a cosine of 0.75. 16 bits a
@inline
def uniform_pair(w):
    return to_floats(w & LOW), to_floats(shift_right(w, i4(16)))


@inline
def uniform_by_component(first, second, block):
    return uniform_pair(word(first, second, lane() + i4(16 * block)))


@inline
def uniform_by_position(first, second, block, j):
    return uniform_pair(word(first, second, ints(i4(16 * block + j))))


# --- gauss: N(0, 1) each, isotropic. Box and Muller: 16 bits to the radius, 16 to the angle, two components -
@inline
def normal_pair(w):
    radius = sqrt(log((to_floats(w & LOW) + f4(0.5)) * f4(2.0**-16)) * f4(-2.0))
    half = (to_floats(shift_right(w, i4(16))) * f4(2.0**-16) - f4(0.5)) * f4(np.pi)
    sin, cos = sin_cos_half(half)
    return radius * cos, radius * sin


@inline
def gauss_by_component(first, second, block):
    return normal_pair(word(first, second, lane() + i4(16 * block)))


@inline
def gauss_by_position(first, second, block, j):
    return normal_pair(word(first, second, ints(i4(16 * block + j))))


# --- sign: -1 or 1 each, isotropic to second order. One bit a component: the cheap one ----------------------
@inline
def sign_by_component(first, second, block):
    w = word(first, second, ints(i4(block)))
    low, high = shift_right_each(w, lane()), shift_right_each(w, lane() + i4(16))
    return as_floats(shift_left(low, i4(31)) | ONE), as_floats(shift_left(high, i4(31)) | ONE)


@inline
def sign_by_position(first, second, block, j):
    w = word(first, second, ints(i4(block)))
    low, high = shift_left(w, i4(31 - j)), shift_left(w, i4(15 - j))
    return as_floats((low & SIGN) | ONE), as_floats((high & SIGN) | ONE)


# --- a user's: one random number a component, through a function of theirs -------------------------------
def views_of(component):
    """The two views of a law whose components are component(u), u from U[0, 1) with 24 bits."""
    from numba import extending, njit

    one = component if extending.is_jitted(component) else njit(component)

    @inline
    def each(w):
        u, out = to_floats(shift_right(w, i4(8))) * f4(2.0**-24), floats(f4(0.0))
        for k in range(16):
            out = set_lane(out, k, f4(one(get_lane(u, k))))
        return out

    @inline
    def by_component(first, second, block):
        low = lane() + i4(32 * block)
        return each(word(first, second, low)), each(word(first, second, low + i4(16)))

    @inline
    def by_position(first, second, block, j):
        low, high = ints(i4(32 * block + j)), ints(i4(32 * block + 16 + j))
        return each(word(first, second, low)), each(word(first, second, high))

    return by_component, by_position


LAWS = {
    "uniform": (uniform_by_component, uniform_by_position),
    "gauss": (gauss_by_component, gauss_by_position),
    "sign": (sign_by_component, sign_by_position),
}
