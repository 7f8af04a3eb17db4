"""Which model and which program this is: identities (`Runtime.identity`) compared, and the version."""

import importlib
from collections.abc import Mapping
from reprlib import repr as short


def difference(was: Mapping, here: Mapping) -> tuple[str, str] | None:
    """The first thing in which they differ, its name and a sentence about it; None if they are the same."""
    for name in [*here, *(name for name in was if name not in here)]:
        one, other = was.get(name), here.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            if inner := difference(one, other):
                return f"{name}.{inner[0]}", f"{name}.{inner[1]}"
        elif one != other:
            return name, f"{name} was {short(one)}, here it is {short(other)}"
    return None


def package_version() -> str:
    """Of this package, whose foot imports nothing of it: so this is no import upwards."""
    return importlib.import_module("tinydrug").__version__
