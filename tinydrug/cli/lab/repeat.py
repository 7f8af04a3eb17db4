"""Does noise keep long greedy texts from repeating themselves, as a repeat penalty does?"""

import argparse

from tinydrug.cli.console import Console
from tinydrug.cli.lab.model import model_arguments
from tinydrug.cli.lab.sweep import run_plan, sweep_arguments
from tinydrug.lab.page import need
from tinydrug.lab.plan import load_plan


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", nargs="?", default="repeat",
        help="a plan of a sweep (default: repeat, which comes with the package)")  # fmt: skip
    sweep_arguments(parser)
    model_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    plan = load_plan(args.plan)
    need("matplotlib")
    tables = run_plan(plan, args, console)
    if not tables.complete:
        return 130
    from tinydrug.lab.repeat import best, plot, table
    from tinydrug.lab.results import folder, write_csv, write_json

    out, rows = folder(args.out), table(tables.conditions)
    write_csv(out / "repeat.csv", rows)
    write_json(out / "repeat.json", rows)
    print(f"{'condition':<24}{'samples':>8}{'tokens':>8}{'perplexity':>12}{'loops':>7}{'rep-4':>7}"
          f"{'rep-4 of ' + str(plan.match) + ' words':>22}")  # fmt: skip
    for row in rows:
        print(f"{row['condition']:<24}{row['samples']:>8}{row['tokens']:>8.0f}{row['perplexity']:>12.3g}"
              f"{row['loops']:>7.0%}{row['rep_4']:>7.2f}{row['fair_rep_4']:>22.2f}")  # fmt: skip
    print()
    for text in best(rows):
        print(text)
    console.say(f"picture: {plot(rows, out / 'repeat.png', tables.model)}")
    return 0
