"""Generations of a plan, each once whatever happens: run what is missing, then the tables and the cliffs."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from tinydrug.errors import ConfigError
from tinydrug.lab.cells import cells, conditions
from tinydrug.lab.cliff import cliffs
from tinydrug.lab.page import need
from tinydrug.lab.plan import Job, Plan, read_saved
from tinydrug.lab.progress import Progress
from tinydrug.lab.results import write_csv, write_json
from tinydrug.lab.store import Store
from tinydrug.noise import Schedule

log = logging.getLogger("tinydrug")

Pulse = Callable[[], None]  # called now and then; raises KeyboardInterrupt to stop
Doer = Callable[[Sequence[Job], Pulse], Iterator[dict]]  # jobs to rows as they end: lab/work.py has three


@dataclass(frozen=True)
class Tables:
    """What a sweep found. `complete`: no job of the plan is missing."""

    model: str
    cells: list[dict]
    conditions: list[dict]
    cliffs: list[dict]
    complete: bool


def sweep(
    plan: Plan, about: dict, path: str | os.PathLike, do: Doer, progress: Progress | None = None
) -> Tables:
    """Do the jobs of a plan that the folder does not hold yet, and write its tables (cells, conditions,
    cliffs; CSV and JSON). about: the model and versions, as results.record gives them.

    A KeyboardInterrupt, which progress(done, total, seconds left) may raise, ends it early: what is done is
    kept, and is not done again. ConfigError if the folder is another model's, or in use.
    """
    need("sacrebleu", "scipy")
    progress = progress or (lambda done, total, left: None)
    with Store.writing(path, about | {"plan": plan.to_dict()}) as store:
        missing = [job for job in plan.jobs if job.id not in store.rows]
        _do(store, missing, len(plan.jobs), do, progress)
        missing = [job for job in plan.jobs if job.id not in store.rows]
        if not missing:
            store.sort([job.id for job in plan.jobs])
            _warn_of_idle(plan, store)
        if not store.rows:
            raise KeyboardInterrupt
        return write_tables(plan, store, about, not missing)


def _do(store: Store, missing: Sequence[Job], total: int, do: Doer, progress: Progress) -> None:
    start, ahead, done = time.monotonic(), total - len(missing), 0

    def pulse() -> None:
        left = (time.monotonic() - start) / done * (len(missing) - done) if done else float("nan")
        progress(ahead + done, total, left)

    try:
        pulse()
        if missing:
            with closing(do(missing, pulse)) as rows:
                for row in rows:
                    store.add(row)
                    done += 1
                    pulse()
    except KeyboardInterrupt:
        return


def _warn_of_idle(plan: Plan, store: Store) -> None:
    """A dose that moved nothing in any sample looks like a harmless one, and is none at all."""
    moved: dict[str, bool] = {}
    for job in plan.jobs:
        if job.id in store.rows and not Schedule.parse(job.condition.drug).is_sober:
            name = job.condition.name
            moved[name] = moved.get(name, False) or bool(store.rows[job.id]["moved"])
    if idle := [name for name, did in moved.items() if not did]:
        log.warning("noise moved nothing under %s: texts too short, or the sink too long", ", ".join(idle))


def write_tables(plan: Plan, store: Store, about: Mapping, complete: bool) -> Tables:
    """The tables of what a folder holds, written into it. about: its sweep.json."""
    table = cells(plan, store.rows)
    families = list(dict.fromkeys(each.family for each in plan.conditions if each.level > 0))
    summed = conditions(plan, table, about.get("kl", {}))
    found = Tables(about["model"]["name"], table, summed, cliffs(table, families), complete)
    for name in ("cells", "conditions", "cliffs"):
        if rows := getattr(found, name):
            write_csv(store.path / f"{name}.csv", rows)
            write_json(store.path / f"{name}.json", rows)
    return found


def opened(path: str | os.PathLike) -> tuple[Plan, Store, dict]:
    """A sweep that has been run, perhaps in part: its plan, its rows, and what its sweep.json says."""
    store, about = Store.reading(path)
    try:
        plan = read_saved(about["plan"])
        about["model"]["name"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: sweep.json is damaged: {error}", "results") from None
    if not any(job.id in store.rows for job in plan.jobs):
        raise ConfigError(f"{path}: this sweep has no results yet: run it", "results")
    return plan, store, about
