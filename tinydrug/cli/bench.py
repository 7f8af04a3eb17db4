"""`tinydrug bench`: tokens a second of reading prompts and of generating, in llama-bench's terms."""

import argparse
import csv
import io
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tinydrug import __version__
from tinydrug.cli.console import Console
from tinydrug.cli.options import Formatter, Parser, parse, whole
from tinydrug.cli.output import to_stdout
from tinydrug.errors import ConfigError
from tinydrug.noise import Schedule

EPILOG = """\
-p, -n, -d, -t and --drug take several values, by commas or repeated, and -p, -n, -d, -t ranges: 1-8, 1-8+2,
64-512*2. Each combination is a test: ppN reads N prompt tokens at once, tgN generates N one at a time, and
"@ dN" does so after N others. A test runs once to warm up, then -r times; loading, compiling and what comes
before are not timed.

examples:
  tinydrug bench -p 512 -n 64 -d 0,4096
  tinydrug bench -m model.gguf -t 1,2 -p 0 -o csv
  tinydrug bench -p 0 --drug "sober,V:0.05,K:0.05 V:0.05~sign" -d 512

The table goes to standard output, all else to standard error."""

RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?:([+*])(\d{1,9}))?)?", re.ASCII)
LONGEST = 10_000  # values of a range


class Test(NamedTuple):
    """So many prompt tokens read, then so many generated."""

    n_prompt: int
    n_gen: int

    def __str__(self) -> str:
        return "+".join(f"{what}{n}" for what, n in (("pp", self.n_prompt), ("tg", self.n_gen)) if n)


def run(argv: list[str]) -> int:
    """Print the table; returns the exit status."""
    args = _parser().parse_args(argv)
    drugs = [(text, _schedule(text, args)) for text in args.drug]
    if not (tests := _tests(args)):
        raise ConfigError("nothing to run: -p, -n and -pg are all 0", "n_gen")
    engines = [
        _flags(args, model, threads, args.n_depth, tests) for model in args.model for threads in args.threads
    ]
    with Console(args.quiet, args.verbose) as console:
        results = (row for flags in engines for row in _measured(flags, args, tests, drugs, console))
        for text in FORMATS[args.output](results):
            to_stdout(text)
    return 0


def sample(session, test: Test, depth: int, ids: list[int], check: Callable[[], None] = lambda: None) -> int:
    """Nanoseconds a test takes after so many sober tokens; `check` is called between two steps.

    ids: what a context is filled with from its first position on, for all samples of a session."""
    turn_to(session, depth, ids)
    prompt_end, end = depth + test.n_prompt, depth + sum(test)
    start = time.perf_counter_ns()
    if test.n_prompt:
        session.feed(ids[depth:prompt_end], session.schedule.prompt)
    for token in ids[prompt_end:end]:
        check()
        if session.rewind_every and session.dirty >= session.rewind_every:
            session.sober_up()
        session.feed([token], "all")
    return time.perf_counter_ns() - start


def turn_to(session, depth: int, ids: list[int]) -> None:
    """Bring a session that was only fed `ids` to so many of them, none drugged."""
    try:
        session.rewind(session.pos - min(depth, session.clean))
    except ValueError:  # a ring that no longer holds what came before
        session.reset()
    if rest := ids[session.pos : depth]:
        session.feed(rest, outputs=0)


def processor() -> str:
    """What the system calls the processor."""
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not on Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()


# --- measuring ------------------------------------------------------------------------------------------
def _measured(flags, args, tests, drugs, console) -> Iterator[dict]:
    """The results of one engine, as they come."""
    from tinydrug.cli.talk import interruptible, load_engine  # Numba: only once all flags are found sound

    with load_engine(flags, console) as engine, interruptible() as check:
        about = _about(engine, flags)
        ids, drugs = _tokens(engine), [(text, engine.resolve(schedule)) for text, schedule in drugs]
        session = engine.session(drug_seed=args.drug_seed)
        for depth, (drug, schedule), test in product(args.n_depth, drugs, tests):
            started = time.perf_counter()
            session.dose(schedule, args.drug_seed)
            compile_s = engine.timings["compile_s"] + time.perf_counter() - started  # the laws' kernels
            if not args.no_warmup:
                sample(session, test._replace(n_gen=min(test.n_gen, 1)), depth, ids, check)
            ns = [sample(session, test, depth, ids, check) for _ in range(args.repetitions)]
            ts = [1e9 * sum(test) / each for each in ns]
            yield about | {
                "drug": drug,
                "drug_seed": session.noise.seed,
                "compile_s": round(compile_s, 3),
                "n_prompt": test.n_prompt,
                "n_gen": test.n_gen,
                "n_depth": depth,
                "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "avg_ns": round(statistics.mean(ns)),
                "stddev_ns": round(_spread(ns)),
                "avg_ts": statistics.mean(ts),
                "stddev_ts": _spread(ts),
                "samples_ns": ns,
                "samples_ts": ts,
            }


def _tokens(engine) -> list[int]:
    """As many random tokens as a context holds."""
    import numpy as np

    return np.random.default_rng(0).integers(0, engine.config.vocab_size, engine.n_ctx).tolist()


def _about(engine, flags) -> dict:
    """What is the same for all tests of an engine, under llama-bench's names, and ours at the end."""
    from tinydrug.hub.kept import find
    from tinydrug.kernels.isa import ISA
    from tinydrug.loading import inspect

    path = find(flags.model, flags.quant, offline=True).path
    checkpoint = inspect(path)
    kind = flags.quant
    if kind == "none":
        kind = max(checkpoint.bytes_by_kind, key=checkpoint.bytes_by_kind.get)
    n = checkpoint.parameters
    size = f"{n / 1e9:.3g}B" if n >= 1e9 else f"{n / 1e6:.3g}M"
    return {
        "build_commit": __version__,
        "cpu_info": processor(),
        "gpu_info": "",
        "backends": "CPU",
        "model_filename": str(path),
        "model_type": f"{checkpoint.model_type} {size} {kind}",
        "model_size": engine.runtime.weights.nbytes,
        "model_n_params": n,
        "n_batch": engine.runtime.chunk,
        "n_ubatch": engine.runtime.chunk,
        "n_threads": engine.threads,
        "type_k": engine.runtime.cell,
        "type_v": engine.runtime.cell,
        "isa": ISA,
        "quant": flags.quant,
        "load_s": round(engine.timings["load_s"], 3),
    }


def _spread(samples: list) -> float:
    """The standard deviation of these, estimated from them."""
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


# --- flags ----------------------------------------------------------------------------------------------
def _parser() -> Parser:
    parser = Parser(
        "tinydrug bench",
        description=__doc__.strip(),
        epilog=EPILOG,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    on = {"action": "store_true"}

    def add(*names, help, **more):
        if "action" not in more:
            more.setdefault("metavar", "N")
        parser.add_argument(*names, help=help, **more)

    # fmt: off
    add("-m", "--model", action=_Several, type=lambda name: [name], default=[None], metavar="NAME",
        help="as everywhere; may be given several times (default: the default model)")
    add("--quant", default="none", metavar="KIND", help="quantise on loading, as everywhere (default: none)")
    add("--cache-type", default="f16", metavar="KIND", help="numbers of the key-value cache (default: f16)")
    add("-b", "--batch-size", type=whole(1), default=512, help="prompt tokens read at once (default: 512)")
    add("-t", "--threads", action=_Several, type=_numbers(1), default=[-1],
        help="threads (default: all this process may use)")
    add("-p", "--n-prompt", action=_Several, type=_numbers(0), default=[512],
        help="tokens to read at once; 0: none (default: 512)")
    add("-n", "--n-gen", action=_Several, type=_numbers(0), default=[128],
        help="tokens to generate; 0: none (default: 128)")
    add("-pg", action=_Several, type=_pair, default=[], metavar="PP,TG",
        help="read PP and then generate TG, timed together")
    add("-d", "--n-depth", action=_Several, type=_numbers(0), default=[0],
        help="tokens in the context before (default: 0)")
    add("--drug", action=_Several, type=lambda text: text.split(","), default=["sober"], metavar="SPEC",
        help="noise, as everywhere, but by commas each is a test of its own; doses that act together are "
        "parted by spaces; sober: none (default: sober)")
    add("--drug-prompt", choices=("none", "last", "all"), metavar="WHICH",
        help="prompt tokens read under noise: none, last or all (default: none)")
    add("--drug-seed", type=whole(0), default=0, help="of the noise (default: 0)")
    add("--rewind-every", type=whole(0), default=420,
        help="drugged tokens after which the cache is written anew without noise (default: 420; 0: never)")
    add("-r", "--repetitions", type=whole(1), default=5, help="of each test (default: 5)")
    add("--no-warmup", **on, help="time the first run, too")
    add("-o", "--output", choices=FORMATS, default="md", metavar="FORM",
        help=f"{', '.join(FORMATS)} (default: md)")
    add("--pull", **on, help="download a model that is not here without asking")
    add("--offline", **on, help="never use the network")
    add("-q", "--quiet", **on, help="nothing on standard error but errors")
    add("-v", "--verbose", **on, help="more there, and tracebacks of errors")
    # fmt: on
    return parser


class _Several(argparse.Action):
    """A flag whose values add up when it is repeated; the first one replaces the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if given is self.default else given + values)


def _numbers(least: int):
    """A converter of `512`, `0,4096`, `1-8`, `1-8+2` and `64-512*2` to a list of whole numbers."""

    def convert(text: str) -> list[int]:
        numbers = [n for part in text.split(",") for n in _range(part)]
        if any(n < least for n in numbers):
            raise argparse.ArgumentTypeError(f"{text!r}: at least {least} is needed")
        return numbers

    return convert


def _range(text: str) -> list[int]:
    match = RANGE.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number or a range such as 1-8+2, 64-512*2")
    n, last, by = int(match[1]), int(match[2] or match[1]), int(match[4] or 1)
    grows = by > 1 and n > 0 if match[3] == "*" else by > 0
    if last < n or not grows:
        raise argparse.ArgumentTypeError(f"{text!r} is a range that goes nowhere")
    numbers = []
    while n <= last:
        numbers.append(n)
        n = n * by if match[3] == "*" else n + by
        if len(numbers) > LONGEST:
            raise argparse.ArgumentTypeError(f"{text!r} are more than {LONGEST} values")
    return numbers


def _pair(text: str) -> list[Test]:
    match = re.fullmatch(r"(\d{1,9}),(\d{1,9})", text, re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not two whole numbers, as in 512,128")
    return [Test(int(match[1]), int(match[2]))]


def _schedule(text: str, args) -> Schedule:
    """One test's noise; its doses are parted by spaces. DrugError."""
    return Schedule.parse(text.split(), prompt=args.drug_prompt)


def _tests(args) -> list[Test]:
    """Prompts first, then generation, then both, as llama-bench has them."""
    tests = [Test(n, 0) for n in args.n_prompt] + [Test(0, n) for n in args.n_gen] + args.pg
    return [test for test in tests if any(test)]


def _flags(args, model: str | None, threads: int, depths: Iterable[int], tests) -> argparse.Namespace:
    """The flags of a generation with which an engine is loaded that has room for every test."""
    words = [] if model is None else [f"--model={model}"]
    words += [f"--quant={args.quant}", f"--cache-type={args.cache_type}", f"--threads={threads}"]
    words += [f"--batch-size={args.batch_size}", f"--rewind-every={args.rewind_every}"]
    words.append(f"--ctx-size={max(depths) + max(map(sum, tests))}")
    return parse(
        words + [f"--{flag}" for flag in ("pull", "offline", "quiet", "verbose") if vars(args)[flag]]
    )


# --- forms of the table ---------------------------------------------------------------------------------
COLUMNS = {  # of the Markdown table: heading and width (negative: flush left), and what stands there
    "model": (-30, lambda row: row["model_type"]),
    "size": (10, lambda row: _bytes(row["model_size"])),
    "params": (10, lambda row: _count(row["model_n_params"])),
    "backend": (-10, lambda row: row["backends"]),
    "threads": (7, lambda row: str(row["n_threads"])),
    "drug": (-12, lambda row: row["drug"]),
    "compile s": (9, lambda row: f"{row['compile_s']:.2f}"),
    "test": (15, lambda row: _test_name(row)),
    "t/s": (20, lambda row: f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}"),
}


def markdown(rows: Iterable[dict]) -> Iterator[str]:
    """A table for people, row by row."""
    yield _line((name, width) for name, (width, _) in COLUMNS.items())
    rules = ("-" * (abs(width) - 1) + ("-" if width < 0 else ":") for width, _ in COLUMNS.values())
    yield "| " + " | ".join(rules) + " |\n"
    for row in rows:
        yield _line((text(row), width) for width, text in COLUMNS.values())
    yield f"\nbuild: {row['build_commit']} ({row['isa']})\n"


def _line(cells) -> str:
    return "| " + " | ".join(text.ljust(-w) if w < 0 else text.rjust(w) for text, w in cells) + " |\n"


def _test_name(row: dict) -> str:
    depth = f" @ d{row['n_depth']}" if row["n_depth"] else ""
    return f"{Test(row['n_prompt'], row['n_gen'])}{depth}"


def _bytes(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def comma_separated(rows: Iterable[dict]) -> Iterator[str]:
    """A line of names, then one for each test, all quoted; without the single samples."""
    for i, row in enumerate(rows):
        flat = {name: value for name, value in row.items() if not isinstance(value, list)}
        if i == 0:
            yield ",".join(flat) + "\n"
        text = io.StringIO()
        csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(flat.values())
        yield text.getvalue()


def json_array(rows: Iterable[dict]) -> Iterator[str]:
    """One document, a list."""
    for i, row in enumerate(rows):
        yield ("[\n" if i == 0 else ",\n") + json.dumps(row, indent=2)
    yield "\n]\n"


def json_lines(rows: Iterable[dict]) -> Iterator[str]:
    """A document a line."""
    for row in rows:
        yield json.dumps(row) + "\n"


FORMATS = {"md": markdown, "csv": comma_separated, "json": json_array, "jsonl": json_lines}
