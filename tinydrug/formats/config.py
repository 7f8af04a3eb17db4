"""The shape of a model: one small frozen dataclass, and typed reading of the JSON it comes from.

The letters of shape comments everywhere: T tokens of this call, S cache slots, L layers, V vocabulary, D
hidden size, F MLP size, H query heads, G key/value heads (G divides H), d head width.
"""

import math
from dataclasses import dataclass, field

from tinydrug.errors import UnsupportedModel


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: `kind` is Hugging Face's rope_type, `options` its further fields (factor, ...)."""

    rope_theta: float
    kind: str = "default"
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Drift:
    """Which parameters of its own a drift-diffusion GPT-2 has in each layer."""

    drift_param: tuple[int, ...] | None = None  # its shape: (H, d), a gate's logits, or (H, 1, 1), a factor
    baseline: bool = False  # (H, d), where drift leaves things as they are
    diffusion_param: bool = False  # (H, d), standard deviations


@dataclass(frozen=True)
class Config:
    """What a forward pass needs to know of a model."""

    model_type: str
    n_layers: int  # L
    hidden_size: int  # D
    n_heads: int  # H
    n_kv_heads: int  # G
    head_dim: int  # d
    intermediate_size: int  # F
    vocab_size: int  # V
    max_seq_len: int  # positions the model was trained for
    norm_eps: float
    activation: str  # a key of models.program.ACTIVATIONS
    tied: bool  # the head is the embedding
    rope: Rope | None = None
    sliding_window: int | None = None  # a token sees this many positions, itself included
    attention_bias: bool = False
    mlp_bias: bool = False
    drift: Drift | None = None


class Fields:
    """config.json as Hugging Face wrote it, in version 4 or 5 spelling, read field by field with types
    checked."""

    def __init__(self, raw: dict, path):
        self.raw, self.path = raw, path

    def get(self, name: str, kind, *default, aliases: tuple[str, ...] = ()):
        """The field as `kind` (int, float, bool, str), or the default if it is absent or null."""
        for key in (name, *aliases):
            value = self.raw.get(key)
            if value is None:
                continue
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value) if abs(value) < 1 << 1023 else math.inf
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise UnsupportedModel(f"{self.path}: config field {key} is {value!r}, not {kind.__name__}")
            return value
        if default:
            return default[0]
        raise UnsupportedModel(f"{self.path}: config field {name} is missing")

    def size(self, name: str, *default, aliases: tuple[str, ...] = ()) -> int:
        """A field that must be a positive whole number."""
        value = self.get(name, int, *default, aliases=aliases)
        if value is not None and not 0 < value < 1 << 31:
            raise UnsupportedModel(f"{self.path}: config field {name} is {value}, not a sensible size")
        return value

    def refuse(self, **unsupported) -> None:
        """Fields that must be absent or have this value, else the model is one we would run wrongly."""
        for name, only in unsupported.items():
            value = self.raw.get(name)
            if value is not None and value != only:
                raise UnsupportedModel(f"{self.path}: config field {name} = {value!r} is not supported")

    def rope(self) -> Rope:
        """rope_parameters (v5), or rope_theta and rope_scaling (v4)."""
        given = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if not isinstance(given, dict):
            raise UnsupportedModel(f"{self.path}: config field rope_parameters is {given!r}, not an object")
        options = Fields(given, self.path)
        kind = options.get("rope_type", str, "default", aliases=("type",))
        base = options.get("rope_theta", float, self.get("rope_theta", float, 10000.0))
        rest = {k: v for k, v in given.items() if k not in ("rope_type", "type", "rope_theta")}
        return Rope(base, kind, rest)
