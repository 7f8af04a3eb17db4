"""A folder of generations that survives a kill at any moment: one line of JSON each, with a checksum.

`runs.jsonl` grows by whole lines as generations end. A line that a kill cut short is passed over when the
folder is opened again, and its generation done again; every other counts, so nothing is lost or done twice.
`sweep.json` says what all of them have in common: the plan, the model with the hash of its weights, versions.
"""

import fcntl
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tinydrug.engine.files import replacing
from tinydrug.engine.identity import difference
from tinydrug.errors import ConfigError
from tinydrug.lab.results import folder, to_json, write_text

log = logging.getLogger("tinydrug")

ABOUT, RUNS = "sweep.json", "runs.jsonl"


class Store:
    """The generations in a folder, by the id of their job. One process at a time may add to it."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, dict] = {}

    @classmethod
    @contextmanager
    def writing(cls, path: str | os.PathLike, about: Mapping) -> Iterator["Store"]:
        """The folder, made if missing, open for more rows. ConfigError if another model's, or in use."""
        store = cls(folder(path))
        with open(store.path / RUNS, "a+b") as store._file:
            try:
                fcntl.flock(store._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"{path}: another sweep is writing there", "out") from None
            store._check(about)
            if damaged := store._read():
                log.warning("%s: %d damaged lines are done again", store.path / RUNS, damaged)
            yield store

    @classmethod
    def reading(cls, path: str | os.PathLike) -> tuple["Store", dict]:
        """The folder and what its sweep.json says. ConfigError if there is no sweep, or nothing done yet."""
        store = cls(Path(path))
        try:
            about = json.loads((store.path / ABOUT).read_text("utf-8"))
            with open(store.path / RUNS, "rb") as store._file:
                store._read()
        except OSError as error:
            raise ConfigError(f"{path}: no sweep is there: {error.strerror}", "results") from None
        except ValueError as error:
            raise ConfigError(f"{store.path / ABOUT}: not a sweep: {error}", "results") from None
        if not store.rows:
            raise ConfigError(f"{path}: this sweep has no results yet: run it", "results")
        return store, about

    def add(self, row: Mapping) -> None:
        """Write a generation, whole."""
        self._file.write(b"\n" * self._torn + _line(row))  # what a kill has left stays a line of its own
        self._torn = False
        self._file.flush()
        self.rows[row["id"]] = dict(row)

    def sort(self, ids: Sequence[str]) -> None:
        """Put the lines into the order of these ids, others after them, without damaged ones: a finished
        sweep is the same file whatever happened on the way."""
        place = {id: i for i, id in enumerate(ids)}
        self.rows = dict(
            sorted(self.rows.items(), key=lambda item: (place.get(item[0], len(place)), item[0]))
        )
        with replacing(self.path / RUNS) as partial, open(partial, "wb") as file:
            file.writelines(_line(row) for row in self.rows.values())

    @classmethod
    def known(cls, path: str | os.PathLike, about: Mapping) -> dict:
        """What the sweep.json there says, if it is of the same model; nothing if there is none."""
        try:
            was = json.loads((Path(path) / ABOUT).read_text("utf-8"))
            same = was["model"]["weights"] == about["model"]["weights"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return was if same else {}

    def _check(self, about: Mapping) -> None:
        """Write sweep.json. What was measured by another model is not to be mixed with this."""
        path, about = self.path / ABOUT, json.loads(to_json(about))
        if path.exists():
            try:
                was = json.loads(path.read_text("utf-8"))["model"]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{path}: not a sweep: use another folder, or delete it", "out") from None
            here = {name: value for name, value in about["model"].items() if name not in ("name", "source")}
            if differs := difference({name: was.get(name) for name in here}, here):
                raise ConfigError(
                    f"{self.path}: a sweep of another model: {differs[1]}; use another folder", "out"
                )
        write_text(path, to_json(about) + "\n")

    def _read(self) -> int:
        """Take in the sound lines -> how many are not."""
        self._file.seek(0)
        damaged, line = 0, b"\n"
        for line in self._file:
            row = _parsed(line)
            if row is None:
                damaged += bool(line.strip())
            else:
                self.rows[row["id"]] = row
        self._torn = not line.endswith(b"\n")
        return damaged


def _line(row: Mapping) -> bytes:
    text = json.dumps(row, ensure_ascii=False)
    return f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}\n'.encode()


def _parsed(line: bytes) -> dict | None:
    """What `_line` wrote; None if it is not whole."""
    try:
        row = json.loads(line)
        row.pop("crc")
        return row if line == _line(row) and isinstance(row["id"], str) else None
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
