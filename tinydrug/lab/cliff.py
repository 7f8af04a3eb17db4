"""Where text breaks: the dose of each family beyond which half of its samples are no longer coherent."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from tinydrug.lab.cells import RESAMPLES

HALF = 0.5  # of the samples: beyond is over the cliff
SAFE = 0.95  # of the share without noise


def cliffs(table: Sequence[Mapping], families: Sequence[str]) -> list[dict]:
    """A row a family of cells. `safe`: the largest level up to which at least 95 % of the sober share of
    samples stays coherent, NaN if not even the smallest is, or no sober sample is. `cliff`: the level at
    which the share falls below half, between levels by the logarithm, NaN if it never does; with an interval
    over prompts, infinite where it is beyond the largest level, NaN of one prompt alone."""
    sober = [cell["coherent"] for cell in table if cell["family"] == "sober"]
    whole = float(np.mean(sober)) if sober else 1.0
    rows = []
    for family in families:
        levels, shares = _shares(table, family)  # (levels,), (prompts, levels)
        if len(levels) < 2 or not len(shares):
            continue
        mean = shares.mean(0)
        safe = [level for i, level in enumerate(levels) if whole and (mean[: i + 1] >= SAFE * whole).all()]
        low = high = math.nan
        if len(shares) > 1:
            drawn = np.random.default_rng(0).integers(0, len(shares), (RESAMPLES, len(shares)))
            found = np.array([crossing(levels, shares[some].mean(0)) for some in drawn])
            found[np.isnan(found)] = math.inf
            low, high = np.quantile(found, [0.025, 0.975], method="nearest")
        rows.append({
            "family": family,
            "prompts": len(shares),
            "safe": safe[-1] if safe else math.nan,
            "cliff": crossing(levels, mean),
            "cliff_low": float(low),
            "cliff_high": float(high),
            "largest": levels[-1],
            "coherent_at_largest": float(mean[-1]),
        })  # fmt: skip
    return rows


def crossing(levels: Sequence[float], shares: Sequence[float]) -> float:
    """The first level at which shares fall below a half, by the logarithm between the last level above and
    the first below; the smallest level if they are below from the first on, NaN if they never are."""
    if shares[0] < HALF:
        return levels[0]
    for (a, above), (b, below) in pairwise(zip(levels, shares, strict=True)):
        if below < HALF:
            way = (above - HALF) / (above - below)
            return math.exp(math.log(a) + way * (math.log(b) - math.log(a)))
    return math.nan


def _shares(table: Sequence[Mapping], family: str) -> tuple[list[float], np.ndarray]:
    """Positive levels, ascending, and the share of coherent samples (prompts, levels)."""
    of = {(cell["prompt"], cell["level"]): cell["coherent"] for cell in table if cell["family"] == family}
    levels = sorted({level for _, level in of if level > 0})
    prompts = dict.fromkeys(prompt for prompt, _ in of)
    rows = [[of.get((prompt, level)) for level in levels] for prompt in prompts]
    whole = [row for row in rows if None not in row]
    return levels, np.array(whole).reshape(len(whole), len(levels))
