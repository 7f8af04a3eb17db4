"""The program of a model whose attention is estimated by simplex random features: `cache` and `attend`."""

from dataclasses import dataclass

import numpy as np

from tinydrug.errors import ConfigError
from tinydrug.formats.config import Config
from tinydrug.formats.weights import Weights, padded
from tinydrug.kernels import srf
from tinydrug.kernels.memory import aligned
from tinydrug.kernels.tables import PANEL
from tinydrug.models.features import Features
from tinydrug.models.program import CACHE, SHARED, Cached, Program, Value


@dataclass(frozen=True)
class Absorbed(Cached):
    """Keys or values on their way into the state: `value` is what the state needs of those of this call."""

    value: Value | None = None


class FeatureProgram(Program):
    """A Program that keeps a state of one size in place of all keys and values, its means as `cell`.

    Raises ConfigError for a model with a sliding window: what has entered the state can never leave it."""

    def __init__(self, config: Config, weights: Weights, cell: str, features: Features):
        super().__init__(config, weights, cell)
        if config.sliding_window is not None:
            window = f"a window of {config.sliding_window} tokens"
            raise ConfigError(
                f"--attention: srf cannot forget what leaves {window}, use softmax", "attention"
            )
        panels = padded(features.m, PANEL) // PANEL
        self._panels = aligned((config.n_layers, panels, padded(config.head_dim), PANEL), np.float32)
        self.draw(features)

    def draw(self, features: Features) -> None:
        """Use these directions from now on, as many as before: no state that there is means anything then."""
        self.features, d, m = features, self.config.head_dim, features.m
        for layer, panels in enumerate(self._panels):
            rows = np.zeros((len(panels) * PANEL, 2, self._half))  # padded like heads
            rows[:m, :, : d // 2] = d**-0.25 * features.directions(layer, d).reshape(m, 2, d // 2)
            panels[:] = rows.reshape(len(panels), PANEL, -1).swapaxes(1, 2)

    def cache(self, layer: int, keys: Value, values: Value) -> tuple[Cached, Cached]:
        """Keys (T, G, d) into the states of their sequences; values (T, G, d) follow when these are read."""
        fields = self._features(layer, keys)
        after = self._value(fields["kv_heads"] * 3 * fields["width"])
        scale = self.config.head_dim**-0.5 / 2
        self._note(srf.absorb, SHARED, also_writes=CACHE, x=keys, y=after, scale=scale, **fields)
        return Absorbed(value=after), Absorbed(value=values)

    def attend(self, layer: int, q: Value, keys: Absorbed, values: Absorbed, window: None) -> Value:
        """q (T, H, d) over all that the state holds when each token has entered it -> (T, H, d)."""
        fields = self._features(layer, q)
        weights = self._value(fields["heads"] * fields["width"])
        self._note(srf.weigh, SHARED, x=q, z=keys.value, y=weights, **fields)
        y = self._value(q.width)
        read = {"x": weights, "z": keys.value, "w": values.value, "y": y}
        self._note(srf.RECALL[self.cell], SHARED, also_writes=CACHE, **read, **fields)
        return y

    def _features(self, layer: int, x: Value) -> dict:
        panels = self._panels[layer]
        of_features = {"width": len(panels) * PANEL, "valid": self.features.m, "features": panels.ctypes.data}
        return self._heads(x) | of_features | {"layer": layer}
