"""A picture of every kernel against what memory and arithmetic allow: the roofline.

    python -m bench.roofline [--from FILE] [-o bench/roofline.png]

FILE holds what bench.kernels printed; without one, that is measured first. Needs matplotlib. Across:
operations for each byte that must come from memory; upwards: operations a second. What is near the slope is
limited by memory, what is near a level by the arithmetic that the level is named after. A line joins one
kernel on one matrix of the last shape that was measured, for 1, 8, 64 and 512 tokens.
"""

import argparse
import json
from pathlib import Path

from bench import kernels
from bench.card import card, read_flags

STYLES = {  # colours of Okabe and Ito, which everyone can tell apart, and markers
    "linear f32": ("#0072B2", "o"),
    "linear bf16": ("#56B4E9", "v"),
    "linear q8_0": ("#D55E00", "s"),
    "linear q8_256": ("#F0E442", "h"),
    "linear q6_k": ("#E69F00", "P"),
    "linear q4_0": ("#009E73", "^"),
    "linear q4_k": ("#999999", "X"),
    "linear q4_128": ("#000000", "*"),
    "attention f16": ("#CC79A7", "D"),
}
LEFT, RIGHT = 0.3, 4000  # operations a byte


def main() -> None:
    args = read_flags(__doc__, _add_flags)
    if args.source:
        result = json.loads(args.source.read_text().splitlines()[-1])
    else:
        result = {"card": card(args.threads), **kernels.measure(args)}
    draw(result, args.output)
    print(args.output)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="source", type=Path, metavar="FILE", help="draw what bench.kernels has measured")
    add("-o", "--output", type=Path, default=Path(__file__).with_name("roofline.png"))


def draw(result: dict, path: Path) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _ceilings(axes, result["read GB/s"], result["GOP/s"])
    lines: dict[tuple[str, str], list] = {}
    points = [kernels.Point(**row) for row in result["points"]]
    shape = points[-1].case.partition(":")[0]  # an attention's
    for point in (point for point in points if point.case.startswith(shape)):
        lines.setdefault((point.kernel, point.case), []).append((point.ops / point.nbytes, point.gops))
    named = set()
    for (kernel, _), points in lines.items():
        color, marker = STYLES[kernel]
        label = None if kernel in named else kernel
        named.add(kernel)
        style = {"color": color, "marker": marker, "markersize": 6, "linewidth": 0.8, "alpha": 0.85}
        axes.plot(
            *zip(*points, strict=True), label=label, **style, linestyle="-" if "linear" in kernel else ""
        )
    about = result["card"]
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(LEFT, RIGHT),
        xlabel="operations a byte from memory",
        ylabel="GOP/s (a multiply-add counts two)",
        title=f"{about['cpu']}, {about['threads']} threads, {about['isa']}, {about['date'].split()[0]}",
    )
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.legend(loc="lower right", framealpha=1, edgecolor="#dddddd")
    figure.savefig(path)


def _ceilings(axes, read: float, units: dict[str, float]) -> None:
    """The slope of memory, and a level for each unit from where memory can feed it."""
    top = max(units.values())
    axes.plot([LEFT, top / read], [LEFT * read, top], color="black", linewidth=1.4)
    at = LEFT * 1.6
    axes.annotate(
        f"memory read {read:.1f} GB/s",
        (at, at * read),
        xytext=(-4, 6),
        textcoords="offset points",
        rotation=45,
        rotation_mode="anchor",
        transform_rotates_text=True,
    )
    for unit, gops in units.items():
        axes.plot([gops / read, RIGHT], [gops, gops], color="black", linewidth=1.4)
        text = f"{unit} {gops:,.0f} GOP/s"
        axes.annotate(text, (RIGHT, gops), xytext=(-4, 4), textcoords="offset points", ha="right")


if __name__ == "__main__":
    main()
