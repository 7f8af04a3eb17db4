"""Every target in one table: all benchmarks that have some, one after the other.

    python -m bench.all [--only NAME,...] --llama-bench PATH --openvino PYTHON --scratch FOLDER

With --scratch, models of random weights are made once (15 GB) and kept there; --prepare makes them, which
takes minutes, and measures nothing. The last line is one JSON document.
"""

import argparse
import json
import sys
from collections.abc import Iterable

from bench import batch, busy, context, end_to_end, overhead, packed, rewind, start, threads
from bench.card import Company, Row, card, described, read_flags, told

SECTIONS = {
    module.__name__.rpartition(".")[2]: module.measure
    for module in (end_to_end, batch, context, overhead, start, packed, busy, rewind, threads)
}


def main() -> None:
    args = read_flags(__doc__, _add_flags)
    if args.prepare:
        for module in (end_to_end, packed):
            module.prepare(args)
        return
    about = card(args.threads)
    print(described(about), flush=True)
    with Company() as company:
        sections = {name: [row.to_dict() for row in _rows(name, args)] for name in args.only}
    met = [row["met"] for rows in sections.values() for row in rows if row["met"] is not None]
    print(f"\n{company}\n{sum(met)} of {len(met)} targets met")
    print(json.dumps({"card": about, "others": company.share, "sections": sections}))


def _rows(name: str, args: argparse.Namespace) -> Iterable[Row]:
    print(f"\n{name}", flush=True)
    yield from told(SECTIONS[name](args))


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", type=_names, default=list(SECTIONS), help=f"of {', '.join(SECTIONS)}; by commas")
    add("--prepare", action="store_true", help="make the models that --scratch keeps, and leave")


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - SECTIONS.keys():
        sys.exit(f"--only: there is no {', '.join(sorted(unknown))}, only {', '.join(SECTIONS)}")
    return names


if __name__ == "__main__":
    main()
