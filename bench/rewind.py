"""What sobering up costs: decoding under noise with a rewind every so many tokens, against without any.

    python -m bench.rewind [--shape smollm2-135m:q4]

A generation that is as long as several rewinds apart, noise in every layer. A rewind writes the drugged rows
of the cache anew, all at once: it is prefill.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable

from bench.card import Row, run
from bench.ours import Ours
from bench.synthetic import our_model, scratch_folder

TARGETS = {64: 0.9, 420: None}  # tokens between two rewinds: least share of the speed without
DRUG = "A:0.1"


def measure(args: argparse.Namespace) -> Iterable[Row]:
    n = 2 * args.n if args.quick else 2 * max(TARGETS) + 1
    with scratch_folder(args.scratch) as scratch:
        for spec in args.shape or ["smollm2-135m:q4"]:
            speeds = defaultdict(list)
            with Ours(our_model(spec, scratch), args.threads, 2048) as ours:
                for _ in range(args.rounds):
                    for every in (0, *TARGETS):
                        speeds[every].append(_decode(ours.engine, n, every))
            median = {every: statistics.median(values) for every, values in speeds.items()}
            for every, least in TARGETS.items():
                what = f"{spec} {DRUG}, rewind every {every}"
                yield Row(what, median[every], "tokens/s", "never", median[0], least)


def _decode(engine, n: int, every: int) -> float:
    """Tokens a second of a generation."""
    session = engine.session(DRUG, 1)
    session.rewind_every = every
    with engine.stream([5] * 16, session=session, n=n, ignore_eos=True) as stream:
        for _ in stream:
            pass
    timings = stream.completion.timings
    return timings["decode_tokens"] / timings["decode_s"]


if __name__ == "__main__":
    run(__doc__, measure)
