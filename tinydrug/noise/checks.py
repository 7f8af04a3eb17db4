"""Small checks the noise values share: strict numbers, names found in a registry, errors that say where."""

import math
import re
from collections.abc import Mapping
from contextlib import contextmanager
from numbers import Integral, Real

from tinydrug.errors import DrugError

NUMBER = re.compile(r"[+-]?((\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)", re.ASCII | re.IGNORECASE)


@contextmanager
def at(place: str):
    """Put `place` before the message of a DrugError raised inside."""
    try:
        yield
    except DrugError as error:
        raise DrugError(f"{place}: {error}") from None


def shown(value) -> str:
    """A value as an error message shows it: on one line, not too long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, a list of thousands of levels
        return f"that {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-30:]}"


def number(value, what: str, least: float = -math.inf) -> float:
    """A finite float of at least `least`, or DrugError."""
    try:
        result = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an int beyond any float
        result = math.inf
    if not math.isfinite(result):
        raise DrugError(f"{what} must be a finite number, not {shown(value)}")
    if result < least:
        raise DrugError(f"{what} must be at least {write_number(least)}, not {write_number(result)}")
    return result + 0.0  # -0.0 becomes 0.0, so that equal doses print the same


def whole(value, what: str, least: int, most: int) -> int:
    """An int from `least` to `most` inclusive, or DrugError."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= value <= most:
        raise DrugError(f"{what} must be a whole number from {least} to {most}, not {shown(value)}")
    return int(value)


def read_number(text: str, what: str, least: float = -math.inf) -> float:
    """The number that `text` spells (no underscores, no other alphabets), checked like `number`."""
    text = text.strip()
    if not NUMBER.fullmatch(text):
        raise DrugError(f"{what} {shown(text)} is not a number" if text else f"{what} is missing")
    return number(float(text), what, least)


def write_number(value: float) -> str:
    """The shortest text that reads back as the same float: 0.05, 1, 1e-07."""
    return repr(float(value)).removesuffix(".0")


def find(registry: Mapping, name: str, what: str) -> str:
    """The registry's own spelling of `name`, whatever its case, or DrugError with all there are."""
    for key in registry:
        if isinstance(name, str) and key.lower() == name.strip().lower():
            return key
    raise DrugError(f"there is no {what} {shown(name)}, only {', '.join(registry)}")
