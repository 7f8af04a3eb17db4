"""The plan of a sweep: prompts, conditions and seeds from a TOML file, checked, and the jobs they make."""

import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from hashlib import blake2s
from importlib.resources import files
from pathlib import Path

from tinydrug.engine.sampling import RULES, Sampling
from tinydrug.errors import ConfigError, TinydrugError
from tinydrug.noise import Schedule
from tinydrug.noise.checks import shown

BUILT_IN = ("grid", "variety", "repeat")  # plans that come with the package
SAMPLERS = [name for name in RULES if name != "seed"]
SOBER = "sober"
MOST_SEEDS = 10_000
BASELINES = (  # beside every sweep, unless the plan says baselines = false
    {"name": "temperature", "temperature": [0.5, 0.8, 1.0, 1.3]},
    {"name": "top-p 0.9", "top_p": 0.9, "temperature": [0.8, 1.0, 1.3, 1.6]},
    {"name": "min-p 0.1", "min_p": 0.1, "temperature": [0.8, 1.0, 1.3, 1.6]},
)


@dataclass(frozen=True)
class Prompt:
    """What is continued: a question put through the chat template, or (chat false) a text as it is."""

    name: str
    text: str
    chat: bool = True
    system: str | None = None

    @property
    def content(self) -> str | list[dict]:
        """As the engine takes it."""
        if not self.chat:
            return self.text
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.text}]


@dataclass(frozen=True)
class Condition:
    """One way to continue a prompt. Those of a family differ in `level` alone: theta, KL, temperature."""

    name: str
    family: str
    level: float
    drug: str = SOBER
    sampling: tuple[tuple[str, float], ...] = ()  # fields of Sampling

    @property
    def is_random(self) -> bool:
        """Whether seeds make a difference."""
        return dict(self.sampling).get("temperature", 0) > 0 or not Schedule.parse(self.drug).is_sober


@dataclass(frozen=True)
class Job:
    """One generation of a sweep."""

    prompt: Prompt
    condition: Condition
    seed: int
    n: int
    ignore_eos: bool

    @cached_property
    def id(self) -> str:
        """Equal for equal work: a hash of all that decides what comes out, but the model."""
        plain = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return blake2s(plain.encode(), digest_size=10).hexdigest()


@dataclass(frozen=True)
class Plan:
    """A checked plan. `match`: words that samples are cut to before their spread is measured. A sample is
    coherent if its sober perplexity is at most `max_perplexity` and it does not loop."""

    prompts: tuple[Prompt, ...]
    conditions: tuple[Condition, ...]
    seeds: tuple[int, ...]
    n: int = 100
    match: int = 50
    max_perplexity: float = 25.0
    ignore_eos: bool = False
    model: str | None = None

    @cached_property
    def jobs(self) -> list[Job]:
        """Every job once, prompt by prompt. What seeds cannot change is done with the first one."""
        return [
            Job(prompt, condition, seed, self.n, self.ignore_eos)
            for prompt in self.prompts
            for condition in self.conditions
            for seed in (self.seeds if condition.is_random else self.seeds[:1])
        ]

    def to_dict(self) -> dict:
        return asdict(self)


def load_plan(path: str | Path) -> Plan:
    """The plan in a TOML file, or one that comes with the package: grid, variety, repeat. ConfigError naming
    the file and the key."""
    name = str(path)
    try:
        if name in BUILT_IN and not Path(name).is_file():
            text = files("tinydrug.lab").joinpath("plans", f"{name}.toml").read_text("utf-8")
        else:
            text = Path(path).read_text("utf-8-sig")
        return read_plan(tomllib.loads(text))
    except OSError as error:
        raise ConfigError(
            f"{name}: {error.strerror}; plans of the package are {', '.join(BUILT_IN)}", "plan"
        ) from None
    except TinydrugError as error:
        raise ConfigError(f"{name}: {error}", getattr(error, "field", "")) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML
        raise ConfigError(f"{name}: is not TOML: {error}", "plan") from None


def read_saved(data: Mapping) -> Plan:
    """What `Plan.to_dict` gave, also as it comes back from JSON. KeyError, TypeError, ValueError if not."""
    conditions = [
        Condition(**given | {"sampling": tuple((name, value) for name, value in given["sampling"])})
        for given in data["conditions"]
    ]
    prompts = [Prompt(**given) for given in data["prompts"]]
    return Plan(
        **data | {"prompts": tuple(prompts), "conditions": tuple(conditions), "seeds": tuple(data["seeds"])}
    )


def read_plan(data: Mapping) -> Plan:
    """A plan from the tables of its TOML. ConfigError or DrugError naming the key."""
    known = ("prompts", "prompt", "seeds", "grid", "family", "baselines", *OPTIONS)
    _only(data, known, "a plan")
    options = {name: _option(data[name], name, *rule) for name, rule in OPTIONS.items() if name in data}
    conditions = [Condition(SOBER, SOBER, 0.0)]
    if "grid" in data:
        conditions += _grid(data["grid"])
    given = _tables(data, "family")
    for i, table in enumerate(given):
        conditions += _family(table, f"family {i + 1}")
    if _option(data.get("baselines", True), "baselines", bool, None, "true or false"):
        conditions += [each for table in BASELINES for each in _family(table, table["name"])]
    _no_twins([condition.name for condition in conditions], "condition")
    return Plan(_prompts(data), tuple(conditions), _seeds(data.get("seeds", 5)), **options)


def _prompts(data: Mapping) -> tuple[Prompt, ...]:
    """`prompts`, a list of questions, and the tables [[prompt]]."""
    prompts = []
    for text in _list(
        data.get("prompts", []), "prompts", str, empty="prompt" in data or "prompts" not in data
    ):
        prompts.append(Prompt(text if len(text) <= 40 else f"{text[:39]}…", text))
    for i, table in enumerate(_tables(data, "prompt")):
        where = f"prompt {i + 1}"
        _only(table, [field.name for field in fields(Prompt)], where)
        for key, kind in (("name", str), ("text", str), ("chat", bool), ("system", str)):
            if key in table and not isinstance(table[key], kind):
                raise ConfigError(f"{where}: {key}: {table[key]!r:.60} is not {KINDS[kind]}", "prompt")
        if not table.get("text"):
            raise ConfigError(f"{where}: text: it is missing", "prompt")
        prompts.append(Prompt(**{"name": table["text"][:40]} | table))
    if not prompts:
        raise ConfigError('prompts: there are none: write prompts = ["Tell me about the sea."]', "prompts")
    if any(not prompt.text.strip() for prompt in prompts):
        raise ConfigError("prompts: one is empty", "prompts")
    _no_twins([prompt.name for prompt in prompts], "prompt")
    return tuple(prompts)


def _seeds(value) -> tuple[int, ...]:
    """A number of seeds, from 0 on, or a list of them."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= MOST_SEEDS:
            raise ConfigError(f"seeds: {shown(value)} is not a number from 1 to {MOST_SEEDS}", "seeds")
        return tuple(range(value))
    seeds = _list(value, "seeds", int)
    if any(not 0 <= seed < 2**64 for seed in seeds):
        raise ConfigError("seeds: one is not in [0, 2**64)", "seeds")
    _no_twins(seeds, "seed")
    return tuple(seeds)


def _grid(table) -> list[Condition]:
    """sites x laws x doses. `doses`: a list for all sites, or a table of one each; `where`: which layers."""
    if not isinstance(table, Mapping):
        raise ConfigError("grid: write it as a table, [grid]", "grid")
    _only(table, ("sites", "laws", "doses", "where"), "grid")
    sites = _list(table.get("sites"), "grid: sites", str)
    laws = _list(table.get("laws", ["uniform"]), "grid: laws", str)
    where, doses = table.get("where", ""), table.get("doses")
    if not isinstance(where, str):
        raise ConfigError(f"grid: where: {where!r:.60} is not a text such as 8-15", "grid")
    if isinstance(doses, Mapping) and (missing := [site for site in sites if site not in doses]):
        raise ConfigError(f"grid: doses: none for site {missing[0]}", "grid")
    conditions = []
    for site in sites:
        levels = _list(doses[site] if isinstance(doses, Mapping) else doses, f"grid: doses of {site}", object)
        for law in laws:
            for dose in levels:
                if isinstance(dose, bool) or not isinstance(dose, (int, float, str)):
                    raise ConfigError(f"grid: doses: {dose!r:.60} is not a number of radians", "doses")
                text = f"{site}:{dose}{where and f'@{where}'}~{law}"
                conditions.append(_drugged(text, f"{site} {law}", "grid"))
    return conditions


def _family(table, where: str) -> list[Condition]:
    """Conditions that differ in one thing: the field of Sampling, or the drug, that is given as a list."""
    _only(table, ("name", "drug", *SAMPLERS), where)
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: name: it is missing", "family")
    lists = [key for key, value in table.items() if isinstance(value, list)]
    if len(lists) != 1:
        raise ConfigError(
            f"{where}: one of drug, {', '.join(SAMPLERS)} must be a list: what its conditions differ in",
            "family",
        )
    axis, conditions = lists[0], []
    for position, value in enumerate(_list(table[axis], f"{where}: {axis}", object)):
        chosen = {key: table[key] for key in table if key not in ("name", axis)} | {axis: value}
        drug = chosen.pop("drug", SOBER)
        if not isinstance(drug, str):
            raise ConfigError(f"{where}: drug: {drug!r:.60} is not a text such as V:0.1", "family")
        try:
            Sampling(**chosen)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}", "family") from None
        made = _drugged(drug, name, where, position + 1.0)
        label = drug if axis == "drug" else f"{name} {'T ' if axis == 'temperature' else ''}{value}"
        level = made.level if axis == "drug" else float(value)
        conditions.append(Condition(label, name, level, made.drug, tuple(sorted(chosen.items()))))
    return conditions


def _drugged(text: str, family: str, where: str, position: float = 0.0) -> Condition:
    """A condition of this drug. Its level is the dose's theta or KL, or its position if there are several."""
    try:
        doses = Schedule.parse(text).doses
    except TinydrugError as error:
        raise ConfigError(f"{where}: {error}", "drug") from None
    theta = doses[0].theta if len(doses) == 1 else ()
    level = position if isinstance(theta, tuple) else float(getattr(theta, "kl", theta))
    return Condition(text, family, level, text)


def _only(table, known: Iterable[str], what: str) -> None:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{what}: write it as a table", what)
    for key in table:
        if key not in known:
            raise ConfigError(f"{key}: {what} has no such key, only {', '.join(known)}", key)


def _tables(data: Mapping, name: str) -> list:
    tables = data.get(name, [])
    if not isinstance(tables, list):
        raise ConfigError(f"{name}: write [[{name}]] above each", name)
    return tables


def _list(value, what: str, kind: type, empty: bool = False) -> list:
    if not isinstance(value, list) or any(
        not isinstance(item, kind) or (kind is int and isinstance(item, bool)) for item in value
    ):
        items = {str: " of texts", int: " of whole numbers"}.get(kind, "")
        raise ConfigError(f"{what}: {value!r:.60} is not a list{items}", what)
    if not value and not empty:
        raise ConfigError(f"{what}: the list is empty", what)
    return value


def _option(value, name: str, kind, sound, words: str):
    if (
        isinstance(value, bool) != (kind is bool)
        or not isinstance(value, kind)
        or (sound and not sound(value))
    ):
        raise ConfigError(f"{name}: {value!r:.60} is not {words}", name)
    return value


def _no_twins(names: list, what: str) -> None:
    name, times = next(iter(Counter(names).most_common(1)), (None, 0))
    if times > 1:
        raise ConfigError(f"{what} {name!r} is there twice", what)


KINDS = {str: "a text", bool: "true or false"}
OPTIONS = {  # key: type, what holds of a sound value, and that in words
    "n": (int, lambda n: n >= 1, "a number of tokens of at least 1"),
    "match": (int, lambda n: n >= 1, "a number of words of at least 1"),
    "max_perplexity": ((int, float), lambda x: x > 1, "a perplexity above 1"),
    "ignore_eos": (bool, None, "true or false"),
    "model": (str, bool, "the name of a model"),
}
