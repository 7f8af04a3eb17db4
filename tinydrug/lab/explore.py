"""The generations explorer: one static page over sweeps, two samples beside each other, word by word."""

from collections.abc import Sequence
from pathlib import Path

from tinydrug.engine.record import FORMAT
from tinydrug.lab import metrics
from tinydrug.lab.cells import cells
from tinydrug.lab.page import need, page, parts
from tinydrug.lab.plan import SOBER, Plan
from tinydrug.lab.results import write_text
from tinydrug.lab.store import Store
from tinydrug.lab.sweep import opened

SHOWN = (  # metrics of a cell that the page shows, of those that are known
    *("samples", "coherent", "loops", "ended", "tokens", "perplexity", "rep_4", "unique", "distinct_2"),
    *("self_bleu", "shared_prefix", "leaves_sober", "vendi", "fair_vendi", "fair_samples"),
)


def explore(paths: Sequence[str | Path], out: str | Path) -> int:
    """Write the page over the sweeps in these folders -> how many samples it shows. ConfigError if one is no
    sweep or has no results, or without the [lab] extra."""
    need("sacrebleu", "scipy")
    sweeps = [_sweep(*opened(path)) for path in paths]
    if len({sweep["name"] for sweep in sweeps}) < len(sweeps):  # one model twice: told apart by the folders
        for sweep, path in zip(sweeps, paths, strict=True):
            sweep["name"] += f" ({Path(path).name})"
    body, script, style = parts("explore")
    write_text(out, page("tinydrug: generations explorer", body, script, sweeps, style=style))
    return sum(len(sweep["samples"]) for sweep in sweeps)


def _sweep(plan: Plan, store: Store, about: dict) -> dict:
    """All the page needs of one sweep: each text once, what samples share apart from them."""
    places = {condition.name: i for i, condition in enumerate(plan.conditions)}
    prompts = {prompt.name: i for i, prompt in enumerate(plan.prompts)}
    jobs = [job for job in plan.jobs if job.id in store.rows]
    read = {job.prompt.name: store.rows[job.id]["prompt_ids"] for job in jobs}
    families = dict.fromkeys(condition.family for condition in plan.conditions if condition.family != SOBER)
    table = cells(plan, store.rows)
    return {
        "name": about["model"]["name"],
        "model": about["model"],
        "made_by": about["made_by"],
        "prompts": [
            {
                "name": prompt.name,
                "text": prompt.text,
                "chat": prompt.chat,
                "system": prompt.system,
                "ids": read.get(prompt.name, []),
            }
            for prompt in plan.prompts
        ],  # fmt: skip
        "conditions": [
            {
                "name": each.name,
                "family": each.family,
                "level": each.level,
                "drug": each.drug,
                "sampling": dict(each.sampling),
                "kl": about.get("kl", {}).get(each.drug),
            }
            for each in plan.conditions
        ],  # fmt: skip
        "families": list(families),
        "cells": {
            f"{prompts[cell['prompt']]}/{places[cell['condition']]}": [cell[key] for key in SHOWN]
            for cell in table
        },
        "metrics": SHOWN,
        "format": FORMAT,
        "samples": [
            _sample(store.rows[job.id], prompts[job.prompt.name], places[job.condition.name]) for job in jobs
        ],
    }


def _sample(row: dict, prompt: int, condition: int) -> dict:
    return {
        "p": prompt,
        "c": condition,
        "seed": row["seed"],
        "text": row["text"],
        "nll": row["nll"],
        "tokens": row["tokens"],
        "ended": row["ended"],
        "loop": metrics.loops(row["text"], row["ids"]),
        "ids": row["ids"],
        "record": row["record"],
    }
