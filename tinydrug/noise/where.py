"""Which layers a dose reaches: layers by number, layers by depth, or a profile over depth."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tinydrug.errors import DrugError
from tinydrug.noise.checks import at, number, read_number, shown, whole, write_number
from tinydrug.noise.presets import expand
from tinydrug.noise.profile import Profile

RANGE = re.compile(r"(-?\d{1,9})(?:-(-?\d{1,9}))?", re.ASCII)
MAX_LAYER = 10**9 - 1
SYNTAX = (
    "write layers as 8, 8-15 or 8-9+20, a depth as 0.3..0.5, a profile as 0.3:0/0.4:1/0.5:0, "
    "or a preset: readme, samples, slowfall, single:8, stack:8"
)


@dataclass(frozen=True)
class Layers:
    """Layers by number: inclusive (first, last) ranges, kept sorted and merged."""

    ranges: tuple[tuple[int, int], ...]

    peak = 1.0

    def __post_init__(self):
        merged: list[tuple[int, int]] = []
        for first, last in sorted(_checked_ends(ends) for ends in self.ranges):
            if first > last:
                raise DrugError(f"layers {first}-{last} run backwards: write {last}-{first}")
            if merged and first <= merged[-1][1] + 1:
                first, before = merged.pop()
                last = max(before, last)
            merged.append((first, last))
        if not merged:
            raise DrugError("the list of layers is empty")
        object.__setattr__(self, "ranges", tuple(merged))

    @classmethod
    def parse(cls, text: str) -> "Layers":
        """`8`, `8-15`, or several of these joined by plus signs."""
        matches = [RANGE.fullmatch(part.strip()) for part in text.split("+")]
        if not all(matches):
            raise DrugError(f"cannot read {shown(text)}: {SYNTAX}")
        return cls(tuple((int(match[1]), int(match[2] or match[1])) for match in matches))

    def ratios(self, n_layers: int) -> np.ndarray:
        """1 on these layers and 0 elsewhere, (L,). Raises DrugError when the model has fewer."""
        last = self.ranges[-1][1]
        if last >= n_layers:
            raise DrugError(f"there is no layer {last}: the model has {n_layers} layers, 0 to {n_layers - 1}")
        ratios = np.zeros(n_layers)
        for first, last in self.ranges:
            ratios[first : last + 1] = 1
        return ratios

    def to_dict(self) -> dict:
        return {"layers": str(self)}

    def __str__(self) -> str:
        return "+".join(f"{first}-{last}" if first < last else f"{first}" for first, last in self.ranges)


@dataclass(frozen=True)
class Depth:
    """Layers by depth, `low` to `high` inclusive: layer l of L lies at l / L."""

    low: float
    high: float

    peak = 1.0

    def __post_init__(self):
        low, high = number(self.low, "depth", least=0), number(self.high, "depth", least=0)
        a, b = write_number(low), write_number(high)
        if low > high:
            raise DrugError(f"depth {a}..{b} runs backwards: write {b}..{a}")
        if high > 1:
            raise DrugError(f"depth goes from 0, the first layer, to 1, not to {b}")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    @classmethod
    def parse(cls, text: str) -> "Depth":
        """`0.3..0.5`."""
        low, _, high = text.partition("..")
        return cls(read_number(low, "depth"), read_number(high, "depth"))

    def ratios(self, n_layers: int) -> np.ndarray:
        """1 on the layers in this range and 0 elsewhere, (L,)."""
        depth = np.arange(n_layers) / n_layers  # (L,)
        return ((depth >= self.low) & (depth <= self.high)).astype("f8")

    def to_dict(self) -> dict:
        return {"depth": str(self)}

    def __str__(self) -> str:
        return f"{write_number(self.low)}..{write_number(self.high)}"


Where = Layers | Depth | Profile


def parse_where(text: str) -> Where:
    """What stands after @ in a dose: layers, a depth, a profile or a preset."""
    text = expand(text)
    if ":" in text:
        return Profile.parse(text)
    if ".." in text:
        return Depth.parse(text)
    return Layers.parse(text)


def where_from_dict(fields: Mapping) -> Where | None:
    """The one of layers, depth and profile (with its mode) that is among the keys of a dose, or None."""
    given = [key for key in ("layers", "depth", "profile") if key in fields]
    if len(given) > 1:
        raise DrugError(f"{' and '.join(given)} are both given: keep one")
    if "mode" in fields and given != ["profile"]:
        raise DrugError("mode is given without the profile it belongs to")
    if not given:
        return None
    with at(given[0]):
        match given[0], fields[given[0]]:
            case "layers", str(text):
                return Layers.parse(text)
            case "layers", list(numbers):
                return Layers(tuple((layer, layer) for layer in numbers))
            case "layers", layer:
                return Layers(((layer, layer),))
            case "depth", str(text):
                return Depth.parse(text)
            case "depth", value:
                raise DrugError(f"must be text such as '0.3..0.5', not {shown(value)}")
            case _, list(points):
                return Profile(tuple(points), fields.get("mode", "interpolate"))
            case _, value:
                raise DrugError(f"must be a list of {{depth, peakratio}}, not {shown(value)}")


def _checked_ends(ends: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(ends, (tuple, list)) or len(ends) != 2:
        raise DrugError(f"layers are (first, last) pairs, not {shown(ends)}")
    first, last = (whole(end, "a layer", 0, MAX_LAYER) for end in ends)
    return first, last
