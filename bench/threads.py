"""How speed grows with threads: 1, 2, 4 and so on, to all there are.

    python -m bench.threads [--shape smollm2-135m:q4]

Every number of threads has an engine of its own; they take turns.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack

from bench.card import Row, run
from bench.ours import Ours
from bench.synthetic import our_model, scratch_folder


def measure(args: argparse.Namespace) -> Iterable[Row]:
    counts = sorted({1 << i for i in range(args.threads.bit_length())} | {args.threads})
    with scratch_folder(args.scratch) as scratch, ExitStack() as stack:
        for spec in args.shape or ["smollm2-135m:q4"]:
            model, speeds = our_model(spec, scratch), defaultdict(list)
            engines = {count: stack.enter_context(Ours(model, count, 2048)) for count in counts}
            for _ in range(args.rounds):
                for count, ours in engines.items():
                    speeds[f"decode {args.n}", count].append(ours.decode(args.n))
                    speeds[f"prefill {args.p}", count].append(ours.prefill(args.p))
            for (what, count), values in sorted(speeds.items()):
                one = statistics.median(speeds[what, 1])
                figures = statistics.median(values), "tokens/s", "1 thread", one
                yield Row(f"{spec} {what}, {count} threads", *figures)


if __name__ == "__main__":
    run(__doc__, measure)
