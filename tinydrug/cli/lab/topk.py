"""What a dose does to the likeliest next tokens: a histogram of their likelihoods, sober and drugged.

Bars: | what both have in common, - what the drugged one lacks, + what it has in excess. Colours tell the rank
that a token has without noise. Mean over noise seeds."""

import argparse

from tinydrug.cli.console import Console
from tinydrug.cli.lab.model import (
    drug,
    drug_arguments,
    model,
    model_arguments,
    paint,
    prompt,
    prompt_arguments,
    seeds,
)  # fmt: skip
from tinydrug.cli.options import whole
from tinydrug.lab.results import write_csv, write_json
from tinydrug.lab.tokens import bar
from tinydrug.lab.topk import Shift, topk

WIDTH = 60  # characters of the longest bar
RANKS = {10: "32", 50: "36", 240: "33"}  # up to this sober rank: colour; beyond them the last
BEYOND = "31"


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    prompt_arguments(parser)
    drug_arguments(parser)
    add("-k", "--top", type=whole(1), default=10, metavar="N", help="how many tokens (default: 10)")
    add("--seeds", type=seeds, default=tuple(range(1, 9)), metavar="LIST", help="of the noise (default: 1-8)")
    add("--csv", metavar="FILE", help="write the table there, too")
    add("--json", metavar="FILE", help="write the table and the record of the run there, too")
    model_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> None:
    text, schedule = prompt(args), drug(args)
    with model(args, console) as engine:
        shift = topk(engine, text, schedule, args.top, args.seeds)
    print(histogram(shift))
    console.say(f"drug {shift.record['settings']['drug']}, KL(sober||drugged) {shift.kl:.3g} nats")
    if args.csv:
        write_csv(args.csv, shift.rows())
    if args.json:
        write_json(args.json, {"record": shift.record, "kl": shift.kl, "tokens": shift.rows()})


def histogram(shift: Shift) -> str:
    """The shift as lines of text, coloured if standard output is for that."""
    full = max(shift.sober.max(), shift.drugged.max())
    width = max(5, *(len(name) for name in shift.names))
    lines = [f"{'token':<{width}} {'sober':>6} {'drugged':>8} {'rank':>13}"]
    for row in shift.rows():
        common, rest = bar(row["sober"], row["drugged"], WIDTH, full)
        color = next((code for most, code in RANKS.items() if row["rank"] <= most), BEYOND)
        ranks = f"{row['rank']} > {row['rank_drugged']}"
        bars = paint(color, common) + paint(f"1;{color}", rest)
        name = paint(color, f"{row['text']:<{width}}")
        lines.append(f"{name} {row['sober']:>6.3f} {row['drugged']:>8.3f} {ranks:>13}  {bars}".rstrip())
    return "\n".join(lines)
