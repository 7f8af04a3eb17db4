"""Decode and prefill of whole models, ours, llama.cpp and OpenVINO in turns.

    python -m bench.end_to_end --shape llama-1.1b:q4 --llama-bench PATH --openvino PYTHON --scratch FOLDER

q4 and q8 are our own forms, held against llama.cpp's Q4_0 and Q8_0 of about as many bytes; q4_0 and q8_0 are
one file for both, as are f16 and bf16.

In decode every token reads all weights once: the bound is reading them, and nothing more, in the same minute.
In prefill 512 tokens are read at once: arithmetic is. Figures are medians over rounds in which all take
turns. llama.cpp computes the logits of the last position, OpenVINO those of all, and is held against ours of
all. The 7B shape is measured with a prompt of 128 and 16 tokens.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from bench.card import Row, run
from bench.limits import Limits
from bench.ours import Ours
from bench.peers import LlamaCpp, OpenVino, openvino_folder
from bench.shapes import SHAPES
from bench.synthetic import BLOCKS, KINDS, gguf_model, our_model, scratch_folder

DEFAULT = [
    *(f"{name}:{kind}" for name in ("smollm2-135m", "llama-1.1b") for kind in ("q4", "q8", "q4_0", "q8_0")),
    "mistral-7b:q4",
]
PREFILL = 2.3  # times llama.cpp: the target for every shape in quantised weights; others have no targets


class Goal(NamedTuple):
    """What is aimed at for a shape, as ratios, and how long a run is."""

    decode: float | None = None  # of llama.cpp's
    read: float | None = None  # decode, of what reading memory allows
    prefill: float | None = None  # of OpenVINO's
    dots: float | None = None  # prefill, of what int8 dot products allow
    p: int = 512
    n: int = 64
    openvino: tuple[str, ...] = ()  # kinds of its weights that are tried


GOALS = {
    "tiny": Goal(),
    "smollm2-135m": Goal(decode=1.6, prefill=1.25, openvino=("int8",)),
    "llama-1.1b": Goal(decode=1.0, read=0.93, prefill=1.05, dots=0.72, n=32, openvino=("int8", "int4")),
    "mistral-7b": Goal(decode=1.0, read=0.95, p=128, n=16),
}


def prepare(args: argparse.Namespace) -> None:
    """Make the models that `measure` needs, in args.scratch."""
    with scratch_folder(args.scratch) as scratch:
        for spec in args.shape or DEFAULT:
            our_model(spec, scratch)
            if args.llama_bench:
                gguf_model(spec, scratch)
            _openvino_folders(spec, args, scratch)


def measure(args: argparse.Namespace) -> Iterable[Row]:
    limits = Limits(args.threads)
    with scratch_folder(args.scratch) as scratch:
        for spec in args.shape or DEFAULT:
            yield from _measure_model(spec, args, limits, scratch)


def _measure_model(spec: str, args, limits: Limits, scratch) -> Iterable[Row]:
    name, kind = spec.split(":")
    goal, quantised = GOALS[name], KINDS[kind] in BLOCKS
    p, n = min(args.p, goal.p), min(args.n, goal.n)
    figures = defaultdict(list)
    with ExitStack() as stack:
        ours = stack.enter_context(Ours(our_model(spec, scratch), args.threads, 2048))
        theirs = {}
        if args.llama_bench:
            gguf = gguf_model(spec, scratch)
            theirs[f"llama.cpp {KINDS[kind]}"] = LlamaCpp(args.llama_bench, gguf, args.threads)
        for weights, folder in _openvino_folders(spec, args, scratch).items():
            peer = stack.enter_context(OpenVino(args.openvino, folder, args.threads))
            theirs[f"OpenVINO {weights}"] = peer
        ours.decode(n)
        ours.prefill_all(p)
        for _ in range(args.rounds):
            # The median of three passes: after the peers' turns the first may find its pages gone.
            figures["read"].append(limits.read_gbs(area=ours.weights))
            figures["decode"].append(ours.decode(n))
            figures["prefill"].append(ours.prefill(p))
            figures["prefill all"].append(ours.prefill_all(p))
            for peer, contender in theirs.items():
                figures[peer].append(contender.speeds(p, n))
        bytes_per_token = ours.bytes_per_token
    units = {unit: gops for unit, gops in limits.gops().items() if (unit != "f32") == quantised}
    median = {what: statistics.median(values) for what, values in figures.items() if what not in theirs}
    speeds = {
        peer: tuple(map(statistics.median, zip(*figures[peer], strict=True))) for peer in theirs
    }  # (prefill, decode)

    def row(what, ours, against, theirs, least=None):
        return Row(f"{spec} {what}", ours, "tokens/s", against, theirs, least if quantised else None)

    for peer, (_, speed) in speeds.items():
        yield row(f"decode {n}", median["decode"], peer, speed, goal.decode if "llama" in peer else None)
    bound = 1e9 * median["read"] / bytes_per_token
    yield row(f"decode {n}", median["decode"], f"reading at {median['read']:.1f} GB/s", bound, goal.read)
    for peer, (speed, _) in speeds.items():
        if "llama" in peer:
            yield row(f"prefill {p}", median["prefill"], peer, speed, PREFILL)
        else:
            yield row(f"prefill {p}, all logits", median["prefill all"], peer, speed, goal.prefill)
    for unit, gops in units.items():
        bound, least = 1e9 * gops / SHAPES[name].prompt_ops, goal.dots if unit == "int8 dots" else None
        yield row(f"prefill {p}", median["prefill"], f"{unit} at {gops:.0f} GOP/s", bound, least)


def _openvino_folders(spec: str, args, scratch) -> dict[str, Path]:
    """Its models of a shape, by kind of weights; none without its Python."""
    name = spec.partition(":")[0]
    kinds = GOALS[name].openvino if args.openvino else ()
    return {kind: openvino_folder(args.openvino, name, kind, scratch) for kind in kinds}


if __name__ == "__main__":
    run(__doc__, measure)
