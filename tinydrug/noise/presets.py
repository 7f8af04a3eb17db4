"""The published ways to spread a dose over depth, by name: what may stand after @."""

from collections.abc import Callable

from tinydrug.errors import DrugError
from tinydrug.noise.checks import shown


def bump(centre: float, spread: float, mode: str = "interpolate") -> str:
    """DRµGS' four points: 1 between centre - spread and centre + spread, 0 just outside."""
    outer = 1.01 * spread
    edges = ((centre - outer, 0), (centre - spread, 1), (centre + spread, 1), (centre + outer, 0))
    return "/".join([*(f"{depth!r}:{ratio}" for depth, ratio in edges), mode])


def around(layer: int) -> str:
    """A layer and its neighbours: the injection window of DRµGS' divergence plots."""
    return f"{max(layer - 1, 0)}-{layer + 1}"


def up_to(layer: int) -> str:
    """From the first layer to the one after this: the full-stack window of the same plots."""
    return f"0-{layer + 1}"


FIXED = {  # name -> the text it stands for
    "readme": bump(0.4, 0.1),  # the profile of DRµGS' README
    "samples": bump(0.4, 5 / 32, "ceil"),  # the setting of all its published samples
    "slowfall": f"0:1/{17 / 32}:1/{25 / 32}:0.2/{26 / 32}:0",  # of its experiment "unrepeatable"
}
WINDOWS: dict[str, Callable[[int], str]] = {"single": around, "stack": up_to}  # name:LAYER


def expand(text: str) -> str:
    """`readme` or `single:8` -> the text it stands for; any other text as it is. Raises DrugError."""
    name, colon, layer = (part.strip() for part in text.partition(":"))
    if name.lower() in FIXED and not colon:
        return FIXED[name.lower()]
    if name.lower() in WINDOWS:
        if not (layer.isascii() and layer.isdigit() and len(layer) < 9):
            raise DrugError(f"{name} needs a layer, as {name}:8, not {shown(layer)}")
        return WINDOWS[name.lower()](int(layer))
    return text
