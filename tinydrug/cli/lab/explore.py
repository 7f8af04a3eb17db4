"""One static page over the results of sweeps: two samples beside each other, their differences by word."""

import argparse
import os

from tinydrug.cli.console import Console
from tinydrug.lab.explore import explore


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("results", metavar="DIR", nargs="+", help="folders that `tinydrug lab sweep` has written")
    add("-o", "--out", metavar="FILE", help="the page (default: explore.html in the first folder)")


def run(args: argparse.Namespace, console: Console) -> None:
    out = args.out or os.path.join(args.results[0], "explore.html")
    shown = explore(args.results, out)
    console.say(f"{shown:,} samples in {out}")
