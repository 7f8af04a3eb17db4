"""Results as plain files: CSV tables, JSON with the record of the run, NPZ arrays; whole or not at all."""

import csv
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tinydrug.api import Engine
from tinydrug.engine.files import replacing
from tinydrug.engine.record import versions
from tinydrug.errors import ConfigError


def record(engine: Engine, experiment: str, **settings) -> dict:
    """All that is needed to make the same table again: the experiment and its settings, the model with the
    hash of its weights, versions, and when. JSON-safe if the settings are."""
    return {
        "experiment": experiment,
        "settings": settings,
        "model": {"name": engine.name, "source": engine.source, **engine.runtime.identity},
        "made_by": versions() | {"threads": engine.threads},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def folder(path: str | os.PathLike) -> Path:
    """A folder for results, made if missing. ConfigError naming it."""
    if not os.fspath(path):
        raise ConfigError("the name of the folder for results is empty", "path")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be made a folder: {reason}", "path") from None
    return Path(path)


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping]) -> None:
    """A line a row under a header of the first row's keys; an unknown number is empty. ConfigError."""
    if not rows:
        raise ConfigError(f"{path}: there are no results to write", "path")
    with replacing(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        table.writeheader()
        table.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def write_json(path: str | os.PathLike, data) -> None:
    """Plain data, NumPy's included; an unknown number is null. ConfigError."""
    text = to_json(data)
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text + "\n")


def write_npz(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], about: Mapping) -> None:
    """Arrays by name, and under `record` all about them as JSON text. ConfigError."""
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, record=np.array(to_json(about)), **arrays)


def write_text(path: str | os.PathLike, text: str) -> None:
    """A text file, for instance a page. ConfigError."""
    with replacing(path) as partial, open(partial, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def to_json(data) -> str:
    """Valid JSON of plain data and of NumPy's arrays and numbers: what is not finite becomes null."""
    return json.dumps(_plain(data), ensure_ascii=False, allow_nan=False)


def _plain(data):
    match data:
        case Mapping():
            return {str(key): _plain(value) for key, value in data.items()}
        case list() | tuple():
            return [_plain(value) for value in data]
        case np.ndarray() | np.generic():
            return _plain(data.tolist())
        case float():
            return data if math.isfinite(data) else None
        case os.PathLike():
            return os.fspath(data)
    return data


def _cell(value):
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else ""
    return value
