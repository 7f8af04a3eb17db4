"""A 7B Mistral of random bf16 weights, 14.5 GB of safetensors: load time with --quant q4, peak memory, speed.

    python -m bench.big_model --scratch FOLDER [--shape mistral-7b] [--quant q4]  (needs 15 GB of disk)

The run is a process of its own. The last line is one JSON document; the scratch files are removed.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from bench.card import Limits, card, show
from bench.shapes import SHAPES
from bench.synthetic import write_safetensors

CHILD = """
import json, resource, sys, threading, time
start = time.perf_counter()
import tinydrug
peak = [0]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
engine = tinydrug.load(sys.argv[1], quant=sys.argv[2], ctx=2048)
loaded = time.perf_counter() - start
first = None
tokens = 0
for step in engine.stream([1, *range(300, 427)], n=24, ignore_eos=True, drug="V:0.05", drug_seed=1):
    first = first or time.perf_counter() - start
    tokens += 1
session = engine.session()
session.feed([1])
t = time.perf_counter()
for _ in range(16):
    session.feed([5])
decode = 16 / (time.perf_counter() - t)
t = time.perf_counter()
session.reset()
session.feed(list(range(300, 428)))
prefill = 128 / (time.perf_counter() - t)
print(json.dumps({
    "load s": loaded, "start to first token s": first, "peak resident GB": peak[0] / 1e9,
    "resident after GB": resident() / 1e9, "weights GB": engine.runtime.weights.nbytes / 1e9,
    "decode tok/s": decode, "prefill 128 tok/s": prefill,
    "bytes a token GB": engine.runtime.bytes_per_token / 1e9, "tokens under V:0.05": tokens,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--shape", default="mistral-7b", choices=SHAPES)
    parser.add_argument("--quant", default="q4")
    args = parser.parse_args()
    about = card(0)
    print(", ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    folder = args.scratch / f"synthetic-{args.shape}"
    try:
        write_safetensors(SHAPES[args.shape], folder)
        before = Limits(2).read_gbs()
        command = [sys.executable, "-c", CHILD, str(folder), args.quant]
        out = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        if out.returncode:
            sys.exit(f"the run failed: {out.stderr.strip()[-500:]}")
        figures = json.loads(out.stdout)
        figures["read GB/s"] = before
        figures["share of read limit"] = figures["decode tok/s"] * figures["bytes a token GB"] / before
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(f"{args.shape}, --quant {args.quant}", ["what", "figure"], [[k, v] for k, v in figures.items()])
    print(json.dumps({"card": about, "shape": args.shape, "quant": args.quant, **figures}))


if __name__ == "__main__":
    main()
