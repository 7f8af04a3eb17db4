"""The headline question: at equal coherence, is noise more varied than temperature, top-p and min-p?

Each family of conditions is a curve: as its dose or temperature grows, text gets more varied and less likely
under the sober model. Curves are compared where they cross a sober perplexity. What is compared is the fair
Vendi score (coherent samples only, one length, subsets of one size: lab/cells.py). Chance is that of prompts:
intervals come from resampling them, for all families at once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinydrug.errors import ConfigError
from tinydrug.lab.cells import RESAMPLES
from tinydrug.lab.figure import COLORS, MARKS, figure, save
from tinydrug.lab.plan import SOBER
from tinydrug.noise import SITES

AGAINST = "temperature"
PERPLEXITIES = (2.3, 2.6, 3.0)
MEASURES = ("fair_vendi", "fair_distinct_2", "fair_self_bleu", "coherent", "loops")


@dataclass(frozen=True)
class Curve:
    """A family over its levels, from sober on: arrays (prompts, levels)."""

    levels: tuple[float, ...]
    nll: np.ndarray  # nats a token under the sober model
    measures: Mapping[str, np.ndarray]


def curves(table: Sequence[Mapping]) -> dict[str, Curve]:
    """By family. ConfigError unless the cells have a sober text for every prompt and a family to compare."""
    prompts = list(dict.fromkeys(cell["prompt"] for cell in table))
    of = {(cell["prompt"], cell["family"], cell["level"]): cell for cell in table}
    if any((prompt, SOBER, 0.0) not in of for prompt in prompts):
        raise ConfigError("a prompt has no sober text to compare with: finish the sweep", "results")
    families: dict[str, set[float]] = {}
    for _, family, level in of:
        families.setdefault(family, set()).add(level)
    found = {}
    for family in families:
        levels = sorted(level for level in families[family] if level > 0)
        cells = [[of.get((prompt, family, level)) for level in levels] for prompt in prompts]
        if family == SOBER or any(None in row for row in cells):
            continue
        sober = [of[prompt, SOBER, 0.0] for prompt in prompts]
        whole = [[{**first, **ALIKE}, *row] for first, row in zip(sober, cells, strict=True)]
        found[family] = Curve(
            (0.0, *levels),
            np.array([[cell["nll"] for cell in row] for row in whole]),
            {name: np.array([[cell[name] for cell in row] for row in whole]) for name in MEASURES},
        )
    if not found:
        raise ConfigError("nothing to compare: no family is complete", "results")
    return found


ALIKE = {"fair_vendi": 1.0, "fair_distinct_2": math.nan, "fair_self_bleu": 1.0}  # a text and its copies


def compare(
    found: Mapping[str, Curve], perplexities: Sequence[float] = PERPLEXITIES, against: str = AGAINST
) -> list[dict]:
    """A row a perplexity and family: its measures there with intervals (95 %), and how much more Vendi it has
    than `against`. NaN where a curve does not go. ConfigError if there is no such family."""
    if against not in found:
        raise ConfigError(
            f"there is no family {against!r} to compare with, only {', '.join(found)}", "against"
        )
    n = len(next(iter(found.values())).nll)
    drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    rows = []
    for perplexity in perplexities:
        at = math.log(perplexity)
        base = _resampled(found[against], "fair_vendi", drawn, at)
        for family, curve in found.items():
            everyone = np.arange(n)
            row = {"perplexity": perplexity, "family": family, "level": _at(curve, None, everyone, at)}
            for name in MEASURES:
                row[name] = _at(curve, name, everyone, at)
            values = _resampled(curve, "fair_vendi", drawn, at)
            row["fair_vendi_low"], row["fair_vendi_high"] = _range(values)
            row["more"] = row["fair_vendi"] - _at(found[against], "fair_vendi", everyone, at)
            row["more_low"], row["more_high"] = _range(values - base)
            rows.append(row)
    return rows


def _at(curve: Curve, name: str | None, prompts: np.ndarray, nll: float) -> float:
    """A measure (None: the level) where the mean over these prompts first reaches this nll, straight between
    levels; NaN if it does not, or begins beyond it."""
    x = curve.nll[prompts].mean(0)
    y = np.array(curve.levels) if name is None else _means(curve.measures[name][prompts])
    for i in range(len(x) - 1):
        if x[i] <= nll <= x[i + 1]:
            way = (nll - x[i]) / (x[i + 1] - x[i]) if x[i + 1] > x[i] else 0.0
            return float(y[i + 1] if math.isnan(y[i]) else y[i] + way * (y[i + 1] - y[i]))
    return math.nan


def _means(values: np.ndarray) -> np.ndarray:
    """(prompts, levels) -> (levels,): of prompts in which it is known, NaN unless these are at least half."""
    known = ~np.isnan(values)
    count = known.sum(0)
    mean = np.where(known, values, 0).sum(0) / np.maximum(count, 1)
    return np.where(2 * count >= len(values), mean, np.nan)


def _resampled(curve: Curve, name: str, drawn: np.ndarray, nll: float) -> np.ndarray:
    return np.array([_at(curve, name, prompts, nll) for prompts in drawn])


def _range(values: np.ndarray) -> tuple[float, float]:
    """An interval, of resamples in which the curve gets there: NaN if those are few."""
    known = values[~np.isnan(values)]
    if len(known) < 0.9 * len(values):
        return math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def verdicts(rows: Sequence[Mapping], against: str = AGAINST) -> list[str]:
    """A sentence a perplexity: who is more varied there than `against`, who less, who neither."""
    said = []
    for perplexity in dict.fromkeys(row["perplexity"] for row in rows):
        here = [row for row in rows if row["perplexity"] == perplexity and row["family"] != against]
        reached = [row for row in here if not math.isnan(row["more_low"])]
        more = [row["family"] for row in reached if row["more_low"] > 0]
        less = [row["family"] for row in reached if row["more_high"] < 0]
        same = [row["family"] for row in reached if row["more_low"] <= 0 <= row["more_high"]]
        away = [row["family"] for row in here if math.isnan(row["more_low"])]
        parts = (("more varied than", more), ("less varied than", less), ("no different from", same))
        text = "; ".join(f"{what} {against}: {', '.join(names)}" for what, names in parts if names)
        text += f"; no verdict, too few prompts get there: {', '.join(away)}" if away else ""
        said.append(f"at a sober perplexity of {perplexity:g}, {text.removeprefix('; ')}")
    return said


def plot(found: Mapping[str, Curve], path: str | Path, model: str) -> Path:
    """Variety over sober perplexity as PNG: a panel a law, a curve a site, samplers in each. ConfigError
    without matplotlib."""
    drugged = [family for family in found if family.split()[0] in SITES]
    samplers = [family for family in found if family not in drugged]
    sites = list(dict.fromkeys(family.split()[0] for family in drugged))
    laws = list(dict.fromkeys(family.partition(" ")[2] for family in drugged)) or [""]
    picture = figure(4.6 * len(laws) + 0.6, 4.8)
    panels = picture.subplots(1, len(laws), sharex=True, sharey=True, squeeze=False)[0]
    for axes, law in zip(panels, laws, strict=True):
        for i, family in enumerate(samplers):
            style = {"color": "#444444", "marker": MARKS[i % 7], "lw": 1.8, "ls": ("-", "--", ":")[i % 3]}
            _draw(axes, found[family], family, style)
        for i, site in enumerate(sites):
            if f"{site} {law}" in found:
                style = {"color": COLORS[i % 7], "marker": MARKS[i % 7], "lw": 1.3}
                _draw(axes, found[f"{site} {law}"], site, style)
        axes.set_xscale("log")
        ticks = (1.5, 2, 3, 4, 6, 10, 20, 50)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(f"law {law}" if law else "samplers")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    panels[0].set_ylabel("Vendi score (coherent samples,\nequal length and number)")
    picture.supxlabel("perplexity of the text under the sober model (geometric mean)")
    picture.suptitle(f"Variety at equal coherence, {model} (95 % intervals over prompts)")
    return save(picture, path)


def _draw(axes, curve: Curve, label: str, style: Mapping) -> None:
    values, n = curve.measures["fair_vendi"], len(curve.nll)
    y = _means(values)
    drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    there = ~np.isnan(y)
    spread = np.array([_means(values[prompts]) for prompts in drawn])[:, there]
    low, high = np.nanquantile(spread, [0.025, 0.975], axis=0)
    error = np.stack([y[there] - low, high - y[there]]).clip(0)
    x = np.exp(curve.nll.mean(0))[there]
    axes.errorbar(x, y[there], error, label=label, ms=5, elinewidth=0.7, **style)
