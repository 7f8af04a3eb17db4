"""Checks of whole numbers that callers give: one, or a list of them. ConfigError names the argument."""

import operator
from collections.abc import Iterable

from tinydrug.errors import ConfigError
from tinydrug.noise.checks import shown

MOST = 2**31 - 1  # tokens: what options may ask for is what a record can hold


def whole(value, name: str, least: int = 0, most: int = MOST, field: str = "") -> int:
    """A whole number of any library's kind as a plain one. ConfigError unless from `least` to `most`."""
    try:
        found = operator.index(value)
    except TypeError:
        found = least - 1
    if isinstance(value, bool) or not least <= found <= most:
        bound = f"most {most}" if found > most else f"least {least}"
        raise ConfigError(f"{name}: {shown(value)} is not a whole number of at {bound}", field or name)
    return found


def wholes(values: Iterable[int], name: str) -> tuple[int, ...]:
    """Whole numbers of any library's kind as plain ones. ConfigError unless they are at least 0."""
    try:
        values = tuple(values)
        found = tuple(map(operator.index, values))
    except TypeError:  # no list, or of something else
        found = (-1,)
    if min(found, default=0) < 0 or any(isinstance(value, bool) for value in values):
        raise ConfigError(f"{name}: expected a list of whole numbers of at least 0", name)
    return found
