"""A big model from its packed file: start to first token with the file in the page cache, memory, speed.

    python -m bench.packed [--shape mistral-7b:q4] [--scratch FOLDER]

The model has random weights; `tinydrug quantize` packs it, and a process of its own maps what that wrote.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from bench.card import Row, run
from bench.synthetic import our_model, scratch_folder

ROOT = Path(__file__).parent.parent
DEFAULT = ["mistral-7b:q4"]
CONTEXT = 2048  # tokens
CHILD = """
import json, re, sys, time
start = time.perf_counter()
import tinydrug
from tinydrug.engine.cache import RingCache

engine = tinydrug.load(sys.argv[1], threads=int(sys.argv[2]), ctx=int(sys.argv[3]))
steps = engine.stream([1, 2, 3], n=4, ignore_eos=True)
next(steps)
first = time.perf_counter() - start
for _ in steps:
    pass
runtime = engine.runtime
print(json.dumps({
    "first": first,
    "peak": 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]),
    "cache": RingCache.nbytes(runtime.config, runtime.slots, runtime.cell),
}))
"""


def prepare(args: argparse.Namespace) -> None:
    """Make the models that `measure` needs, in args.scratch."""
    with scratch_folder(args.scratch) as scratch:
        for spec in args.shape or DEFAULT:
            our_model(spec, scratch)


def measure(args: argparse.Namespace) -> Iterable[Row]:
    with scratch_folder(args.scratch) as scratch:
        for spec in args.shape or DEFAULT:
            folder = our_model(spec, scratch)
            nbytes = sum(file.stat().st_size for file in folder.iterdir())
            runs = [_run(folder, args.threads) for _ in range(1 + args.rounds)][
                1:
            ]  # the first fills the cache
            first, peak = (statistics.median(run[what] for run in runs) for what in ("first", "peak"))
            yield Row(f"{spec} start to first token, packed", first, "s", most=3)
            bound = (1.1 * nbytes + runs[0]["cache"]) / 1e9
            yield Row(f"{spec} resident at most", peak / 1e9, "GB", "packed + 10 % + cache", bound, most=1)


def _run(folder: Path, threads: int) -> dict:
    return json.loads(_python("-c", CHILD, folder, threads, CONTEXT))


def _python(*words) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{words[0]} failed with status {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


if __name__ == "__main__":
    run(__doc__, measure)
