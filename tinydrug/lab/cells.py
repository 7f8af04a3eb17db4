"""The tables of a sweep: one row a cell (a prompt under a condition), one row a condition over all prompts.

Columns that begin with `fair_` are for comparing conditions. Three things spoil the plain ones: length moves
every metric of spread, broken text passes for varied text, and so does a larger number of samples. So fair
metrics take coherent samples alone, cut to one length, and are averages over subsets of one size. (fair_rep_4
is of all samples that reach this length, coherent or not: repetition is what makes them incoherent.)
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from tinydrug.lab import metrics
from tinydrug.lab.plan import SOBER, Condition, Plan

SPREAD = {  # column: what it is of samples that are lists of words
    "unique": metrics.unique,
    "distinct_1": lambda samples: metrics.distinct(samples, 1),
    "distinct_2": lambda samples: metrics.distinct(samples, 2),
    "distinct_3": lambda samples: metrics.distinct(samples, 3),
    "self_bleu": metrics.self_bleu,
    "shared_prefix": metrics.shared_prefix,  # words
    "vendi": metrics.vendi,
    "vendi_2": lambda samples: metrics.vendi(samples, 2),
}
FAIR = ("distinct_2", "self_bleu", "vendi")
RESAMPLES = 2000


def cells(plan: Plan, rows: Mapping[str, dict]) -> list[dict]:
    """A row for each cell that has samples."""
    found: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for job in plan.jobs:
        if job.id in rows:
            found[job.prompt.name, job.condition.name].append(rows[job.id])
    conditions = {condition.name: condition for condition in plan.conditions}
    size = max(2, math.ceil(len(plan.seeds) / 2))  # of the subsets that fair metrics are averaged over
    table = []
    for (prompt, name), samples in found.items():
        sober = found.get((prompt, SOBER), [None])[0]
        about = {"prompt": prompt, **_about(conditions[name])}
        table.append(about | _cell(plan, samples, sober, size))
    return table


def _about(condition: Condition) -> dict:
    return {"condition": condition.name, "family": condition.family, "level": condition.level}


def _cell(plan: Plan, samples: Sequence[dict], sober: dict | None, size: int) -> dict:
    texts = [metrics.words(sample["text"]) for sample in samples]
    nlls = [sample["nll"] for sample in samples]
    loops = [metrics.loops(sample["text"], sample["ids"]) for sample in samples]
    kept = [
        text
        for text, nll, loop in zip(texts, nlls, loops, strict=True)
        if nll is not None and math.exp(nll) <= plan.max_perplexity and not loop
    ]
    fair = metrics.cut(kept, plan.match)
    return {
        "samples": len(samples),
        "coherent": len(kept) / len(samples),
        "loops": fmean(loops),
        "ended": fmean(sample["ended"] for sample in samples),
        "tokens": fmean(sample["tokens"] for sample in samples),
        "nll": _mean(nlls),
        "perplexity": math.exp(_mean(nlls)),
        "tail_perplexity": math.exp(_mean([sample["nll_tail"] for sample in samples])),
        **{f"rep_{n}": fmean(metrics.repetition(text, n) for text in texts) for n in (2, 3, 4)},
        "fair_rep_4": _mean([metrics.repetition(text, 4) for text in metrics.cut(texts, plan.match)]),
        "compression": _mean([metrics.compression(sample["text"]) for sample in samples]),
        "first_entropy": metrics.entropy([sample["ids"][0] for sample in samples if sample["ids"]]),
        "leaves_sober": _mean([_leaves(sample, sober) for sample in samples]),
        **{column: metric(texts) if len(texts) > 1 else math.nan for column, metric in SPREAD.items()},
        "fair_samples": len(fair),
        **{f"fair_{column}": metrics.rarefied(SPREAD[column], fair, size) for column in FAIR},
    }


def _leaves(sample: Mapping, sober: Mapping | None) -> float:
    """The token at which it first differs from the sober text, from 0 on; its length if it never does."""
    return math.nan if sober is None else float(metrics.common_prefix(sample["ids"], sober["ids"]))


def conditions(plan: Plan, table: Sequence[Mapping], kl: Mapping[str, float]) -> list[dict]:
    """A row a condition: means over prompts, and of some intervals (95 %, resampling prompts); without two
    prompts there are none. kl: of drugs, as far as known."""
    rows = []
    for condition in plan.conditions:
        of = [cell for cell in table if cell["condition"] == condition.name]
        if not of:
            continue
        numbers = [key for key in of[0] if key not in ("prompt", *_about(condition))]
        row = _about(condition) | {key: _mean([cell[key] for cell in of]) for key in numbers}
        row["kl"] = 0.0 if condition.family == SOBER else kl.get(condition.drug, math.nan)
        row["samples"] = sum(cell["samples"] for cell in of)
        row["fair_samples"] = sum(cell["fair_samples"] for cell in of)
        row["perplexity"], row["tail_perplexity"] = (
            math.exp(_mean([math.log(cell[key]) for cell in of])) for key in ("perplexity", "tail_perplexity")
        )
        for key in ("coherent", "loops", "nll", "fair_rep_4", "fair_vendi"):
            low, high = interval([cell[key] for cell in of])
            row |= {f"{key}_low": low, f"{key}_high": high}
        rows.append(row)
    return rows


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The interval (95 %, percentile bootstrap) of the mean of values, one a prompt, NaN for fewer than two
    known ones."""
    known = np.array([value for value in values if not math.isnan(value)])
    if len(known) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).integers(0, len(known), (RESAMPLES, len(known)))
    low, high = np.quantile(known[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _mean(values: Sequence[float | None]) -> float:
    """Of those that are known; NaN if none is."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return fmean(known) if known else math.nan
