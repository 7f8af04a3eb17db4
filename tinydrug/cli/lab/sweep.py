"""Prompts x sites x laws x doses x seeds, resumable: variety, coherence and the cliff of each site."""

import argparse
import math
import os

from tinydrug.cli.console import Console
from tinydrug.cli.lab.model import bar, model, model_arguments
from tinydrug.cli.options import whole
from tinydrug.errors import ConfigError
from tinydrug.lab.page import need
from tinydrug.lab.plan import Plan, load_plan


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("plan", metavar="PLAN", nargs="?", default="grid", help="a TOML file, or a plan of the package: "
        "grid, variety, repeat (default: grid; docs/lab.md says what a plan is)")  # fmt: skip
    sweep_arguments(parser)
    model_arguments(parser)


def sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the rows go and who makes them."""
    add = parser.add_argument
    add("-o", "--out", metavar="DIR", required=True, help="folder of the results; one that is there is gone "
        "on with: what is in it is not done again")  # fmt: skip
    add("--workers", type=whole(1), metavar="N", help="processes, which share the threads (default: one a "
        "thread, fewer if the model takes much memory)")  # fmt: skip
    add("--places", type=whole(1), default=32, metavar="N", help="sequences written together by each process "
        "(default: 32; it changes nothing but the speed)")  # fmt: skip
    add(
        "--dask", metavar="ADDRESS", help="work on the Dask cluster whose scheduler is there: tcp://HOST:8786"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    tables = run_plan(load_plan(args.plan), args, console)
    print(summary(tables))
    return 0 if tables.complete else 130


def run_plan(plan: Plan, args: argparse.Namespace, console: Console):
    """What is missing of a plan, done -> its tables. Also for experiments that begin with a sweep."""
    need("sacrebleu", "scipy")  # before the hours, not after them
    if args.dask and args.workers is not None:
        raise ConfigError("--workers: the cluster of --dask has its own: drop one", "workers")
    args.model = args.model or plan.model
    from tinydrug.lab.effect import kl
    from tinydrug.lab.results import record
    from tinydrug.lab.store import Store
    from tinydrug.lab.sweep import sweep
    from tinydrug.lab.work import Source, on_dask, on_processes, rows

    with model(args, console) as engine:
        for prompt in plan.prompts:
            if prompt.chat and engine.tokenizer.chat_template is None:
                raise ConfigError(
                    f"{engine.name} has no chat template: give its plan [[prompt]] tables with chat = false",
                    "prompts",
                )
            engine.session().check(engine.encode(prompt.content))
        about = record(engine, "sweep")
        with bar(console, "measuring doses") as progress:
            about["kl"] = kl(engine, plan, Store.known(args.out, about).get("kl", {}), progress)
        workers = min(_workers(engine, args), len(plan.jobs))
        source = Source(_place(args.model), args.quant, args.cache_type, max(1, engine.threads // workers))

        def do(jobs, pulse):
            if args.dask:
                return on_dask(source, jobs, args.dask, args.places, pulse)
            if workers > 1:
                engine.close()
                return on_processes(source, jobs, workers, args.places, pulse)
            return rows(engine, jobs, args.places, pulse)

        with bar(console, f"{len(plan.jobs):,} generations") as progress:
            tables = sweep(plan, about, args.out, do, progress)
    if not tables.complete:
        console.warn(f"not all is done: the same command goes on from here ({args.out})")
    return tables


def _workers(engine, args: argparse.Namespace) -> int:
    """Processes: one a thread, as long as their weights take no more than a quarter of the memory."""
    if args.workers is not None:
        return args.workers
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
    return max(1, min(engine.threads, int(room // engine.runtime.weights.nbytes)))


def _place(name: str | None) -> str | None:
    """A model's path as other processes find it; a name as it is."""
    return os.path.abspath(name) if name is not None and os.path.exists(name) else name


def summary(tables) -> str:
    """The conditions and the cliffs as text."""
    widths = {
        "condition": 24, "samples": 7, "coherent": 8, "loops": 6, "ended": 6, "tokens": 6, "perplexity": 10,
        "kl": 8, "shared_prefix": 13, "fair_vendi": 10, "fair_distinct_2": 15,
    }  # fmt: skip
    lines = [_line(widths, {key: key for key in widths})]
    lines += [_line(widths, {key: _shown(row[key]) for key in widths}) for row in tables.conditions]
    if tables.cliffs:
        lines += ["", "cliff: the dose beyond which half of the samples are incoherent (95 % interval)"]
        for row in tables.cliffs:
            cliff = f"beyond {row['largest']:g}" if math.isnan(row["cliff"]) else f"{row['cliff']:.3g}"
            low, high = (f"{row[key]:.3g}".replace("inf", "beyond") for key in ("cliff_low", "cliff_high"))
            safe = "none" if math.isnan(row["safe"]) else f"{row['safe']:g}"
            interval = "one whole prompt: no interval" if math.isnan(row["cliff_low"]) else f"{low} to {high}"
            lines.append(f"{row['family']:<18} safe up to {safe:<6} cliff {cliff} ({interval})")
    return "\n".join(lines)


def _line(widths: dict, cells: dict) -> str:
    first, *others = widths
    return f"{cells[first]:<{widths[first]}}" + "".join(f"  {cells[key]:>{widths[key]}}" for key in others)


def _shown(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3g}"
