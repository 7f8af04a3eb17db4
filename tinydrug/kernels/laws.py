"""Direction laws: how the components of a random direction r are drawn. Only ratios of components matter.

A law draws in blocks of 32 components, of a vector whose generator's words are first and second:

    components(first, second, block) -> components 0..15 and 16..31 of the block, in lanes

and, with the same draws, for 16 cached vectors at once, whose words lie at `firsts` and `seconds`:

    draw_keys(firsts, seconds, d, at), then keys(firsts, seconds, d, at, block, j)
        -> components j and 16 + j of the block, a vector a lane
    draw_values(firsts, seconds, d, at), then values(firsts, seconds, d, at, block, p)
        -> components of vector p, as above

In two steps, with memory (64 d bytes at `at`) between them: the chain from words to components is long, and a
core works on several of them at a time only if each step is short.

A new law is a function of a word, of which `of_pairs` makes a `Law`, and a line in LAWS.
"""

from typing import NamedTuple

import numpy as np

from tinydrug.kernels.generator import word, words
from tinydrug.kernels.jit import inline
from tinydrug.kernels.vectors import (
    as_floats,
    as_ints,
    floats,
    fma,
    get_lane,
    ints,
    lane,
    load,
    load_i32,
    load_ints,
    set_lane,
    shift_left,
    shift_left_each,
    shift_right,
    sqrt,
    store,
    store_ints,
    to_floats,
)

f4, i4 = np.float32, np.int32
LOW = i4(0xFFFF)
SIGN, ONE = i4(-0x80000000), i4(0x3F800000)  # the sign bit, and the bits of 1.0
STEP = np.float32(np.pi / 2 / 2**14)  # a turn's 65,536th


class Law(NamedTuple):
    """Numba functions, as above."""

    components: object
    draw_keys: object
    keys: object
    draw_values: object
    values: object
    unit: bool = False  # whether the square of every component is 1


def of_pairs(pair, root=None) -> Law:
    """A law with one word for components j and 16 + j: pair(word, root(word)), or pair(word, word)."""
    rooted = root is not None
    root = root or pair  # one must be there to compile

    @inline
    def components(first, second, block):
        w = words(first, second, block)
        if rooted:
            return pair(w, root(w))
        return pair(w, w)

    @inline
    def draw_roots(d, at):
        for j in range(at, at + 32 * d, 64):
            store(j + 32 * d, root(load_ints(j)))

    @inline
    def draw_keys(firsts, seconds, d, at):
        if rooted:
            first, second = load_ints(firsts), load_ints(seconds)
            for i in range(d // 2):
                store_ints(at + 64 * i, word(first, second, ints(i4(i))))
            draw_roots(d, at)

    @inline
    def draw_values(firsts, seconds, d, at):
        if rooted:
            for p in range(16):
                first, second = ints(load_i32(firsts + 4 * p)), ints(load_i32(seconds + 4 * p))
                for block in range(d // 32):
                    store_ints(at + 2 * d * p + 64 * block, words(first, second, block))
            draw_roots(d, at)

    @inline
    def keys(firsts, seconds, d, at, block, j):
        i = 16 * block + j
        if rooted:
            return pair(load_ints(at + 64 * i), load(at + 64 * i + 32 * d))
        w = word(load_ints(firsts), load_ints(seconds), ints(i4(i)))
        return pair(w, w)

    @inline
    def values(firsts, seconds, d, at, block, p):
        i = at + 2 * d * p + 64 * block
        if rooted:
            return pair(load_ints(i), load(i + 32 * d))
        w = words(ints(load_i32(firsts + 4 * p)), ints(load_i32(seconds + 4 * p)), block)
        return pair(w, w)

    return Law(components, draw_keys, keys, draw_values, values)


# --- uniform: U[0, 1) each, as DRµGS published it. One-sided: two directions have a cosine of 0.75. 16 bits a
@inline
def uniform_pair(w, _):
    return to_floats(w & LOW), to_floats(shift_right(w, i4(16)))


# --- gauss: N(0, 1) each, isotropic. Box and Muller: 16 bits to the radius, 16 to the angle, two components -
@inline
def half_square(w):
    """-ln u of each lane, u odd multiples of 2^-17 from the low 16 bits: half the square of the radius."""
    u = as_floats((w & LOW) | ONE) - f4(1.0 - 2.0**-24)  # times 2^-7
    m = as_floats((as_ints(u) & i4(0x007FFFFF)) | ONE)  # ln(2 / m) = (2 - m) p
    p = fma(floats(f4(0.0302740689)), m, floats(f4(-0.222188026)))
    p = fma(p, m, floats(f4(0.669109225)))
    p = fma(p, m, floats(f4(-1.09886694)))
    p = fma(p, m, floats(f4(1.31480944)))
    exponent = to_floats(shift_right(as_ints(u), i4(23)))
    whole = fma(exponent, floats(f4(-np.log(2))), floats(f4(119 * np.log(2))))
    return fma(floats(f4(2.0)) - m, p, whole)


@inline
def normal_pair(w, half_square):
    # A quarter of the circle, 14 bits, around its middle; then a sign for each, 2 bits.
    n = as_floats((shift_right(w, i4(16)) & i4(0x3FFF)) | i4(0x4B000000))  # 2^23 + n
    h = fma(n, floats(f4(STEP)), floats(f4(STEP * (0.5 - 2.0**13) - STEP * 2.0**23)))
    z, radius = h * h, sqrt(half_square)
    cos = fma(fma(z, floats(f4(0.0403985344)), floats(f4(-0.499708146))), z, floats(f4(0.999990046)))
    sin = fma(fma(z, floats(f4(0.00812155753)), floats(f4(-0.166601613))), z, floats(f4(0.999994993))) * h
    one, other = (cos + sin) * radius, (cos - sin) * radius
    return as_floats(as_ints(one) ^ (w & SIGN)), as_floats(as_ints(other) ^ (shift_left(w, i4(1)) & SIGN))


# --- sign: -1 or 1 each, isotropic to second order. One bit a component: the cheap one ----------------------
@inline
def signs(low, high):
    """From the sign bits of lanes."""
    return as_floats((low & SIGN) | ONE), as_floats((high & SIGN) | ONE)


@inline
def bits_of(w):
    """A word, in all lanes -> bits as 32 components."""
    turned = lane() * i4(-1)
    return signs(shift_left_each(w, turned + i4(31)), shift_left_each(w, turned + i4(15)))


@inline
def sign_components(first, second, block):
    return bits_of(word(first, second, ints(i4(block))))


@inline
def draw_signs(firsts, seconds, d, at):
    for block in range(d // 32):
        store_ints(at + 64 * block, word(load_ints(firsts), load_ints(seconds), ints(i4(block))))


@inline
def sign_keys(firsts, seconds, d, at, block, j):
    high = shift_left_each(load_ints(at + 64 * block), ints(i4(15 - j)))
    return signs(shift_left(high, i4(16)), high)


@inline
def sign_values(firsts, seconds, d, at, block, p):
    return bits_of(ints(load_i32(at + 64 * block + 4 * p)))


# --- a user's: one random number a component, through a function of theirs -------------------------------
def of_function(component) -> Law:
    """The law whose components are component(u), u from U[0, 1) with 24 bits."""
    from numba import extending, njit

    one = component if extending.is_jitted(component) else njit(component)

    @inline
    def each(w):
        u, out = to_floats(shift_right(w, i4(8))) * f4(2.0**-24), floats(f4(0.0))
        for k in range(16):
            out = set_lane(out, k, f4(one(get_lane(u, k))))
        return out

    @inline
    def components(first, second, block):
        return each(words(first, second, 2 * block)), each(words(first, second, 2 * block + 1))

    @inline
    def draw_keys(firsts, seconds, d, at):
        for i in range(d):
            store(at + 64 * i, each(word(load_ints(firsts), load_ints(seconds), ints(i4(i)))))

    @inline
    def draw_values(firsts, seconds, d, at):
        for p in range(16):
            first, second = ints(load_i32(firsts + 4 * p)), ints(load_i32(seconds + 4 * p))
            for i in range(d // 16):
                store(at + 4 * d * p + 64 * i, each(words(first, second, i)))

    @inline
    def keys(firsts, seconds, d, at, block, j):
        i = 32 * block + j
        return load(at + 64 * i), load(at + 64 * i + 1024)

    @inline
    def values(firsts, seconds, d, at, block, p):
        i = at + 4 * d * p + 128 * block
        return load(i), load(i + 64)

    return Law(components, draw_keys, keys, draw_values, values)


class Entry(NamedTuple):
    """A line of the registry. In the text of a dose a law is ~NAME, the first one nothing."""

    code: int  # in a schedule's table; never given to another law: records refer to it
    what: str
    law: Law


LAWS = {
    "uniform": Entry(0, "components U[0, 1), one-sided, as published", of_pairs(uniform_pair)),
    "gauss": Entry(1, "components N(0, 1), isotropic", of_pairs(normal_pair, half_square)),
    "sign": Entry(
        2,
        "components -1 or 1, isotropic to second order, the cheapest",
        Law(sign_components, draw_signs, sign_keys, draw_signs, sign_values, unit=True),
    ),
}
