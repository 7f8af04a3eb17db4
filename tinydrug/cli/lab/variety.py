"""At equal coherence (sober perplexity), is noise more varied than temperature, top-p and min-p?"""

import argparse
import math

from tinydrug.cli.console import Console
from tinydrug.cli.lab.model import model_arguments
from tinydrug.cli.lab.sweep import run_plan, sweep_arguments
from tinydrug.cli.options import real
from tinydrug.errors import ConfigError
from tinydrug.lab.page import need
from tinydrug.lab.plan import SOBER, load_plan


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("plan", metavar="PLAN", nargs="?", default="variety",
        help="a plan of a sweep (default: variety, which comes with the package)")  # fmt: skip
    add("--perplexity", type=real, nargs="+", default=[2.3, 2.6, 3.0], metavar="X",
        help="where curves are compared (default: 2.3 2.6 3)")  # fmt: skip
    add("--against", default="temperature", metavar="FAMILY",
        help="what all others are compared with (default: temperature)")  # fmt: skip
    sweep_arguments(parser)
    model_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    plan = load_plan(args.plan)
    if bad := [x for x in args.perplexity if not 1 < x < math.inf]:
        raise ConfigError(f"--perplexity: {bad[0]} is not above 1", "perplexity")
    families = dict.fromkeys(each.family for each in plan.conditions if each.family != SOBER)
    if args.against not in families:
        raise ConfigError(f"--against: the plan has no family {args.against!r}, only {', '.join(families)}")
    need("matplotlib")
    tables = run_plan(plan, args, console)
    if not tables.complete:
        return 130
    from tinydrug.lab.results import folder, write_csv, write_json
    from tinydrug.lab.variety import compare, curves, plot, verdicts

    out, found = folder(args.out), curves(tables.cells)
    rows = compare(found, args.perplexity, args.against)
    write_csv(out / "variety.csv", rows)
    write_json(out / "variety.json", rows)
    print(f"{'perplexity':>10}  {'family':<18}{'level':>7}{'Vendi':>7}  {'interval':<14}"
          f"{'more':>6}  {'interval':<15}{'coherent':>8}{'loops':>7}")  # fmt: skip
    for row in rows:
        if math.isnan(row["fair_vendi"]):  # it does not get there
            continue
        print(
            f"{row['perplexity']:>10g}  {row['family']:<18}{row['level']:>7.3g}{row['fair_vendi']:>7.2f}  "
            f"{_interval(row, 'fair_vendi'):<14}{row['more']:>+6.2f}  {_interval(row, 'more'):<15}"
            f"{row['coherent']:>8.0%}{row['loops']:>7.0%}"
        )
    print()
    for text in verdicts(rows, args.against):
        print(text)
    console.say(f"picture: {plot(found, out / 'variety.png', tables.model)}")
    return 0


def _interval(row: dict, key: str) -> str:
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return "-" if math.isnan(low) else f"{low:.2f} to {high:.2f}"
