"""Rotary tables: cosines and sines of every position, for each rope type Hugging Face knows and we run.

Formulae and names: transformers' modeling_rope_utils. Frequencies and angles are float32 there, and so
they are here: at position 8,000 a float64 angle would differ by 5e-4.
"""

import math

import numpy as np

from tinydrug.errors import UnsupportedModel
from tinydrug.formats.config import Config

f4 = np.float32
PIECE = 4096  # positions


def _option(config, name, *default):
    value = config.rope.options.get(name)
    if value is None:
        if default:
            return default[0]
        raise UnsupportedModel(f"rope type {config.rope.kind} needs the field {name} in rope_parameters")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnsupportedModel(f"rope field {name} is {value!r}, not a number")
    return value


def _frequencies(base, d):
    return (f4(1.0) / f4(base) ** (np.arange(0, d, 2, dtype=f4) / f4(d))).astype(f4)  # (d/2,)


def default(config, positions):
    """1 / base^(2i/d)."""
    return _frequencies(config.rope.rope_theta, config.head_dim), 1.0


def linear(config, positions):
    """Positions squeezed by a factor."""
    return _frequencies(config.rope.rope_theta, config.head_dim) / f4(_option(config, "factor")), 1.0


def dynamic(config, positions):
    """NTK: a base that grows with the length, once that exceeds what the model was trained for.

    A token at position p uses the base of length p + 1, which is what Hugging Face computes when it
    generates token by token. (Given a whole prompt at once it uses the prompt's length for all of it; then
    a token's row would depend on what follows it, and a cache could not be reused.)"""
    d, factor = config.head_dim, _option(config, "factor")
    trained = _option(config, "original_max_position_embeddings", config.max_seq_len)
    length = np.maximum(positions + 1, trained).astype(np.float64)
    base = config.rope.rope_theta * (factor * length / trained - (factor - 1)) ** (d / (d - 2))
    exponents = np.arange(0, d, 2, dtype=f4) / f4(d)
    return (f4(1.0) / base.astype(f4)[:, None] ** exponents).astype(f4), 1.0


def llama3(config, positions):
    """Long wavelengths divided by a factor, short ones kept, a smooth passage between."""
    plain = _frequencies(config.rope.rope_theta, config.head_dim)
    factor, low, high, trained = (
        _option(config, name)
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    wavelength = 2 * math.pi / plain
    smooth = (trained / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    scaled = np.where(wavelength > trained / low, plain / factor, between)
    return np.where(wavelength < trained / high, plain, scaled).astype(f4), 1.0


def yarn(config, positions):
    """Interpolated and extrapolated frequencies mixed by a ramp over dimensions, and a factor on cosines and
    sines."""
    d, base, factor = config.head_dim, config.rope.rope_theta, _option(config, "factor")
    trained = _option(config, "original_max_position_embeddings", config.max_seq_len)
    fast, slow = _option(config, "beta_fast", 32), _option(config, "beta_slow", 1)

    def dimension(rotations):
        return d * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(fast), dimension(slow)
    if config.rope.options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = np.clip((np.arange(d // 2, dtype=f4) - f4(low)) / f4((high - low) or 0.001), 0, 1)
    plain = _frequencies(base, d)
    frequencies = plain / f4(factor) * ramp + plain * (1 - ramp)

    def mscale(scale, m=1.0):
        return 0.1 * m * math.log(scale) + 1.0 if scale > 1 else 1.0

    attention = _option(config, "attention_factor", None)
    if attention is None:
        m, m_all = _option(config, "mscale", None), _option(config, "mscale_all_dim", None)
        attention = mscale(factor, m) / mscale(factor, m_all) if m and m_all else mscale(factor)
    return frequencies.astype(f4), attention


def factors(config, positions):
    """Frequencies divided by a factor a dimension: how GGUF files store Llama 3's scaling."""
    plain = _frequencies(config.rope.rope_theta, config.head_dim)
    return (plain / np.asarray(config.rope.options["factors"], f4)).astype(f4), 1.0


ROPES = {
    "default": default,
    "linear": linear,
    "dynamic": dynamic,
    "llama3": llama3,
    "yarn": yarn,
    "factors": factors,
}


def check_rope(config: Config, path) -> None:
    """Refuse a rope type or its fields at load, not at the first position."""
    if config.rope.kind not in ROPES:
        raise UnsupportedModel(f"{path}: rope type {config.rope.kind!r}; supported: {', '.join(ROPES)}")
    ends = np.array([0, 2 * config.max_seq_len])  # --ctx-size may be larger than what it was trained for
    try:
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            frequencies, factor = ROPES[config.rope.kind](config, ends)
        sound = np.isfinite(frequencies).all() and (frequencies > 0).all() and math.isfinite(factor)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error}") from None
    except (ArithmeticError, ValueError, LookupError, TypeError):
        sound = False
    if not sound:
        fields = {"rope_theta": config.rope.rope_theta, **config.rope.options}
        raise UnsupportedModel(f"{path}: rope type {config.rope.kind} has no frequencies for {fields!r:.200}")


class RopeTable:
    """`rows` (positions, 2, half) float32: cosines and sines, the attention factor multiplied in, d/2 of each
    and zeros. They are computed, PIECE at a time, when a position is first reached: a long context costs
    nothing before it is used."""

    def __init__(self, config: Config, n_positions: int, half: int):
        self.rows = np.zeros((n_positions, 2, half), f4)
        self._config, self._done = config, 0

    def reach(self, end: int) -> None:
        """See to it that the rows of all positions before this one are there."""
        while self._done < end:
            positions = np.arange(self._done, min(self._done + PIECE, len(self.rows)))
            frequencies, factor = ROPES[self._config.rope.kind](self._config, positions)
            angles = positions[:, None].astype(f4) * frequencies
            rows = self.rows[positions[0] : positions[-1] + 1, :, : self._config.head_dim // 2]
            rows[:, 0], rows[:, 1] = np.cos(angles) * f4(factor), np.sin(angles) * f4(factor)
            self._done += len(positions)
