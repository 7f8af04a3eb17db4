"""What becomes of a dose over time: when its draws are renewed, and how its angle fades."""

from dataclasses import dataclass

from tinydrug.errors import DrugError
from tinydrug.noise.checks import number, read_number, shown, write_number

RENEWALS = {  # when a direction is drawn: code, and what it means
    "fresh": (0, "at every step"),
    "held": (1, "once for a whole generation"),
    "wander": (2, "slowly, so that after `tokens` nothing is left of it"),
}
RAMPS = {  # theta over generated tokens: code, and what it means
    "constant": (0, "theta stays"),
    "cosine": (1, "from theta to 0 over `over` tokens, by half a cosine"),
    "linear": (2, "from theta to 0 over `over` tokens, in a straight line"),
}
TIMED = {"wander": "tokens", "cosine": "over", "linear": "over"}  # what needs a number of tokens


@dataclass(frozen=True)
class Time:
    """`renewal` and `ramp` with their lengths in tokens; `tied`: all layers of the dose share one direction.

    A held direction is one for all tokens; held noise in the cache (K, V) is one for each cached position.
    """

    renewal: str = "fresh"
    tokens: float = 0.0
    ramp: str = "constant"
    over: float = 0.0
    tied: bool = False

    def __post_init__(self):
        for kind, registry in (("renewal", RENEWALS), ("ramp", RAMPS)):
            name = getattr(self, kind)
            if not isinstance(name, str) or name not in registry:
                raise DrugError(f"there is no {kind} {shown(name)}, only {', '.join(registry)}")
        for kind, length in (("renewal", "tokens"), ("ramp", "over")):
            value = number(getattr(self, length), length, least=0)
            timed = getattr(self, kind) in TIMED
            if timed and value == 0:
                raise DrugError(
                    f"{getattr(self, kind)} needs its length in tokens: {getattr(self, kind)}:200"
                )
            if not timed and value:
                raise DrugError(f"{length} says nothing for {kind} {getattr(self, kind)}")
            object.__setattr__(self, length, value)
        if not isinstance(self.tied, bool):
            raise DrugError(f"tied must be true or false, not {shown(self.tied)}")

    def __str__(self) -> str:
        parts = []
        if self.renewal != "fresh":
            parts.append(self.renewal + (f":{write_number(self.tokens)}" if self.tokens else ""))
        if self.ramp != "constant":
            parts.append(f"{self.ramp}:{write_number(self.over)}")
        return "+".join([*parts, *(["tied"] if self.tied else [])])

    def to_dict(self) -> dict:
        """The fields that are not as usual."""
        usual = Time()
        return {name: getattr(self, name) for name in FIELDS if getattr(self, name) != getattr(usual, name)}


def parse_time(words: list[str]) -> Time:
    """`held`, `wander:32`, `cosine:200`, `linear:200`, `tied`, each at most once. Raises DrugError."""
    fields = {}
    for word in words:
        name, colon, length = (part.strip().lower() for part in word.partition(":"))
        kind = "renewal" if name in RENEWALS else "ramp" if name in RAMPS else name
        if kind in fields:
            raise DrugError(f"{kind} is given twice: keep one")
        if name == "tied" and not colon:
            fields["tied"] = True
            continue
        if kind == name:
            known = ", ".join([*RENEWALS, *RAMPS, "tied"])
            raise DrugError(f"there is no {shown(word)}: over time there are {known}")
        fields[kind] = name
        if colon:
            fields["tokens" if kind == "renewal" else "over"] = read_number(
                length, f"tokens of {name}", least=0
            )
    return Time(**fields)


FIELDS = ("renewal", "tokens", "ramp", "over", "tied")
FRESH = Time()
