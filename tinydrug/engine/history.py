"""How the rows of a cache came to be what they are: every write since all of it was sober, in order.

For example 50 tokens read, 20 generated under noise, the first 8 of these sobered up, 5 more generated:
(50, 70, noise), (50, 58, sober), (70, 75, noise). Rows before the first write are sober.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tinydrug.noise import Schedule


@dataclass(frozen=True)
class Noise:
    """All that decides which noise a sequence gets."""

    schedule: Schedule
    seed: int  # in [0, 2**64)
    born: int = 0  # position of the first generated token: ramps count from it
    protect: tuple[int, ...] = ()  # positions that are never touched,
    protect_ids: tuple[int, ...] = ()  # and tokens

    def to_dict(self) -> dict:
        """Plain data, JSON-safe."""
        ids = {"protect": list(self.protect), "protect_ids": list(self.protect_ids)}
        return {"schedule": self.schedule.to_dict(), "seed": self.seed, "born": self.born, **ids}

    @classmethod
    def from_dict(cls, data: Mapping) -> "Noise":
        """ValueError, or DrugError, which is one."""
        _check_keys(cls, data)
        lists = {name: tuple(_wholes(data[name], name)) for name in ("protect", "protect_ids")}
        seed, born = _wholes([data["seed"], data["born"]], "seed and born")
        if seed >= 1 << 64:
            raise ValueError(f"seed {seed} does not fit 64 bits")
        return cls(Schedule.from_dict(data["schedule"]), seed, born, **lists)


@dataclass(frozen=True)
class Write:
    """Rows first .. last - 1, written under noise or (None) without."""

    first: int
    last: int
    noise: Noise | None = None

    def to_dict(self) -> dict:
        """Plain data, JSON-safe."""
        return {"first": self.first, "last": self.last, "noise": self.noise and self.noise.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping) -> "Write":
        """ValueError, or DrugError, which is one."""
        _check_keys(cls, data)
        first, last = _wholes([data["first"], data["last"]], "first and last")
        return cls(first, last, None if data["noise"] is None else Noise.from_dict(data["noise"]))


def note(history: list[Write], write: Write) -> None:
    """Add a write; one that goes on where the last one ended, in the same way, makes that one longer."""
    if history and history[-1].last == write.first and history[-1].noise == write.noise:
        write = replace(write, first=history.pop().first)
    history.append(write)


def cut(history: Sequence[Write], pos: int) -> list[Write]:
    """What is left of it when rows from `pos` on are forgotten."""
    return [replace(write, last=min(write.last, pos)) for write in history if write.first < pos]


def check(history: Sequence[Write], rows: int) -> None:
    """ValueError unless these writes can have made so many rows."""
    if history and history[0].noise is None:
        raise ValueError("its first write is sober")
    end = history[0].first if history else rows
    for write in history:
        again = write.noise is None and write.last <= end
        if write.first >= write.last or not (again or write.first == end):
            raise ValueError(f"rows {write.first} to {write.last} cannot be written after row {end}")
        end = max(end, write.last)
    if end != rows:
        raise ValueError(f"it makes {end} rows, not {rows}")


def _check_keys(kind: type, data: Mapping) -> None:
    names = kind.__dataclass_fields__.keys()
    if not isinstance(data, Mapping) or data.keys() != names:
        raise ValueError(f"a {kind.__name__.lower()} has {', '.join(names)}")


def _wholes(values, what: str) -> list[int]:
    """Whole numbers of 0 or more."""
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{what}: not whole numbers of 0 or more")
    return values
