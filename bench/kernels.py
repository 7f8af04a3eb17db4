"""Each linear kernel on real shapes, against what memory and arithmetic allow.

    python -m bench.kernels [-t THREADS] [--shape smollm2-135m]

One token is memory-bound: GB/s of weights against the read limit. 512 tokens are arithmetic-bound: GOP/s (a
multiply-add counts two) against int8 dot products on registers. The last line is one JSON document.
"""

import argparse
import json
import statistics
import time

import numpy as np

from bench.card import Limits, card, show
from bench.shapes import SHAPES
from tinydrug.engine.threads import check_threads
from tinydrug.formats.config import Config
from tinydrug.formats.tensor import Tensor
from tinydrug.formats.weights import Need, Weights, padded
from tinydrug.kernels.linear import scratch_bytes
from tinydrug.kernels.memory import aligned
from tinydrug.kernels.pack import FORMATS
from tinydrug.kernels.tables import CALL, OPERAND
from tinydrug.kernels.team import Team
from tinydrug.models.program import Program

QUANTS = {"f32": "f32", "q8_0": "q8", "q4_0": "q4"}


class One:
    """One linear map in a program of its own: x (T, K) -> (T, N)."""

    def __init__(self, format_: str, n: int, k: int, tokens: int, threads: int):
        values = np.random.default_rng(0).standard_normal((n, k), np.float32)
        data = values.reshape(-1).view(np.uint8)
        tensor = Tensor("w", (n, k), "f32", data, "memory")
        self.weights = Weights({"w": Need("w", (n, k))}, {"w": tensor}, QUANTS[format_], threads)
        config = Config("llama", 1, k, 1, 1, 32, k, 32, 32, 1e-5, "silu", True)
        program = Program(config, self.weights, "f16")
        x = program._value(self.weights["w"].k)
        y = program.linear(x, "w")
        self._areas = [aligned((tokens + 8 + threads, size), np.uint8) for size in program.row_bytes]
        self._areas[x.slot].view(np.float32)[:] = 0.5
        self._rows = []

        def operand(value):
            row, area = OPERAND.rows(), self._areas[value.slot]
            row["data"], row["stride"] = area.ctypes.data, value.nbytes
            row["private"] = area[-threads:].ctypes.data if value.private else 0
            self._rows.append(row)
            return row.ctypes.data

        self._ops = program.table(operand, self.weights.table)
        self._call = CALL.rows()
        self._call["n_tokens"], self._call["n_ops"] = tokens, len(self._ops)
        self._call["ops"] = self._ops.ctypes.data
        self._scratch = aligned((threads, padded(scratch_bytes(k), 4096)), np.uint8)
        self._call["scratch"], self._call["scratch_stride"] = (
            self._scratch.ctypes.data,
            self._scratch.strides[0],
        )
        self._team, self._threads, self._y = Team(self._call, threads), threads, y

    def seconds(self, rounds: int) -> float:
        """Median time of one call."""
        self._team.run(self._threads)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            self._team.run(self._threads)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def close(self) -> None:
        self._team.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument(
        "--shape", action="append", choices=SHAPES, help="default: smollm2-135m and llama-1.1b"
    )
    parser.add_argument("-r", "--rounds", type=int, default=9)
    args = parser.parse_args()
    threads = check_threads(args.threads)
    about = card(threads)
    print(", ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    limits = Limits(threads)
    read, dots = limits.read_gbs(), limits.dot_gops()
    rows = []
    for shape in args.shape or ["smollm2-135m", "llama-1.1b"]:
        for name, (n, k) in dict(SHAPES[shape].matrices()).items():
            if name.endswith(("k_proj", "v_proj", "up_proj")):
                continue  # as small as, or the same as, one that is measured
            for format_ in QUANTS:
                layout = FORMATS[format_]
                nbytes = n // 16 * (k // 32) * (layout.panel_bytes + layout.scale_bytes)
                figures = []
                for tokens in (1, 512):
                    one = One(format_, n, k, tokens, threads)
                    figures.append(one.seconds(args.rounds))
                    one.close()
                gbs, gops = nbytes / figures[0] / 1e9, 2 * n * k * 512 / figures[1] / 1e9
                rows.append([f"{shape} {name}", format_, nbytes / 1e6, gbs, gbs / read, gops, gops / dots])
    columns = ["matrix", "format", "MB", "GB/s, 1 token", "of read", "GOP/s, 512", "of dots"]
    show(
        f"read limit {read:.1f} GB/s, int8 dot products {dots:.0f} GOP/s; small matrices come from cache",
        columns,
        rows,
    )
    print(json.dumps({"card": about, "read GB/s": read, "dot GOP/s": dots, "columns": columns, "rows": rows}))


if __name__ == "__main__":
    main()
