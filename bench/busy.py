"""Decoding on a busy machine: two processes that do nothing but count run beside it.

    python -m bench.busy [--shape smollm2-135m:q4] [--llama-bench PATH]

Quiet and busy take turns. Ours decodes unmeasured first, since the engine takes a while to find out how many
threads are best. On two cores, half of the quiet speed is a fair share.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from bench.card import Row, run
from bench.ours import Ours
from bench.peers import LlamaCpp
from bench.synthetic import KINDS, gguf_model, our_model, scratch_folder

PROCESSES = 2
SETTLE = 0.3  # seconds until they run


def measure(args: argparse.Namespace) -> Iterable[Row]:
    with scratch_folder(args.scratch) as scratch:
        for spec in args.shape or ["smollm2-135m:q4"]:
            speeds = defaultdict(list)
            with Ours(our_model(spec, scratch), args.threads, 2048) as ours:
                contenders = {"ours": lambda ours=ours: [ours.decode(4 * args.n) for _ in range(2)][1]}
                if args.llama_bench:
                    peer = LlamaCpp(args.llama_bench, gguf_model(spec, scratch), args.threads)
                    contenders["theirs"] = lambda peer=peer: peer.speeds(0, max(4, args.n // 4))[1]
                ours.decode(args.n)
                for _ in range(args.rounds):
                    for who, speed in contenders.items():
                        speeds[who, "quiet"].append(speed())
                        with _company():
                            speeds[who, "busy"].append(speed())
            median = {key: statistics.median(values) for key, values in speeds.items()}
            what = f"decode beside {PROCESSES} busy processes"
            figure = f"{spec} {what}", median["ours", "busy"], "tokens/s"
            yield Row(*figure, "quiet", median["ours", "quiet"], least=0.5)
            if args.llama_bench:
                name, theirs = f"llama.cpp {KINDS[spec.split(':')[1]]}", median["theirs", "busy"]
                yield Row(*figure, f"{name}, as busy", theirs)
                yield Row(f"{name} {what}", theirs, "tokens/s", "quiet", median["theirs", "quiet"])


@contextmanager
def _company() -> Iterator[None]:
    """Busy processes, for a while."""
    counting = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(counting) for _ in range(PROCESSES)]
    time.sleep(SETTLE)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    run(__doc__, measure)
