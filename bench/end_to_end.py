"""Decode and prefill, ours and llama.cpp's in turns, medians and ratios.

    python -m bench.end_to_end --model smollm2.gguf --llama-bench PATH --shape llama-1.1b:Q4_0 --drug V:0.05

In decode every token reads all weights once (memory-bound); prefill feeds 512 tokens at once (arithmetic-
bound). The last line is one JSON document. A figure is a median over rounds; ours and theirs alternate, so
both see the same machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tinydrug
from bench.card import Limits, card, show
from bench.shapes import SHAPES
from bench.synthetic import write_gguf


def decode(engine, n: int, depth: int = 0, drug=None) -> float:
    """Tokens a second, one sequence."""
    session = engine.session(drug, 1)
    if depth:
        session.feed([5] * depth)
    session.feed([5])
    start = time.perf_counter()
    for _ in range(n):
        session.feed([5], "all")
    return n / (time.perf_counter() - start)


def batch_decode(engine, n: int, sequences: int) -> float:
    """Tokens a second of so many sequences decoded together."""
    from tinydrug.engine.runtime import Part

    sessions = [engine.session() for _ in range(sequences)]
    for session in sessions:
        session.feed([5])
    start = time.perf_counter()
    for _ in range(n):
        engine.runtime.step([Part(session, [5], False, 1) for session in sessions])
    return n * sequences / (time.perf_counter() - start)


def prefill(engine, n: int) -> float:
    """Tokens a second of a prompt of n."""
    session = engine.session()
    start = time.perf_counter()
    session.feed([i % 1000 + 5 for i in range(n)])
    return n / (time.perf_counter() - start)


def llama_cpp(exe: str, model: Path, threads: int, p: int, n: int, depth: int = 0) -> float:
    """llama-bench's tokens a second for a prompt of p, or n generated tokens at a depth."""
    command = [
        exe,
        "-m",
        str(model),
        "-t",
        str(threads),
        "-p",
        str(p),
        "-n",
        str(n),
        "-d",
        str(depth),
        "-r",
        "1",
        "-o",
        "json",
    ]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"{exe} failed with status {out.returncode}: {out.stderr.strip()[-200:]}")
    return json.loads(out.stdout)[0]["avg_ts"]


def measure(path: Path, args, limits: Limits) -> dict:
    """All figures of one model: medians over rounds, ratios of medians."""
    engine = tinydrug.load(
        path, quant=args.quant, threads=args.threads, ctx=8192 if args.depth > 2048 else 2048
    )
    decode(engine, 4)
    rows: dict[str, list[float]] = {}

    def note(name, value):
        rows.setdefault(name, []).append(value)

    for _ in range(args.rounds):
        note("read GB/s", limits.read_gbs(1))
        note("decode", decode(engine, args.n))
        if args.llama_bench:
            note("their decode", llama_cpp(args.llama_bench, path, args.threads, 0, args.n))
        note("prefill", prefill(engine, args.p))
        if args.llama_bench:
            note("their prefill", llama_cpp(args.llama_bench, path, args.threads, args.p, 0))
        note("8 together", batch_decode(engine, max(args.n // 4, 8), 8))
        if args.depth:
            note(f"decode at {args.depth}", decode(engine, args.n, args.depth))
            if args.llama_bench:
                note(
                    f"their decode at {args.depth}",
                    llama_cpp(args.llama_bench, path, args.threads, 0, args.n, args.depth),
                )
        for drug in args.drug:
            note(f"decode {drug}", decode(engine, args.n, args.drug_depth, drug))
            note(f"decode sober at {args.drug_depth}", decode(engine, args.n, args.drug_depth))
        note("read GB/s", limits.read_gbs(1))
    figures = {name: statistics.median(values) for name, values in rows.items()}
    figures["weights GB"] = engine.runtime.weights.nbytes / 1e9
    bytes_read = engine.runtime.bytes_per_token / 1e9
    figures["share of read limit"] = figures["decode"] * bytes_read / figures["read GB/s"]
    for mine, theirs in (("decode", "their decode"), ("prefill", "their prefill")):
        if theirs in figures:
            figures[f"{mine} ratio"] = figures[mine] / figures[theirs]
    engine.close()
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", action="append", default=[], type=Path, help="a GGUF file; may be repeated"
    )
    parser.add_argument(
        "--shape", action="append", default=[], help=f"NAME:KIND, random weights; names: {', '.join(SHAPES)}"
    )
    parser.add_argument("--quant", default="none")
    parser.add_argument("--llama-bench", help="llama.cpp's llama-bench, to run in turns with ours")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("-d", "--depth", type=int, default=0, help="also decode after so many tokens")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--drug", action="append", default=[], help="also decode under this noise")
    parser.add_argument("--drug-depth", type=int, default=512)
    args = parser.parse_args()
    from tinydrug.engine.threads import check_threads

    args.threads = check_threads(args.threads)
    result = {
        "card": card(args.threads),
        "p": args.p,
        "n": args.n,
        "rounds": args.rounds,
        "quant": args.quant,
        "models": {},
    }
    print(", ".join(f"{k} {v}" for k, v in result["card"].items()), flush=True)
    limits = Limits(args.threads)
    result["dot GOP/s"] = limits.dot_gops()
    with tempfile.TemporaryDirectory(prefix="tinydrug-bench-") as scratch:
        models = {path.name: path for path in args.model}
        for spec in args.shape:
            name, _, kind = spec.partition(":")
            models[spec] = Path(scratch) / f"{name}-{kind}.gguf"
        for name, path in models.items():
            if not path.exists():
                shape, _, kind = name.partition(":")
                write_gguf(SHAPES[shape], kind or "Q4_0", kind or "Q4_0", path)
            figures = result["models"][name] = measure(path, args, limits)
            show(f"{name} (tokens a second)", ["what", "figure"], [[k, v] for k, v in figures.items()])
            if path.parent == Path(scratch):
                path.unlink()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
