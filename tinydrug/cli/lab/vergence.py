"""How far noise drives the last token's hidden states apart, for every site, injection window and dose.

Writes into a folder: vergence.csv, .json and .npz (the data with the record of the run), PNG pictures, and
vergence.html, an interactive page with everything in it."""

import argparse
import time

from tinydrug.cli.console import Console
from tinydrug.cli.lab.model import (
    bar,
    model,
    model_arguments,
    prompt,
    prompt_arguments,
    seeds,
    sites,
    status,
    thetas,
)
from tinydrug.cli.options import whole
from tinydrug.errors import ConfigError
from tinydrug.lab.page import need
from tinydrug.lab.results import folder, write_csv, write_json, write_npz, write_text
from tinydrug.lab.vergence import DOSES, Plan, vergence
from tinydrug.lab.vergence_page import vergence_page
from tinydrug.lab.vergence_plots import save_plots
from tinydrug.noise.laws import LAWS
from tinydrug.noise.sites import SITES


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    prompt_arguments(parser)
    add("--sites", type=sites, default=tuple(SITES), metavar="LIST", help="sites by commas (default: all)")
    add("--doses", type=thetas, default=DOSES, metavar="LIST",
        help="thetas by commas, in radians or as 3deg; 0 comes with them (default: "
        f"{','.join(f'{theta:g}' for theta in DOSES)})")  # fmt: skip
    add("--width", type=whole(1), metavar="N", help=f"layers of an injection window (default: {Plan.width})")
    add("--stack", action="store_true", help="windows from layer 0 to each layer, in place of --width layers")
    add("--law", choices=tuple(LAWS), default="uniform", metavar="LAW",
        help=f"of the direction: {', '.join(LAWS)} (default: uniform)")  # fmt: skip
    add("--noise", choices=("all", "last"), default="all", metavar="WHERE",
        help="positions read under noise: all, or only the last (default: all)")  # fmt: skip
    add("--seeds", type=seeds, default=(1, 2, 3), metavar="LIST", help="of the noise (default: 1,2,3)")
    add("--data-only", action="store_true", help="no pictures, no page: needs neither matplotlib nor plotly")
    add("-o", "--output", default="vergence", metavar="FOLDER", help="where to (default: vergence)")
    model_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    if args.stack and args.width is not None:
        raise ConfigError("--width: the windows of --stack grow from layer to layer: drop one", "width")
    width = Plan.width if args.width is None else args.width
    plan = Plan(args.sites, args.doses, width, args.stack, args.law, args.noise, seeds=args.seeds)
    text, out = prompt(args), folder(args.output)
    if not args.data_only:
        need("matplotlib", "plotly")
    with model(args, console) as engine, bar(console, "vergence") as progress:
        start = time.monotonic()
        found = vergence(engine, text, plan, progress)
    write_npz(out / "vergence.npz", found.arrays(), found.record)
    write_csv(out / "vergence.csv", found.rows())
    write_json(out / "vergence.json", {"record": found.record} | found.arrays())
    names = ["vergence.npz", "vergence.csv", "vergence.json"]
    if not args.data_only:
        write_text(out / "vergence.html", vergence_page(found))
        names += ["vergence.html", *(path.name for path in save_plots(found, out))]
    console.say(f"{out}: {', '.join(names)}; {time.monotonic() - start:.0f} s")
    return status(found.complete, console)
