"""Kernels one at a time, against what memory and arithmetic allow.

    python -m bench.kernels [--shape llama-1.1b:q4]

Linear maps alone: every format on matrices of real shapes, for 1 to 512 tokens. For a few tokens as many
copies of the weights are multiplied in turn as no cache holds. Then passes of a whole model: a token after a
long context, and a prompt; each kernel's share of the time, and attention against the limits. The last line
is one JSON document, of which bench.roofline draws a picture.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np

from bench.card import card, described, read_flags, show
from bench.limits import Limits
from bench.ours import Ours
from bench.shapes import SHAPES, Shape
from bench.synthetic import our_model, scratch_folder
from tinydrug.cli.bench import turn_to
from tinydrug.formats.config import Config
from tinydrug.formats.tensor import KINDS as BLOCK
from tinydrug.formats.tensor import Tensor
from tinydrug.formats.weights import Need, Weights, padded
from tinydrug.kernels import amx
from tinydrug.kernels.linear_tiles import scratch_bytes
from tinydrug.kernels.memory import aligned
from tinydrug.kernels.pack import FORMATS
from tinydrug.kernels.tables import CALL, OPERAND
from tinydrug.kernels.team import Team
from tinydrug.models.program import Program

KINDS = (
    "f32",
    "bf16",
    "q8_0",
    "q8_256",
    "q6_k",
    "q4_0",
    "q4_k",
    "q4_128",
)  # of weights; the others are made like these
OURS = {"q8_256": "q8", "q4_128": "q4"}  # no file has it: --quant that makes it
MATRICES = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")  # the others are as small, or the same
TOKENS = (1, 8, 64, 512)
STREAMED = 1 << 29  # bytes of weights that are multiplied in turn, so that they come from memory
SWEEPS = 3  # over all points, one after the other: a stall of the machine spoils a point in one of them
FEW = 16  # tokens up to which memory can be what limits


@dataclass(frozen=True)
class Point:
    """A kernel at work. `nbytes`: weights or cache, and activations in and out, once each; `ops`: of these a
    multiply-add counts two; `unit`: what does them, a name of Limits.gops."""

    kernel: str
    case: str
    tokens: int
    seconds: float
    nbytes: int
    ops: int
    unit: str

    @property
    def gbs(self) -> float:
        return self.nbytes / self.seconds / 1e9

    @property
    def gops(self) -> float:
        return self.ops / self.seconds / 1e9


class Maps:
    """A program of nothing but linear maps, copies of one matrix (N, K): x (T, K) -> (T, N) by each."""

    def __init__(self, kind: str, n: int, k: int, tokens: int, threads: int, copies: int):
        tensor = _random_tensor("f32" if kind in OURS else kind, n, k)
        names = [f"w{i}" for i in range(copies)]
        needs = {name: Need(name, (n, k)) for name in names}
        self.weights = Weights(needs, dict.fromkeys(names, tensor), OURS.get(kind, "none"), threads)
        config = Config("llama", 1, k, 1, 1, 32, k, 32, 32, 1e-5, "silu", True)
        program = Program(config, self.weights, "f16")
        x = program._value(self.weights["w0"].k)
        for name in names:
            program.linear(x, name)
        place = program.place()
        areas: dict[int, np.ndarray] = {}
        for slot, size in enumerate(program.row_bytes):
            areas.setdefault(place[slot], aligned((tokens + 16 + threads, size), np.uint8))
        areas[place[x.slot]].view(np.float32)[:] = 0.5
        self._areas, self._rows = areas, []

        def operand(value):
            row, area = OPERAND.rows(), areas[place[value.slot]]
            row["data"], row["stride"] = area.ctypes.data, value.nbytes
            row["private"] = area[-threads:].ctypes.data if value.private else 0
            self._rows.append(row)
            return row.ctypes.data

        self._ops = program.table(operand, self.weights.table)
        self._scratch = aligned((threads, padded(scratch_bytes(x.width), 4096)), np.uint8)
        self._call = CALL.rows()
        self._call["scratch"] = self._scratch.ctypes.data
        self._call["scratch_stride"] = self._scratch.strides[0]
        self._call["n_tokens"], self._call["n_ops"] = tokens, len(self._ops)
        self._call["ops"] = self._ops.ctypes.data
        self._team, self._threads, self._copies = Team(self._call, threads), threads, copies

    def __enter__(self) -> "Maps":
        return self

    def __exit__(self, *exception) -> None:
        self._team.close()

    def seconds(self, rounds: int) -> float:
        """Median time of one map."""
        self._team.run(self._threads)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            self._team.run(self._threads)
            times.append(time.perf_counter() - start)
        return statistics.median(times) / self._copies


def linear_points(name: str, args: argparse.Namespace) -> Iterable[Point]:
    """Every format and matrix of a shape, for several numbers of tokens."""
    matrices = SHAPES[name].matrices()
    for matrix in MATRICES:
        n, k = matrices[matrix]
        for kind in KINDS:
            layout = FORMATS[kind]
            weight = n // 16 * (k // 32) * layout.panel_bytes
            weight += n // 16 * -(-k // layout.group) * layout.scale_bytes if layout.group else 0
            for tokens in TOKENS if kind in OURS or k % BLOCK[kind][0] == 0 else ():
                copies = -(-STREAMED // weight) if tokens <= FEW and not args.quick else 1
                with Maps(kind, n, k, tokens, args.threads, copies) as maps:
                    seconds = maps.seconds(args.rounds)
                nbytes, ops = weight + 4 * tokens * (n + k), 2 * n * k * tokens
                tiles = amx.AVAILABLE and tokens >= amx.LEAST
                unit = ("int8 tiles" if tiles else "int8 dots") if layout.group else "f32"
                yield Point(f"linear {kind}", f"{name} {matrix}", tokens, seconds, nbytes, ops, unit)


def medians(sweeps: Iterable[Iterable[Point]]) -> list[Point]:
    """Of every point the median of its times in several sweeps."""
    same = zip(*sweeps, strict=True)
    return [replace(times[0], seconds=statistics.median(p.seconds for p in times)) for times in same]


def _random_tensor(kind: str, n: int, k: int) -> Tensor:
    """Weights of any kind, none of them NaN, infinite or denormal."""
    rng = np.random.default_rng(0)
    elements, nbytes = BLOCK[kind]
    if kind == "f32":
        data = rng.standard_normal(n * k, np.float32).view(np.uint8)
    elif kind == "bf16":
        data = (rng.standard_normal(n * k, np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        data = rng.integers(1, 0x38, n * k // elements * nbytes, np.uint8)  # no exponent of a half overflows
    return Tensor("w", (n, k), kind, data, "memory")


class Pass:
    """Forward passes of a whole model, and what each kernel takes of them."""

    def __init__(self, ours: Ours, shape: Shape):
        self._ours, self._shape = ours, shape
        self._session = ours.engine.session()

    def seconds(self, tokens: int, depth: int, rounds: int) -> dict[str, float]:
        """Of each kernel, for so many tokens at once after so many others."""
        runtime, ids = self._ours.engine.runtime, self._ours.ids
        total: dict[str, float] = {}
        for i in range(rounds + 1):
            turn_to(self._session, depth, ids)
            runtime.profile(True)
            start = time.perf_counter()
            self._session.feed(ids[depth : depth + tokens])
            seconds = time.perf_counter() - start
            cycles = runtime.cycles()
            runtime.profile(False)
            for name, count in cycles.items() if i else ():  # the first one warms up
                share = count / sum(cycles.values())
                total[name] = total.get(name, 0) + seconds * share / rounds
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def attention(self, case: str, tokens: int, depth: int, seconds: float) -> Point:
        """Of all layers together: every key and value that is seen, once, queries and results, once."""
        s = self._shape
        pairs = sum(depth + i + 1 for i in range(tokens))  # of a query and a key
        nbytes = s.L * (2 * s.G * s.d * 2 * (depth + tokens) + 8 * tokens * s.H * s.d)
        return Point("attention f16", case, tokens, seconds, nbytes, 4 * s.L * s.H * s.d * pairs, "f32")


def measure(args: argparse.Namespace) -> dict:
    """The limits, the points, and the shares of passes, JSON-safe."""
    limits = Limits(args.threads)
    ceilings = limits.gops()
    read, points, passes = limits.read_gbs(), [], {}
    specs = args.shape or ["smollm2-135m:q4", "llama-1.1b:q4"]
    for spec in specs:
        sweeps = 1 if args.quick else SWEEPS
        points += medians(linear_points(spec.partition(":")[0], args) for _ in range(sweeps))
    with scratch_folder(args.scratch) as scratch:
        spec = specs[-1]
        shape = SHAPES[spec.partition(":")[0]]
        with Ours(our_model(spec, scratch), args.threads, args.depth + 1) as ours:
            run = Pass(ours, shape)
            for tokens, depth in ((1, args.depth), (min(args.p, args.depth), 0)):
                case = f"{spec}, {tokens} after {depth}"
                passes[case] = run.seconds(tokens, depth, args.rounds)
                seconds = sum(s for name, s in passes[case].items() if name.startswith("attend"))
                points.append(run.attention(case, tokens, depth, seconds))
    read = statistics.mean((read, limits.read_gbs()))
    rows = [asdict(point) for point in points]
    return {"read GB/s": read, "GOP/s": ceilings, "points": rows, "passes": passes}


def main() -> None:
    args = read_flags(__doc__)
    about = card(args.threads)
    print(described(about), flush=True)
    result = measure(args)
    read, ceilings = result["read GB/s"], result["GOP/s"]
    rows = []
    for point in (Point(**row) for row in result["points"]):
        shares = point.gbs / read, point.gops / ceilings[point.unit]
        rows.append([point.kernel, point.case, point.tokens, 1e3 * point.seconds])
        rows[-1] += [point.gbs, shares[0], point.gops, shares[1]]
    title = ", ".join(f"{unit} {gops:.0f} GOP/s" for unit, gops in ceilings.items())
    columns = ["kernel", "case", "tokens", "ms", "GB/s", "of read", "GOP/s", "of unit"]
    show(f"limits: memory read {read:.1f} GB/s, {title}", columns, rows)
    for case, kernels in result["passes"].items():
        total = sum(kernels.values())
        shares = [[name, 1e3 * seconds, 100 * seconds / total] for name, seconds in kernels.items()]
        show(f"{case}: {1e3 * total:.1f} ms", ["kernel", "ms", "%"], shares)
    print(json.dumps({"card": about, **result}))


if __name__ == "__main__":
    main()
