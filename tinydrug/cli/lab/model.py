"""What the experiments share: the flags of the model, loading it, and a bar with the time left."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tinydrug.api import Engine
from tinydrug.cli.console import Console
from tinydrug.cli.inputs import read_prompt
from tinydrug.cli.options import parse, whole
from tinydrug.cli.talk import interruptible, load_engine
from tinydrug.errors import ConfigError, DrugError, PromptError
from tinydrug.lab.progress import Progress, spoken
from tinydrug.noise import Effect, Schedule, load_schedule
from tinydrug.noise.checks import find
from tinydrug.noise.dose import parse_theta
from tinydrug.noise.sites import find_site

MOST_SEED = 2**63 - 1


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `model` reads."""
    add, on = parser.add_argument_group("model").add_argument, {"action": "store_true"}
    add("-m", "--model", metavar="NAME", help="a file, a folder, or a name (default: the default model)")
    add("--quant", choices=("none", "f32", "q8", "q4"), default="none", metavar="KIND",
        help="quantise on loading: q8, q4, f32, or none: as the file has it (default: none)")  # fmt: skip
    add("--cache-type", choices=("f16", "f32"), default="f16", metavar="KIND",
        help="numbers of the key-value cache: f16 or f32 (default: f16)")  # fmt: skip
    add("-t", "--threads", type=whole(-1), default=-1, metavar="N", help="threads (default: -1, all)")
    add("--pull", **on, help="download a model that is not here without asking")
    add("--offline", **on, help="never use the network")


def model(args: argparse.Namespace, console: Console) -> Engine:
    """The engine of these flags; close it."""
    words = [f"--quant={args.quant}", f"--cache-type={args.cache_type}", f"--threads={args.threads}"]
    words += [] if args.model is None else [f"--model={args.model}"]
    words += [flag for flag in ("--pull", "--offline") if getattr(args, flag[2:])]
    return load_engine(parse(words), console)


@contextmanager
def bar(console: Console, what: str) -> Iterator[Progress]:
    """A progress function for the lab: draws a bar with the time left; Ctrl-C ends the work between two steps
    of the model, and what is done is kept."""
    with interruptible() as check:

        def progress(done: int, total: int, left: float) -> None:
            check()
            wait = spoken(left)
            console.bar(f"{what}{wait and f', {wait} left'}", done / max(total, 1))

        yield progress
    console.clear()


def status(complete: bool, console: Console) -> int:
    """The exit status of an experiment, and a word if Ctrl-C has ended it early."""
    if not complete:
        console.warn("ended by Ctrl-C: the results are of what was done until then")
    return 0 if complete else 130


def prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `prompt` reads."""
    add = parser.add_argument
    add("-p", "--prompt", metavar="TEXT", help='the text; "-" reads standard input')
    add("-f", "--file", metavar="FILE", help="read it from a file")
    parser.set_defaults(conversation=False, single_turn=True, output_file=None, json=None)


def prompt(args: argparse.Namespace) -> str:
    """The text of -p, -f or standard input. PromptError if there is none, ConfigError for two."""
    if args.prompt is not None and args.file is not None:
        raise ConfigError("give --prompt or --file, not both", "prompt")
    if args.prompt is None and args.file is None and sys.stdin.isatty():
        raise PromptError("there is no text: give it with -p or -f")
    text = read_prompt(args)
    if not text.strip():
        raise PromptError("the text is empty: give it some words")
    return text


def sites(text: str) -> tuple[str, ...]:
    """`V,A` -> sites."""
    return _several(text, lambda word: find_site(word).letter)


def thetas(text: str) -> tuple[float, ...]:
    """`0.1,3deg` -> radians."""
    found = _several(text, parse_theta)
    if not all(isinstance(theta, float) for theta in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of angles")
    return found


def theta(text: str) -> float | Effect:
    """`0.1`, `3deg` or `kl=0.05` -> radians, or the effect."""
    try:
        return parse_theta(text)
    except DrugError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def words(registry: Mapping) -> Callable[[str], tuple[str, ...]]:
    """A converter of `uniform,gauss` to names of this registry."""
    return lambda text: _several(text, lambda word: find(registry, word, "such name"))


def seed(text: str) -> int:
    """A seed from which on others are counted: so many that none is beyond 64 bits."""
    if (number := whole(0)(text)) > MOST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at most {MOST_SEED}")
    return number


def seeds(text: str) -> tuple[int, ...]:
    """`1,2,3` or `1-3` -> whole numbers."""
    first, dash, last = text.partition("-")
    if dash and first.isdigit() and last.isdigit() and int(first) <= int(last) < int(first) + 10_000:
        return tuple(range(seed(first), seed(last) + 1))
    return _several(text, seed)


def _several(text: str, read: Callable) -> tuple:
    try:
        found = tuple(dict.fromkeys(read(word.strip()) for word in text.split(",")))
    except DrugError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return found


def drug_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `drug` reads."""
    add = parser.add_argument_group("noise").add_argument
    add("--drug", action="append", metavar="SPEC", help="as of tinydrug itself: V:0.3, A:kl=0.05@8-15~gauss")
    add("--drug-file", metavar="FILE", help="the same from .toml or .csv")
    add("--drug-sink", type=whole(0), metavar="N", help="first positions that are never touched (default: 6)")
    add("--drug-prompt", choices=("last", "all"), metavar="WHICH",
        help="prompt tokens read under noise: last or all (default: last)")  # fmt: skip


def drug(args: argparse.Namespace) -> Schedule:
    """The schedule of these flags. DrugError, ConfigError."""
    if (args.drug is None) == (args.drug_file is None):
        raise ConfigError("give the noise by --drug or --drug-file", "drug")
    doses = args.drug if args.drug_file is None else load_schedule(args.drug_file)
    return Schedule.parse(doses, sink=args.drug_sink, prompt=args.drug_prompt)


def paints() -> bool:
    """Whether standard output takes colours: a terminal does, unless NO_COLOR is set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


def paint(code: str, text: str) -> str:
    """`text` in an ANSI colour, where that is taken."""
    return f"\x1b[{code}m{text}\x1b[0m" if text and paints() else text
