"""The record of a generation: all that is needed to run it again, as JSON, and what came out.

Bits depend on the model (weights, quantisation, cache type, context, tokenizer), on the prompt and on how the
part of it that was kept from earlier had been written, on noise, sampler and limits. They do not depend on
threads, chunk, batch or instruction set, which are noted all the same, with the versions.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from math import isfinite
from platform import python_version

from tinydrug.engine.checks import MOST
from tinydrug.engine.files import replacing
from tinydrug.engine.history import Noise, Write, check
from tinydrug.engine.identity import difference, package_version
from tinydrug.engine.sampling import RULES, Sampling
from tinydrug.errors import ConfigError
from tinydrug.noise.schedule import MAX_SEED

FORMAT = "tinydrug record 1"
LIBRARIES = ("numpy", "numba", "llvmlite")


@dataclass(frozen=True)
class Record:
    """One generation; `Engine.replay` runs it again."""

    made_by: dict  # versions, instruction set, threads, chunk
    model: dict  # name and source, and the runtime's identity
    prompt_ids: tuple[int, ...]
    kept: int  # so many of them were in the cache when it began,
    history: tuple[Write, ...]  # written in this way
    noise: Noise  # of what was generated; prompt tokens get it as its schedule says
    rewind_every: int
    sampling: Sampling  # with the seed that was used
    n: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    shift_keep: int | None
    ids: tuple[int, ...]
    finish_reason: str
    text: str
    obstacle: str | None = None  # why it cannot be run again

    def to_dict(self) -> dict:
        """Plain data, JSON-safe."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["history"] = [write.to_dict() for write in self.history]
        plain["noise"] = self.noise.to_dict()
        plain["sampling"] = _plain_sampling(self.sampling)
        for name in ("prompt_ids", "stop", "ids"):
            plain[name] = list(plain[name])
        return {"format": FORMAT, **plain}

    @classmethod
    def from_dict(cls, data: Mapping) -> "Record":
        """What `to_dict` gave. ConfigError naming the field."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ConfigError(f"not a record: its format is not {FORMAT!r}", "format")
        names = [field.name for field in fields(cls)]
        for name in names:
            if name not in data:
                raise ConfigError(f"{name}: it is missing", name)
        for name in data:
            if name not in (*names, "format"):
                raise ConfigError(f"{name}: a record has no such field", name)
        values = {}
        for name in names:
            try:
                values[name] = READERS[name](data[name])
            except (ValueError, TypeError, RecursionError) as error:
                raise ConfigError(f"{name}: {error}", name) from None
        record = cls(**values)
        try:
            check(record.history, record.kept)
            if record.kept and record.kept >= len(record.prompt_ids):
                raise ValueError(f"{record.kept} tokens were kept of a prompt of {len(record.prompt_ids)}")
        except ValueError as error:
            raise ConfigError(f"history: {error}", "history") from None
        return record

    def save(self, path: str | os.PathLike) -> None:
        """Write a JSON file, whole or not at all. ConfigError naming the path."""
        with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
            file.write(self.to_json())

    def to_json(self) -> str:
        """A line a field."""
        lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in self.to_dict().items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Record":
        """ConfigError naming the path, and the field that is wrong."""
        path = os.fspath(path)
        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}", "path") from None
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
            raise ConfigError(f"{path}: not a record: {error}", "path") from None
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}", error.field) from None

    def check(self, identity: Mapping) -> None:
        """ConfigError naming the reason if a runtime of this identity cannot run it again."""
        if self.obstacle:
            raise ConfigError(f"this record cannot be replayed: {self.obstacle}", "obstacle")
        if differs := self.foreign(identity):
            raise ConfigError(f"this record is of another model: {differs[1]}", differs[0])

    def foreign(self, identity: Mapping) -> tuple[str, str] | None:
        """The first thing in which its model differs, its name and a sentence on it; None if nothing does."""
        return difference({name: self.model.get(name) for name in identity}, identity)

    def difference(self, ids: Sequence[int], finish_reason: str) -> str | None:
        """The first thing in which another run of it came out differently, in words; None if nothing is."""
        for i, (was, now) in enumerate(zip(self.ids, ids, strict=False)):
            if was != now:
                return f"token {i} was {was}, now it is {now}"
        if len(self.ids) != len(ids):
            return f"it had {len(self.ids)} tokens, now it has {len(ids)}"
        if finish_reason != self.finish_reason and self.finish_reason != "cancelled":
            return f"it ended by {self.finish_reason}, now by {finish_reason}"
        return None

    def other_versions(self) -> list[str]:
        """What made it and is different here, in words; its bits should not depend on these."""
        return [
            f"{name} was {self.made_by.get(name)}, here it is {here}"
            for name, here in versions().items()
            if self.made_by.get(name) != here
        ]


def versions() -> dict[str, str]:
    """Of what computes, and its instruction set."""
    from tinydrug.kernels.isa import ISA  # imports LLVM: a bad record is refused without

    found = {"tinydrug": package_version(), "python": python_version()}
    return found | {name: version(name) for name in LIBRARIES} | {"isa": ISA}


def obstacle(sampling: Sampling) -> str | None:
    """Why a generation with this sampling cannot be run from its record."""
    names = [getattr(f, "__name__", type(f).__name__) for f in sampling.processors]
    return f"its sampling.processors are code: {', '.join(names)}" if names else None


def _plain_sampling(sampling: Sampling) -> dict:
    pairs = [[i, b if isfinite(b) else str(b)] for i, b in sampling.logit_bias]  # JSON has no -inf
    return {name: getattr(sampling, name) for name in RULES} | {"logit_bias": pairs}


def _sampling(data) -> Sampling:
    plain = dict(_object(data))
    plain["logit_bias"] = [(i, float(b)) for i, b in plain.get("logit_bias", ())]
    if plain.get("seed") is None or plain.keys() - {*RULES, "logit_bias"}:
        raise ValueError(f"expected {', '.join(RULES)} and logit_bias")
    return Sampling(**plain)


def _object(data) -> dict:
    if not isinstance(data, Mapping):
        raise ValueError("not an object")
    return dict(data)


def _model(data) -> dict:
    model = _object(data)
    for name in ("name", "source", "quant", "cache"):
        _text(model.get(name))
    _whole(model.get("n_ctx"))
    if model.get("features") is not None:
        features = _object(model["features"])
        _whole(features.get("m")), _whole(features.get("seed"), MAX_SEED)
    return model


def _list(data) -> list:
    if not isinstance(data, list):
        raise ValueError("not a list")
    return data


def _ids(data) -> tuple[int, ...]:
    return tuple(_whole(i) for i in _list(data))


def _whole(data, most: int = MOST) -> int:
    if type(data) is not int or not 0 <= data <= most:
        raise ValueError(f"{data!r:.40} is not a whole number")
    return data


def _text(data) -> str:
    if not isinstance(data, str):
        raise ValueError(f"{data!r:.40} is not a text")
    return data


def _flag(data) -> bool:
    if not isinstance(data, bool):
        raise ValueError(f"{data!r:.40} is not true or false")
    return data


def _optional(read):
    return lambda data: None if data is None else read(data)


READERS = {  # field: from JSON, or ValueError
    "made_by": _object,
    "model": _model,
    "prompt_ids": _ids,
    "kept": _whole,
    "history": lambda data: tuple(map(Write.from_dict, _list(data))),
    "noise": Noise.from_dict,
    "rewind_every": _whole,
    "sampling": _sampling,
    "n": _optional(_whole),
    "stop": lambda data: tuple(map(_text, _list(data))),
    "ignore_eos": _flag,
    "shift_keep": _optional(_whole),
    "ids": _ids,
    "finish_reason": _text,
    "text": _text,
    "obstacle": _optional(_text),
}
