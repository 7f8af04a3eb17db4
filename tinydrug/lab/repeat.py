"""Noise against repetition: how much long greedy texts repeat themselves sober, penalised, under noise."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from tinydrug.errors import ConfigError
from tinydrug.lab.figure import COLORS, MARKS, figure, save
from tinydrug.lab.plan import SOBER

COLUMNS = (
    *("condition", "family", "level", "samples", "tokens", "perplexity", "nll_low", "nll_high"),
    *("loops", "loops_low", "loops_high", "rep_2", "rep_4"),
    *("fair_rep_4", "fair_rep_4_low", "fair_rep_4_high"),
)


def table(conditions: Sequence[Mapping]) -> list[dict]:
    """A row a condition: its loop rate and its repetition, with intervals over prompts. ConfigError without a
    sober one to compare with."""
    if not any(row["family"] == SOBER for row in conditions):
        raise ConfigError("there is no sober text to compare with: finish the sweep", "results")
    return [{key: row[key] for key in COLUMNS} for row in conditions]


def best(rows: Sequence[Mapping], most: float = 2.0) -> list[str]:
    """A sentence a family: its condition with the fewest loops among those whose perplexity under the sober
    model is at most so many times that of the sober text."""
    sober = next(row for row in rows if row["family"] == SOBER)
    said = [f"sober: {_said(sober)}"]
    for family in dict.fromkeys(row["family"] for row in rows if row["family"] != SOBER):
        near = [
            row for row in rows if row["family"] == family and row["perplexity"] <= most * sober["perplexity"]
        ]
        if not near:
            said.append(f"{family}: every dose makes the text more than {most:g} times as perplexing")
            continue
        chosen = min(near, key=lambda row: (row["loops"], row["fair_rep_4"]))
        said.append(f"{chosen['condition']}: {_said(chosen)}")
    return said


def _said(row: Mapping) -> str:
    low, high = (f"{row[key]:.0%}" for key in ("loops_low", "loops_high")) if _known(row) else ("?", "?")
    return (
        f"{row['loops']:.0%} loop ({low} to {high}), rep-4 {row['fair_rep_4']:.2f}, "
        f"sober perplexity {row['perplexity']:.3g}"
    )


def _known(row: Mapping) -> bool:
    return not math.isnan(row["loops_low"])


def plot(rows: Sequence[Mapping], path: str | Path, model: str) -> Path:
    """Loop rate and repetition over sober perplexity, a curve a family, as PNG. ConfigError without
    matplotlib."""
    picture = figure(11, 4.8)
    panels = picture.subplots(1, 2, sharex=True)
    sober = next(row for row in rows if row["family"] == SOBER)
    families = list(dict.fromkeys(row["family"] for row in rows if row["family"] != SOBER))
    what = {"loops": "texts that end in a loop, share", "fair_rep_4": "rep-4 of the first words, share"}
    for axes, (key, label) in zip(panels, what.items(), strict=True):
        for i, family in enumerate(families):
            line = [sober, *(row for row in rows if row["family"] == family)]
            y = [row[key] for row in line]
            error = [
                [max(0, row[key] - row[f"{key}_low"]) if _known(row) else 0 for row in line],
                [max(0, row[f"{key}_high"] - row[key]) if _known(row) else 0 for row in line],
            ]
            style = {"color": COLORS[i % 7], "marker": MARKS[i % 7], "lw": 1.3, "ms": 5, "elinewidth": 0.7}
            axes.errorbar([row["perplexity"] for row in line], y, error, label=family, **style)
        axes.plot([sober["perplexity"]], [sober[key]], marker="*", ms=15, color="black", ls="", label="sober")
        axes.set_xscale("log")
        axes.set_ylabel(label)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
    ticks = [
        tick for tick in (1.2, 1.5, 2, 3, 4, 6, 10, 20, 50) if tick <= 2 * max(r["perplexity"] for r in rows)
    ]
    panels[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    for axes in panels:
        axes.minorticks_off()
    panels[0].legend(fontsize=8)
    picture.supxlabel("perplexity of the text under the sober model (geometric mean)")
    picture.suptitle(f"Repetition of long greedy texts, {model} (95 % intervals over prompts)")
    return save(picture, path)
