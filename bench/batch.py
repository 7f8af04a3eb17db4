"""Eight sequences decoded together, against one.

    python -m bench.batch [--shape llama-1.1b:q4]

A step reads the weights once, whatever the number of sequences.
"""

import argparse
import statistics
import time
from collections.abc import Iterable

from bench.card import Row, run
from bench.ours import Ours
from bench.synthetic import our_model, scratch_folder
from tinydrug.engine.runtime import Part

SEQUENCES = 8


def measure(args: argparse.Namespace) -> Iterable[Row]:
    with scratch_folder(args.scratch) as scratch:
        for spec in args.shape or ["llama-1.1b:q4"]:
            with Ours(our_model(spec, scratch), args.threads, 2048) as ours:
                ours.decode(args.n)
                together, alone = [], []
                for _ in range(args.rounds):
                    together.append(_decode(ours, args.n))
                    alone.append(ours.decode(args.n))
            figures = statistics.median(together), "tokens/s", "one", statistics.median(alone)
            yield Row(f"{spec} {SEQUENCES} sequences together", *figures, least=5)


def _decode(ours: Ours, n: int) -> float:
    """Tokens a second of all sequences."""
    sessions = [ours.engine.session() for _ in range(SEQUENCES)]
    for session, token in zip(sessions, ours.ids, strict=False):
        session.feed([token])
    start = time.perf_counter()
    for token in ours.ids[:n]:
        ours.engine.runtime.step([Part(session, [token], False, 1) for session in sessions])
    return n * SEQUENCES / (time.perf_counter() - start)


if __name__ == "__main__":
    run(__doc__, measure)
