"""A dose's shape over depth, as DRµGS defines it: points of (depth, peakratio) and a mode between them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tinydrug.errors import DrugError
from tinydrug.noise.checks import at, find, number, read_number, shown, write_number


@dataclass(frozen=True)
class Profile:
    """Points (depth, peakratio), kept sorted by depth; `mode` is interpolate, ceil or floor.

    Layer i of L lies at depth i / L, so the last one falls short of 1. A depth may lie outside [0, 1]; a
    peakratio is the factor on theta there and may exceed 1. `ceil` and `floor` take the larger and the
    smaller of the two points around a layer. A point may also be a table {depth, peakratio}. Raises DrugError
    for no points, a number that is not finite, a negative peakratio or an unknown mode.
    """

    points: tuple[tuple[float, float], ...]
    mode: str = "interpolate"

    def __post_init__(self):
        points = []
        for i, point in enumerate(self.points):
            with at(f"point {i + 1}"):
                depth, ratio = _pair(point)
                points.append((number(depth, "depth"), number(ratio, "peakratio", least=0)))
        if not points:
            raise DrugError("a profile needs at least one point")
        object.__setattr__(self, "points", tuple(sorted(points, key=lambda point: point[0])))
        object.__setattr__(self, "mode", find(MODES, self.mode, "mode"))

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """`0.3:0/0.4:1/0.5:0/ceil`: points DEPTH:PEAKRATIO, then the mode unless it is interpolate."""
        points, mode = text.split("/"), "interpolate"
        if ":" not in points[-1]:
            mode = points.pop()
        pairs = [point.partition(":")[::2] for point in points]
        return cls(tuple((read_number(d, "depth"), read_number(r, "peakratio")) for d, r in pairs), mode)

    @property
    def peak(self) -> float:
        """The largest factor any layer can get."""
        return max(ratio for _, ratio in self.points)

    def ratio(self, depth: float) -> float:
        """The factor on theta at this depth."""
        first, last = self.points[0], self.points[-1]
        if depth <= first[0]:
            return first[1]
        if depth >= last[0]:
            return last[1]
        # The first pair that holds the depth: a layer on an inner knot belongs to the interval on its left,
        # so two knots at one depth are never the pair.
        pairs = zip(self.points, self.points[1:], strict=False)
        (d1, r1), (d2, r2) = next((a, b) for a, b in pairs if a[0] <= depth <= b[0])
        return MODES[self.mode](r1, r2, (depth - d1) / (d2 - d1))

    def ratios(self, n_layers: int) -> np.ndarray:
        """The factor on theta of every layer, (L,)."""
        return np.array([self.ratio(i / n_layers) for i in range(n_layers)], "f8")

    def to_dict(self) -> dict:
        points = [{"depth": depth, "peakratio": ratio} for depth, ratio in self.points]
        return {"profile": points, "mode": self.mode}

    def __str__(self) -> str:
        points = [f"{write_number(depth)}:{write_number(ratio)}" for depth, ratio in self.points]
        return "/".join(points if self.mode == "interpolate" else [*points, self.mode])


def _pair(point) -> tuple:
    """(depth, peakratio) of a pair or of a {depth, peakratio} table."""
    if isinstance(point, Mapping) and set(point) == {"depth", "peakratio"}:
        return point["depth"], point["peakratio"]
    if isinstance(point, (tuple, list)) and len(point) == 2:
        return tuple(point)
    raise DrugError(f"must be {{depth, peakratio}}, not {shown(point)}")


MODES = {  # (left ratio, right ratio, how far from left to right) -> ratio
    "interpolate": lambda r1, r2, t: t * (r2 - r1) + r1,
    "ceil": lambda r1, r2, t: max(r1, r2),
    "floor": lambda r1, r2, t: min(r1, r2),
}
