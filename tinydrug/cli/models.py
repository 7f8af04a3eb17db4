"""`tinydrug models`: the names a model can be called by, and which of them are on this disk."""

from pathlib import Path

from tinydrug.cli.options import Formatter, Parser
from tinydrug.errors import ModelNotFound
from tinydrug.hub import home, resolve
from tinydrug.hub.cache import listing
from tinydrug.hub.table import SOURCE, read_table


def run(argv: list[str]) -> int:
    """Print the list; returns the exit status."""
    Parser("tinydrug models", description=__doc__.strip(), formatter_class=Formatter).parse_args(argv)
    table = read_table()
    rows = []
    for name, model in table.models.items():
        mark = " (default)" if name == table.default else ""
        rows.append((name + mark, f"{model.gb:g} GB", _here(name), f"{model.source}, {model.license}"))
    for name in sorted(listing(home()) - table.models.keys()):
        if (home() / name).is_dir() or name.endswith(".gguf"):
            rows.append((name, _size(home() / name), _here(name), _origin(home() / name)))
    for name, size, here, source in rows:
        print(f"{name:<28} {size:>8}  {here:<8}  {source}")
    return 0


def _size(path: Path) -> str:
    files = path.iterdir() if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files if file.is_file()) / 1e9:.2g} GB"


def _origin(path: Path) -> str:
    """What the files of a model say of themselves: those of packed weights, what they were packed from."""
    source = path / SOURCE
    said = source.read_text("utf-8", "replace").partition("\n")[0] if source.is_file() else ""
    return said if said and said.isprintable() else "your own"


def _here(name: str) -> str:
    try:
        resolve(name, pull=False, offline=True)
    except ModelNotFound:
        return ""
    return "on disk"
