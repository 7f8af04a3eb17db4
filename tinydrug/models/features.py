"""Simplex random features: the directions that stand for all keys when attention is estimated."""

from dataclasses import dataclass

import numpy as np

from tinydrug.errors import ConfigError

MOST = 1 << 16  # features: they take memory and time as a context of so many tokens


@dataclass(frozen=True)
class Features:
    """m directions a layer, all its heads share them; the seed draws them."""

    m: int
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.m, bool) or not isinstance(self.m, int) or not 1 <= self.m <= MOST:
            raise ConfigError(f"--features: {self.m!r} is not a whole number from 1 to {MOST}", "features")
        seed = self.seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ConfigError(f"--feature-seed: {seed!r} is not an integer in [0, 2**64)", "feature_seed")

    def directions(self, layer: int, d: int) -> np.ndarray:
        """W (m, d) float64 = D S R in blocks of d rows; the last block may be cut short.

        S: the simplex directions. R: orthogonal, Haar-random. D: lengths, each chi_d, a normal vector's. So
        every row is a normal vector, and the estimate has no bias."""
        draws = np.random.Generator(np.random.Philox(key=self.seed | layer << 64))
        blocks = []
        for _ in range(-(-self.m // d)):
            rotation, normal = draws.standard_normal((d, d)), draws.standard_normal((d, d))
            lengths = np.sqrt((normal**2).sum(0))
            blocks.append(lengths[:, None] * simplex(orthogonal(rotation)))
        return np.concatenate(blocks)[: self.m]


def simplex(x: np.ndarray) -> np.ndarray:
    """S x for x (d, d): S (d, d) has unit rows of products -1/(d - 1), and a last column of zeros."""
    d = len(x)
    total = x[:-1].sum(0)
    rows = x * np.sqrt(d / (d - 1)) - total * ((np.sqrt(d) + 1) / (d - 1) ** 1.5)
    rows[-1] = total / np.sqrt(d - 1)
    return rows


def orthogonal(x: np.ndarray) -> np.ndarray:
    """Gram-Schmidt on the columns of x (d, d): of normal numbers, a Haar-random orthogonal matrix.

    That is the Q of QR when R has a positive diagonal. LAPACK's would differ in the last bits from machine to
    machine and with its threads; sums over rows, one after another, do not."""
    q = x.copy()
    for i in range(len(q)):
        q[:, i] /= np.sqrt((q * q[:, i : i + 1]).sum(0)[i])
        rest = q[:, i + 1 :]
        rest -= q[:, i : i + 1] * (q * q[:, i : i + 1]).sum(0)[i + 1 :]
    return q
