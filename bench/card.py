"""What every benchmark has in common: its flags, the machine it ran on, and a table of figures held against
targets."""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import tinydrug
from bench.shapes import SHAPES
from tinydrug.cli.bench import processor
from tinydrug.engine.threads import check_threads
from tinydrug.kernels.isa import ISA

QUICK = {"p": 64, "n": 8, "depth": 256, "rounds": 1}


@dataclass(frozen=True)
class Row:
    """A figure, and what it is held against. Targets are of their ratio, or of the figure alone."""

    what: str
    ours: float
    unit: str
    against: str = ""
    theirs: float | None = None
    least: float | None = None
    most: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.ours / self.theirs if self.theirs else None

    @property
    def target(self) -> str:
        parts = (("≥", self.least), ("≤", self.most))
        return " ".join(f"{sign} {bound:g}" for sign, bound in parts if bound is not None)

    @property
    def met(self) -> bool | None:
        """Whether the target is; None if there is none."""
        if not self.target:
            return None
        figure = self.ours if self.ratio is None else self.ratio
        return (self.least is None or figure >= self.least) and (self.most is None or figure <= self.most)

    def cells(self) -> list[str]:
        theirs, ratio = ("" if x is None else number(x) for x in (self.theirs, self.ratio))
        met = {None: "", True: "met", False: "missed"}[self.met]
        return [self.what, number(self.ours), self.unit, self.against, theirs, ratio, self.target, met]

    def to_dict(self) -> dict:
        return asdict(self) | {"ratio": self.ratio, "met": self.met}


COLUMNS = {  # of a table of rows: heading and width; what does not fit pushes the others aside
    "what": -44,
    "ours": 9,
    "unit": -8,
    "held against": -26,
    "theirs": 9,
    "ratio": 7,
    "target": 8,
    "": -6,
}


def run(
    doc: str,
    measure: Callable[[argparse.Namespace], Iterable[Row]],
    add_flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """A benchmark as a command: its card, its rows as they come, and all of it as JSON in the last line."""
    args = read_flags(doc, add_flags)
    about = card(args.threads)
    print(described(about), flush=True)
    with Company() as company:
        rows = [row.to_dict() for row in told(measure(args))]
    print(company)
    print(json.dumps({"card": about, "others": company.share, "rows": rows}))


def read_flags(
    doc: str, add_flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    """The flags that all benchmarks know, whether or not they need them, and some of one's own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-t", "--threads", type=int, help="default: all this process may use")
    add("-p", type=int, default=512, help="tokens of a prompt")
    add("-n", type=int, default=64, help="tokens generated")
    add("-d", "--depth", type=int, default=4096, help="tokens of a long context")
    add("-r", "--rounds", type=int, default=5, help="in which everything is measured in turns")
    add("--quick", action="store_true", help=f"short: {', '.join(f'{k} {v}' for k, v in QUICK.items())}")
    add(
        "--shape",
        action="append",
        help=f"NAME:KIND, NAME one of {', '.join(SHAPES)}, KIND q4, q8, q4_0, q8_0, f16, bf16",
    )
    add("--model", help="where real text matters: a model (default: the default model)")
    add("--scratch", type=Path, help="where models of random weights are kept (default: nowhere)")
    add("--llama-bench", metavar="PATH", help="llama.cpp's llama-bench, to run in turns with ours")
    add("--openvino", metavar="PYTHON", help="of an environment with openvino, optimum-intel and nncf")
    add_flags(parser)
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    args.threads = check_threads(args.threads)
    return args


class Company:
    """What other processes took of all cores while a `with` block ran: `share`, None where nobody says."""

    share: float | None = None

    def __enter__(self) -> "Company":
        self._start = self._now()
        return self

    def __exit__(self, *exception) -> None:
        start, end = self._start, self._now()
        if start and end:
            everyone, ours, wall = (then - now for now, then in zip(start, end, strict=True))
            self.share = round(max(0, everyone - ours) / (wall * os.cpu_count()), 3)

    def __str__(self) -> str:
        return "" if self.share is None else f"meanwhile other processes took {self.share:.1%} of all cores"

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds of all processes, of this one and its children that ended, and of the clock."""
        try:
            ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):  # not on Linux
            return None
        idle, waiting = ticks[3:5]
        busy = (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:4]), time.perf_counter()


def card(threads: int) -> dict:
    """The machine and the versions, as a flat dict."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "isa": ISA,
        "threads": threads,
        "load": [round(x, 2) for x in os.getloadavg()],
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "tinydrug": tinydrug.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("numba", "numpy", "llvmlite")},
    }


def described(about: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in about.items())


def told(rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows, each printed as it comes."""
    print(_line(list(COLUMNS)), flush=True)
    for row in rows:
        print(_line(row.cells()), flush=True)
        yield row


def _line(cells: list[str]) -> str:
    widths = COLUMNS.values()
    padded = (x.ljust(-w) if w < 0 else x.rjust(w) for x, w in zip(cells, widths, strict=True))
    return "  ".join(padded).rstrip()


def number(x: float) -> str:
    """Three digits, or all before the point."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def show(title: str, columns: list[str], rows: list[list]) -> None:
    """Any other table, its columns as wide as they need."""
    cells = [[number(x) if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(title)
    for first, *others in [columns, *cells]:
        padded = (x.rjust(w) for x, w in zip(others, widths[1:], strict=True))
        print("  ".join(["", first.ljust(widths[0]), *padded]))
    print(flush=True)
