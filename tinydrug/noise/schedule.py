"""The schedule: every dose of a run and the rules they share, as a value to compare, print and save."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import groupby, pairwise
from typing import Literal

import numpy as np

from tinydrug.errors import DrugError
from tinydrug.noise.checks import at, number, read_number, shown, whole, write_number
from tinydrug.noise.dose import Dose, parse_dose
from tinydrug.noise.drift import KINDS as TERM_KINDS
from tinydrug.noise.drift import TABLE as TERM_TABLE
from tinydrug.noise.drift import TERMS, Term, as_term, parse_term
from tinydrug.noise.laws import KINDS, LAWS
from tinydrug.noise.sites import SITES
from tinydrug.noise.time import FRESH, RAMPS, RENEWALS

TABLE = np.dtype(
    [
        ("theta", "f8"),
        *((kind, "u1") for kind in KINDS),
        *(("renewal", "u1"), ("tokens", "f8"), ("ramp", "u1"), ("over", "f8"), ("tied", "u1")),
    ]
)
PROMPTS = ("none", "last", "all")
MAX_SINK = 2**31 - 1
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Schedule:
    """The doses, at most one a site and kept in the order of SITES, and what holds for all of them.

    `sink`: positions below it, in tokens, are never touched. `prompt`: which of the prompt's positions are
    read under noise. `scale` multiplies every theta and term; 0 is sober. `seed` of the noise; None leaves it
    to whoever runs the schedule. `drift` and `diffusion` are terms, or their text or amount. `str` gives the
    text that `parse` reads. Raises DrugError.
    """

    doses: tuple[Dose, ...] = ()
    sink: int = 6
    prompt: Literal["none", "last", "all"] = "none"
    scale: float = 1.0
    seed: int | None = None
    drift: Term | None = None
    diffusion: Term | None = None

    def __post_init__(self):
        for dose in self.doses:
            if not isinstance(dose, Dose):
                raise DrugError(f"a dose must be a Dose, not {shown(dose)}: Schedule.parse reads text")
        doses = tuple(sorted(self.doses, key=lambda dose: SITES[dose.site].code))
        for one, other in pairwise(doses):
            if one.site == other.site:
                raise DrugError(f"site {one.site} is dosed twice, {one} and {other}: keep one")
        if self.prompt not in PROMPTS:
            raise DrugError(f"prompt must be {' or '.join(PROMPTS)}, not {shown(self.prompt)}")
        object.__setattr__(self, "doses", doses)
        object.__setattr__(self, "sink", whole(self.sink, "sink", 0, MAX_SINK))
        object.__setattr__(self, "scale", number(self.scale, "scale", least=0))
        if self.seed is not None:
            object.__setattr__(self, "seed", whole(self.seed, "seed", 0, MAX_SEED))
        for name in TERMS:
            object.__setattr__(self, name, as_term(name, getattr(self, name)))

    @classmethod
    def parse(cls, specs: "str | Dose | Iterable[str | Dose] | Schedule | None", **options) -> "Schedule":
        """A schedule from text: doses and terms by commas or in several strings, options as `sink=0` too.

        `options` (sink, prompt, scale, seed, drift, diffusion) override those of the text; one that is None
        counts as not given. None and `sober` are no dose at all. Raises DrugError.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if isinstance(specs, Schedule):
            return replace(specs, **given)
        specs = [specs] if isinstance(specs, (str, Dose)) else () if specs is None else specs
        if not isinstance(specs, Iterable):
            raise DrugError(f"drug must be text, doses or a Schedule, not {shown(specs)}")
        items = [item for spec in specs for item in (spec.split(",") if isinstance(spec, str) else [spec])]
        doses, written, sober = [], {}, False
        for item in items:
            if not isinstance(item, str):
                doses.append(item)
            elif item.strip().lower() == "sober":
                sober = True
            elif "=" in item and ":" not in item.partition("=")[0]:  # V:kl=0.05 is a dose
                name, value = _parse_option(item)
                if name in written:
                    raise DrugError(f"{name} is given twice: keep one")
                written[name] = value
            elif (name := item.partition(":")[0].strip().lower()) in TERMS:
                if name in written:
                    raise DrugError(f"{name} is given twice: keep one")
                written[name] = parse_term(item)
            else:
                doses.append(parse_dose(item))
        if sober and (present := [*doses, *(written[name] for name in TERMS if name in written)]):
            raise DrugError(f"sober and {present[0]} contradict each other: keep one")
        return cls(tuple(doses), **{**written, **given})

    @property
    def is_sober(self) -> bool:
        """No layer of any model gets noise from this schedule."""
        return self.scale == 0 or all(each.peak == 0 for each in (*self.doses, *self.terms))

    @property
    def is_open(self) -> bool:
        """Whether a dose is told by its effect, so that its angle is yet to be found."""
        return any(dose.is_open for dose in self.doses)

    @property
    def terms(self) -> tuple[Term, ...]:
        """Drift and diffusion, those that are given."""
        return tuple(term for term in (self.drift, self.diffusion) if term is not None)

    def with_seed(self, seed: int | None) -> "Schedule":
        return replace(self, seed=seed)

    def table(self, n_layers: int) -> np.ndarray:
        """A row a layer, a column a site, (L, n_sites) of TABLE: theta in radians with profile and scale
        applied, the codes of law, form and angle, and what becomes of it over time. All zero when sober.

        Raises DrugError when a dose does not fit a model of this many layers.
        """
        table = np.zeros((n_layers, len(SITES)), TABLE)
        for dose in () if self.is_sober else self.doses:
            column = table[:, SITES[dose.site].code]
            column["theta"] = dose.thetas(n_layers, self.scale)
            for kind, registry in KINDS.items():
                column[kind] = registry[getattr(dose, kind)].code
            time = dose.time
            column["renewal"], column["ramp"] = RENEWALS[time.renewal][0], RAMPS[time.ramp][0]
            column["tokens"], column["over"], column["tied"] = time.tokens, time.over, time.tied
        return table

    def term_table(self, n_layers: int) -> np.ndarray:
        """A row a layer, (L,) of TERM_TABLE: amounts with profile and scale applied. DrugError as `table`."""
        table = np.zeros(n_layers, TERM_TABLE)
        for term in () if self.is_sober else self.terms:
            table[term.kind] = term.amounts(n_layers, self.scale)
        return table

    def describe(self, n_layers: int) -> str:
        """The table as text: a row a layer, equal neighbours folded, a column a dosed site or term."""
        thetas = self.table(n_layers)["theta"]  # (L, n_sites)
        amounts = self.term_table(n_layers)  # (L,)
        dosed = [dose for dose in self.doses if thetas[:, SITES[dose.site].code].any()]
        kinds = [term.kind for term in self.terms if amounts[term.kind].any()]
        scale, seed = write_number(self.scale), "none" if self.seed is None else self.seed
        options = f"sink {self.sink}, prompt {self.prompt}, scale {scale}, seed {seed}"
        if not dosed and not kinds:
            return f"sober: no noise at any site of {n_layers} layers\n{options}"
        laws = ", ".join(dict.fromkeys(dose.law for dose in dosed))
        columns = [thetas[:, SITES[dose.site].code] for dose in dosed] + [amounts[kind] for kind in kinds]
        cells = np.stack(columns, 1)
        lines = [
            "noise: largest angle theta in radians, by layer and site",
            f"{options}, law {laws}" if laws else options,
            *(f"{dose.site} over time: {dose.time}" for dose in dosed if dose.time != FRESH),
            *(f"{kind}: attention's output x becomes {TERM_KINDS[kind]}" for kind in kinds),
            _line("layer", [*(f"{dose.head}{LAWS[dose.law].mark}" for dose in dosed), *kinds]),
        ]
        for _, run in groupby(range(n_layers), key=lambda layer: tuple(cells[layer])):
            first, *others = run
            label = f"{first}-{others[-1]}" if others else f"{first}"
            lines.append(_line(label, [f"{theta:.4g}" if theta else "·" for theta in cells[first]]))
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Plain data, JSON-safe, with the keys of a drug file; `from_dict` reads it."""
        options = {name: getattr(self, name) for name in OPTIONS}
        terms = {term.name: term.value for term in self.terms}
        return {**options, **terms, "dose": [dose.to_dict() for dose in self.doses]}

    @classmethod
    def from_dict(cls, data: Mapping) -> "Schedule":
        """A schedule from the options and dose, a list of tables. Raises DrugError naming the key."""
        if not isinstance(data, Mapping):
            raise DrugError(f"a schedule must be a table, not {shown(data)}")
        for key in data:
            if key not in (*OPTIONS, *TERMS, "dose"):
                known = ", ".join((*OPTIONS, *TERMS))
                raise DrugError(f"unknown key {shown(key)}: a schedule has {known} and dose")
        tables = data.get("dose", [])
        if not isinstance(tables, list):
            raise DrugError("dose must be a list of tables: write [[dose]] above each")
        doses = []
        for i, table in enumerate(tables):
            with at(f"dose {i + 1}"):
                doses.append(Dose.from_dict(table))
        return cls(tuple(doses), **{name: data[name] for name in (*OPTIONS, *TERMS) if name in data})

    def __str__(self) -> str:
        parts = [str(each) for each in (*self.doses, *self.terms)] or ["sober"]
        for name in OPTIONS:
            value = getattr(self, name)
            if value != getattr(SOBER, name):
                parts.append(f"{name}={write_number(value) if name == 'scale' else value}")
        return ",".join(parts)


def _line(label: str, cells: list[str]) -> str:
    return f"{label:<9}" + "".join(f"{cell:>12}" for cell in cells)


def _parse_option(item: str) -> tuple[str, int | float | str]:
    """`sink=0` -> ("sink", 0)."""
    name, _, text = (part.strip() for part in item.partition("="))
    if name not in OPTIONS:
        raise DrugError(f"there is no option {shown(name)}, only {', '.join(OPTIONS)}")
    if name == "prompt":
        return name, text
    if name == "scale":
        return name, read_number(text, name)
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise DrugError(f"{name} {shown(text)} is not a whole number of 0 or more")
    return name, int(text)


OPTIONS = tuple(field.name for field in fields(Schedule) if field.name not in ("doses", *TERMS))
SOBER = Schedule()
