"""What a dose does on a text, teacher-forced; with --target-kl, which theta has a given effect.

Each --drug is measured by itself; without one, each site (and law, and window of layers) at --theta. Effects
are means a token with standard errors: KL(sober||drugged), its reverse, Jensen-Shannon, in nats; flips: how
often the likeliest token is another; rank and sober probability of the drugged choice; change of entropy.

With --target-kl, angles are found on every other piece of the text, and what is shown was measured on the
pieces between, which were held back, under another noise seed. --drug V:kl=0.05, here as everywhere, is found
on a reference text of the package in place of this one."""

import argparse
from dataclasses import replace

from tinydrug.api import Engine
from tinydrug.cli.console import Console
from tinydrug.cli.lab.model import (
    bar,
    model,
    model_arguments,
    prompt,
    prompt_arguments,
    seed,
    sites,
    status,
    theta,
    words,
)
from tinydrug.cli.options import real, whole
from tinydrug.engine.calibrate import solve
from tinydrug.errors import ConfigError
from tinydrug.lab.meter import Reading, halves, meter
from tinydrug.lab.progress import estimating
from tinydrug.lab.results import record, write_csv, write_json
from tinydrug.noise import Dose, Effect, Layers, Schedule
from tinydrug.noise.laws import LAWS
from tinydrug.noise.sites import SITES

PIECE = 256  # tokens
GRID = ("sites", "laws", "theta", "target_kl", "by_layer")


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    prompt_arguments(parser)
    add("--drug", action="append", metavar="SPEC", help="a schedule to measure; may be given several times")
    add("--sites", type=sites, metavar="LIST", help="sites by commas (default: all)")
    add("--laws", type=words(LAWS), metavar="LIST",
        help=f"laws by commas, of {', '.join(LAWS)} (default: uniform)")  # fmt: skip
    add("--theta", type=theta, metavar="THETA", help="of these (default: 0.2)")
    add("--target-kl", type=real, metavar="KL", help="find the theta of this mean KL a token, in nats")
    add(
        "--by-layer",
        type=whole(1),
        metavar="N",
        help="each window of N layers by itself (default: all layers)",
    )
    add("--piece", type=whole(8), default=PIECE, metavar="N",
        help=f"tokens read from an empty cache (default: {PIECE})")  # fmt: skip
    add("--tokens", type=whole(8), metavar="N", help="of the text at most so many (default: all)")
    add("--seed", type=seed, default=1, metavar="N", help="of the noise (default: 1)")
    add("--drug-sink", type=whole(0), metavar="N", help="positions never touched (default: 6)")
    add("--csv", metavar="FILE", help="write the table there, too")
    add("--json", metavar="FILE", help="write the table and the record of the run there, too")
    model_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    if args.drug and any(vars(args)[name] is not None for name in GRID):
        raise ConfigError(
            f"--{', --'.join(GRID).replace('_', '-')} make schedules: drop --drug, or them", "drug"
        )
    if args.theta is not None and args.target_kl is not None:
        raise ConfigError("give --theta or --target-kl, not both", "target_kl")
    text = prompt(args)
    given = [Schedule.parse(drug, sink=args.drug_sink) for drug in args.drug or ()]
    angle = (0.2 if args.theta is None else args.theta) if args.target_kl is None else Effect(args.target_kl)
    with model(args, console) as engine:
        pieces = engine.pieces(text, args.piece)
        if args.tokens:
            pieces = _first(pieces, args.tokens)
        schedules = given or _grid(args, angle, engine.config.n_layers)
        settings = {"piece": args.piece, "tokens": sum(map(len, pieces)), "seed": args.seed, "text": text}
        extra = [{}] * len(schedules)
        if args.target_kl is not None:
            some, pieces = halves(pieces)
            schedules, extra = _solved(engine, some, schedules, args.seed, console)
        with bar(console, "reading") as progress:
            readings = meter(engine, pieces, schedules, args.seed + 1, progress)
        complete = all(each.tokens == _dosed(pieces, each.schedule.sink) for each in readings)
        about = record(engine, "meter", **settings, schedules=[str(s) for s in schedules])
        about["complete"] = complete
    print(table(readings, args.target_kl, extra))
    rows = [reading.row() | more for reading, more in zip(readings, extra, strict=True)]
    if args.csv:
        write_csv(args.csv, rows)
    if args.json:
        write_json(args.json, {"record": about, "readings": rows})
    return status(complete, console)


def _solved(engine: Engine, pieces, schedules: list[Schedule], seed: int, console: Console):
    """Schedules of one open dose each with the angles that have their effect on these pieces, and of each
    what a row says of that."""
    doses = [schedule.doses[0] for schedule in schedules]
    with bar(console, "finding angles") as progress:
        found = solve(
            engine.runtime, pieces, doses, sink=schedules[0].sink, seed=seed, progress=estimating(progress)
        )
    extra = [
        {"theta": each.dose.theta, "found_kl": each.kl, "found_kl_error": each.error, "reached": each.reached}
        for each in found
    ]
    return [replace(s, doses=(each.dose,)) for s, each in zip(schedules, found, strict=True)], extra


def table(readings: list[Reading], target: float | None, extra: list[dict]) -> str:
    """Lines of text: a schedule each, means with standard errors."""
    width = max(8, *(len(str(reading.schedule)) for reading in readings))
    names = ("KL", "reverse", "JS", "flips", "rank", "p(choice)", "entropy")
    head = f"{'drug':<{width}}" + "".join(f"{name:>16}" for name in names)
    lines = [head + (f"{'of target':>12}" if target else "")]
    for reading, more in zip(readings, extra, strict=True):
        cells = [_cell(reading.mean[name], reading.error[name]) for name in reading.mean]
        line = f"{reading.schedule!s:<{width}}" + "".join(f"{cell:>16}" for cell in cells)
        if target:
            line += f"{reading.mean['kl'] / target:>12.2f}" if more["reached"] else f"{'not reached':>12}"
        lines.append(line)
    return "\n".join(lines)


def _cell(mean: float, error: float) -> str:
    return f"{mean:.4f}" if error != error else f"{mean:.4f} ±{error:.4f}"


def _grid(args: argparse.Namespace, angle, n_layers: int) -> list[Schedule]:
    """A schedule for each site, law and window of layers."""
    where = [None]
    if args.by_layer:
        if args.by_layer > n_layers:
            raise ConfigError(
                f"--by-layer: a window of {args.by_layer} layers does not fit this model of {n_layers}",
                "by_layer",
            )
        where = [Layers(((i, i + args.by_layer - 1),)) for i in range(n_layers - args.by_layer + 1)]
    laws = args.laws or ("uniform",)
    each = [(site, place, law) for law in laws for site in args.sites or SITES for place in where]
    doses = (Dose(site, angle, place, law) for site, place, law in each)
    return [Schedule.parse((dose,), sink=args.drug_sink) for dose in doses]


def _dosed(pieces: list[list[int]], sink: int) -> int:
    """How many tokens noise can touch."""
    return sum(max(0, len(piece) - sink) for piece in pieces)


def _first(pieces: list[list[int]], tokens: int) -> list[list[int]]:
    """The first pieces, together at most so many tokens."""
    some, left = [], tokens
    for piece in pieces:
        if left > 0:
            some.append(piece[:left])
        left -= len(piece)
    return some
