"""Decoding after a long context: against after a short one, and against llama.cpp after as long a one.

    python -m bench.context [--shape llama-1.1b:q4] [-d 4096] [--llama-bench PATH]

Every token reads the whole cache, in f16 in both engines.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable

from bench.card import Row, run
from bench.ours import Ours
from bench.peers import LlamaCpp
from bench.synthetic import KINDS, gguf_model, our_model, scratch_folder

SHORT = 64  # tokens
THEIR_ROUNDS = 2  # each reads the long context anew


def measure(args: argparse.Namespace) -> Iterable[Row]:
    n, long = min(args.n, 32), args.depth
    with scratch_folder(args.scratch) as scratch:
        for spec in args.shape or ["llama-1.1b:q4"]:
            speeds = defaultdict(list)
            with Ours(our_model(spec, scratch), args.threads, max(SHORT, long) + n) as ours:
                ours.decode(n, SHORT), ours.decode(n, long)
                for i in range(args.rounds):
                    speeds[SHORT].append(ours.decode(n, SHORT))
                    speeds[long].append(ours.decode(n, long))
                    if args.llama_bench and i < THEIR_ROUNDS:
                        peer = LlamaCpp(args.llama_bench, gguf_model(spec, scratch), args.threads)
                        speeds["theirs"].append(peer.speeds(0, n, long)[1])
            median = {key: statistics.median(values) for key, values in speeds.items()}
            figure = f"{spec} decode after {long}", median[long], "tokens/s"
            yield Row(*figure, f"after {SHORT}", median[SHORT], least=0.8)
            if "theirs" in median:
                yield Row(*figure, f"llama.cpp {KINDS[spec.split(':')[1]]}", median["theirs"], least=1.8)


if __name__ == "__main__":
    run(__doc__, measure)
