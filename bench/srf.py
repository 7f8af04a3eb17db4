"""Softmax attention over a cache against srf attention over a state: decoding and memory as contexts grow.

    python -m bench.srf --features 64 --features 256 --context 1024 --context 32768

Two layers of real heads (9 query, 3 key-value, 64 wide), random weights, little else: what is timed is
attention. At every context all of them decode in turns. Figures are medians over rounds, for one layer. The
last line is one JSON document.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import tinydrug
from bench.card import card, show
from bench.shapes import Shape
from bench.synthetic import write_gguf
from tinydrug.engine.cache import RingCache

SHAPE = Shape(L=2, D=576, H=9, G=3, d=64, F=512, V=2048)
ATTENTION = ("attend", "write_cache", "absorb", "weigh", "recall")  # what the kernels' names begin with


class Contender:
    """One engine and its sequence."""

    def __init__(self, path: Path, threads: int | None, ctx: int, **options):
        self.engine = tinydrug.load(path, threads=threads, ctx=ctx, **options)
        self.session = self.engine.session()
        self.rows: list[tuple[float, float]] = []

    def grow(self, context: int) -> float:
        """Read up to this context -> tokens a second."""
        n, start = context - self.session.pos, time.perf_counter()
        self.session.feed([i % 1000 + 5 for i in range(n)])
        return n / (time.perf_counter() - start)

    def decode(self, n: int) -> None:
        """Note milliseconds a token, and of these what attention takes, both for one layer."""
        runtime = self.engine.runtime
        runtime.profile(True)
        start = time.perf_counter()
        for _ in range(n):
            self.session.feed([5])
        ms = (time.perf_counter() - start) / n / SHAPE.L * 1e3
        cycles = runtime.cycles()
        attention = sum(count for name, count in cycles.items() if name.startswith(ATTENTION))
        self.rows.append((ms, ms * attention / sum(cycles.values())))
        runtime.profile(False)

    def nbytes(self) -> int:
        """Of one layer's cache or state, in use."""
        runtime, cache = self.engine.runtime, self.session.cache
        if runtime.features is None:
            return RingCache.nbytes(runtime.config, self.session.pos, runtime.cell) // SHAPE.L
        return (cache.keys.nbytes + cache.by_block().nbytes) // SHAPE.L


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", action="append", type=int, help="default: 64, 256, 1024")
    parser.add_argument("--context", action="append", type=int, help="default: 1024 to 32768")
    parser.add_argument("--state", choices=("f32", "f16"), default="f32")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-n", type=int, default=16, help="tokens decoded a round")
    parser.add_argument("-r", "--rounds", type=int, default=7)
    args = parser.parse_args()
    contexts = sorted(args.context or [1 << i for i in range(10, 16)])
    ctx = contexts[-1] + args.n * args.rounds
    with tempfile.TemporaryDirectory(prefix="tinydrug-bench-") as scratch:
        path = write_gguf(SHAPE, "Q4_0", Path(scratch) / "layers.gguf")
        contenders = {"softmax f16": Contender(path, args.threads, ctx)}
        for m in args.features or [64, 256, 1024]:
            options = {"attention": "srf", "features": m, "state": args.state}
            contenders[f"srf {m} {args.state}"] = Contender(path, args.threads, ctx, **options)
    result = {"card": card(contenders["softmax f16"].engine.threads), "n": args.n, "rounds": args.rounds}
    print(", ".join(f"{k} {v}" for k, v in result["card"].items()), flush=True)
    figures = result["contexts"] = {}
    for context in contexts:
        read = {name: each.grow(context) for name, each in contenders.items()}
        for _ in range(args.rounds):
            for each in contenders.values():
                each.decode(args.n)
        rows = figures[context] = {}
        for name, each in contenders.items():
            total, attention = (statistics.median(row) for row in zip(*each.rows, strict=True))
            each.rows.clear()
            rows[name] = {
                "read tokens/s": round(read[name], 1),
                "decode ms": round(total, 4),
                "attention ms": round(attention, 4),
                "KB": each.nbytes() // 1024,
            }
        columns = ["a layer", *next(iter(rows.values()))]
        show(f"context {context}", columns, [[name, *row.values()] for name, row in rows.items()])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
