"""The Hugging Face cache, read without its library: models--org--name/refs/main names snapshots/<commit>."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tinydrug.errors import BadModelFile

COMMIT = re.compile(r"[0-9a-f]{40}")
SHARD = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Snapshot:
    """One revision of a repository on disk; `missing` names the files without which it is incomplete."""

    path: Path
    commit: str
    missing: tuple[str, ...] = ()


def hub_cache() -> Path:
    """Where huggingface_hub keeps its cache, by the same environment variables in the same order."""
    base = os.environ.get("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
    path = os.path.join(os.environ.get("HF_HOME", os.path.join(base, "huggingface")), "hub")
    path = os.environ.get("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE", path))
    return Path(os.path.expandvars(os.path.expanduser(path)))


def offline_variables() -> tuple[str, ...]:
    """The environment variables that forbid the network here and now."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return tuple(name for name in names if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"})


def repo_folder(repo: str) -> Path:
    return hub_cache() / f"models--{repo.replace('/', '--')}"


def cached_repos() -> list[str]:
    """The ids of the repositories in the cache."""
    folders = (name for name in listing(hub_cache()) if name.startswith("models--"))
    return sorted(name.removeprefix("models--").replace("--", "/", 1) for name in folders)


def find_snapshot(repo: str, revision: str = "main") -> Snapshot | None:
    """The snapshot of `repo` at a branch, tag or commit; None if the cache has none."""
    folder = repo_folder(repo)
    commit = revision
    if not COMMIT.fullmatch(commit):
        try:
            commit = (folder / "refs" / revision).read_text("ascii").strip()
        except (OSError, ValueError):
            return None
    path = folder / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not path.is_dir():
        return None
    return Snapshot(path, commit, missing_files(path))


def missing_files(folder: Path) -> tuple[str, ...]:
    """What a folder lacks to be a whole model: a GGUF, or config, tokenizer and every shard."""
    names = listing(folder)
    if any(name.endswith(".gguf") for name in names):
        return ()
    wanted = {"config.json"}
    if not names.intersection(TOKENIZERS):
        wanted.add(TOKENIZERS[0])
    if INDEX in names:
        try:
            wanted |= shards(folder / INDEX)
        except BadModelFile:
            return (f"{INDEX} (damaged)",)
    elif any("-of-" in name for name in names):  # a shard arrived before the index
        wanted.add(INDEX)
    else:
        wanted.add(SINGLE)
    return tuple(sorted(wanted - names))


def shards(index: Path) -> set[str]:
    """The files an index spreads the weights over; BadModelFile unless each is a bare *.safetensors name."""
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadModelFile(index, f"no index of shards: {error}") from error
    for file in files:
        if not (isinstance(file, str) and SHARD.fullmatch(file)):
            raise BadModelFile(index, f"{file!r} is not the bare name of a safetensors file")
    return files


def listing(folder: Path) -> set[str]:
    """The names in a folder, without links that lead nowhere; empty if it cannot be read."""
    try:
        return {path.name for path in folder.iterdir() if path.exists()}
    except OSError:
        return set()
