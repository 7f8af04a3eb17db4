"""exp, log, tanh, erf, sine and cosine on vectors: the same bits on every machine, no library behind them."""

import numpy as np

from tinydrug.kernels.jit import inline
from tinydrug.kernels.vectors import (
    absolute,
    as_floats,
    as_ints,
    floats,
    fma,
    round_even,
    select,
    shift_left,
    to_ints,
)

f4, i4 = np.float32, np.int32


@inline
def exp(x):
    """Relative error 1e-7; 0 below -87, infinity above 88.7; NaN stays NaN. Polynomial: Cephes expf."""
    y = select(x < f4(-87.0), floats(f4(-87.0)), x)
    y = select(y > f4(88.7), floats(f4(88.7)), y)
    n = round_even(y * f4(1.44269504))
    r = fma(n, floats(f4(2.12194440e-4)), fma(n, floats(f4(-0.693359375)), y))
    p = fma(floats(f4(1.9875691500e-4)), r, floats(f4(1.3981999507e-3)))
    p = fma(p, r, floats(f4(8.3334519073e-3)))
    p = fma(p, r, floats(f4(4.1665795894e-2)))
    p = fma(p, r, floats(f4(1.6666665459e-1)))
    p = fma(p, r, floats(f4(5.0000001201e-1)))
    p = fma(p, r * r, r) + f4(1.0)
    half = as_floats(shift_left(to_ints(n) + i4(126), i4(23)))  # 2^n would overflow the exponent at n = 128
    result = p * half * f4(2.0)
    result = select(x < f4(-87.0), floats(f4(0.0)), result)
    return select(x > f4(88.7), floats(f4(np.inf)), result)


@inline
def exp2_falling(x):
    """2^x for x <= 0, relative error 2e-7; 0 below -126; NaN stays NaN. A minimax polynomial, 1 at 0."""
    y = select(x < f4(-126.0), floats(f4(-126.0)), x)
    t = y + f4(12583039.0)  # 1.5 * 2^23 + 127: the low bits of the sum are x, rounded, plus the bias
    r = y - (t - f4(12583039.0))
    p = fma(floats(f4(1.326472731e-3)), r, floats(f4(9.671512991e-3)))
    p = fma(p, r, floats(f4(5.550733581e-2)))
    p = fma(p, r, floats(f4(2.402224243e-1)))
    p = fma(p, r, floats(f4(6.931470037e-1)))
    p = fma(p, r, floats(f4(1.0)))
    result = p * as_floats(shift_left(as_ints(t), i4(23)))
    return select(x < f4(-126.0), floats(f4(0.0)), result)


@inline
def sigmoid(x):
    return floats(f4(1.0)) / (exp(floats(f4(0.0)) - x) + f4(1.0))


@inline
def tanh(x):
    return floats(f4(1.0)) - floats(f4(2.0)) / (exp(x * f4(2.0)) + f4(1.0))


@inline
def erf(x):
    """Absolute error 2e-7: Abramowitz and Stegun 7.1.26 has 1.5e-7."""
    a = absolute(x)
    t = floats(f4(1.0)) / fma(a, floats(f4(0.3275911)), floats(f4(1.0)))
    p = fma(floats(f4(1.061405429)), t, floats(f4(-1.453152027)))
    p = fma(p, t, floats(f4(1.421413741)))
    p = fma(p, t, floats(f4(-0.284496736)))
    p = fma(p, t, floats(f4(0.254829592)))
    y = floats(f4(1.0)) - p * t * exp(floats(f4(0.0)) - a * a)
    return select(x < f4(0.0), floats(f4(0.0)) - y, y)


@inline
def sin_cos_half(half):
    """sin and cos of twice the argument, for |argument| <= pi/2: Taylor of the half angle, then doubled."""
    z = half * half
    s = fma(floats(f4(1.6059044e-10)), z, floats(f4(-2.5052108e-8)))
    s = fma(s, z, floats(f4(2.7557319e-6)))
    s = fma(s, z, floats(f4(-1.9841270e-4)))
    s = fma(s, z, floats(f4(8.3333333e-3)))
    s = fma(s, z, floats(f4(-0.16666667)))
    s = fma(s, z, floats(f4(1.0))) * half
    c = fma(floats(f4(2.0876757e-9)), z, floats(f4(-2.7557319e-7)))
    c = fma(c, z, floats(f4(2.4801587e-5)))
    c = fma(c, z, floats(f4(-1.3888889e-3)))
    c = fma(c, z, floats(f4(4.1666667e-2)))
    c = fma(c, z, floats(f4(-0.5)))
    c = fma(c, z, floats(f4(1.0)))
    return s * c * f4(2.0), fma(s * f4(-2.0), s, floats(f4(1.0)))
