"""`tinydrug replay`: generate once more what a record says, and tell whether every token is the same."""

import argparse
import os

from tinydrug.cli.console import Console
from tinydrug.cli.options import Formatter, Parser, parse, whole
from tinydrug.cli.output import PlainText, to_stdout
from tinydrug.engine.record import Record
from tinydrug.errors import ConfigError

EPILOG = """\
The text goes to standard output. Exit status: 0 if every token is the same, 1 if something differs, which is
told; 2 bad input."""


def run(argv: list[str]) -> int:
    """Returns the exit status."""
    args = _parser().parse_args(argv)
    record = Record.load(args.record)
    if record.obstacle:
        raise ConfigError(f"{args.record}: it cannot be replayed: {record.obstacle}", "obstacle")
    with Console(args.quiet, args.verbose) as console:
        from tinydrug.cli.talk import interruptible, load_engine  # Numba: only once the record is found sound

        with load_engine(_flags(args, record), console) as engine:
            if differs := record.foreign(engine.runtime.identity):
                console.error(f"it cannot be the same: {differs[1]}")
                return 1
            out = PlainText(to_stdout)
            with interruptible() as check:

                def each(step):
                    out.step(step)
                    check()

                completion = engine.replay(record, each)
            out.end()
    if differs := record.difference(completion.ids, completion.finish_reason):
        console.error(f"not the same: {differs}")
        return 1
    console.say(f"identical: {len(completion.ids)} tokens")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "tinydrug replay",
        description=__doc__.strip(),
        epilog=EPILOG,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add, on = parser.add_argument, {"action": "store_true"}
    add("record", metavar="RECORD", help="a file that --record, /record or Record.save has written")
    add("-m", "--model", metavar="NAME", help="the model, if it is not where it was")
    add(
        "-t",
        "--threads",
        type=whole(-1),
        default=-1,
        metavar="N",
        help="threads (default: -1, all; they change nothing)",
    )
    add("--pull", **on, help="download a model that is not here without asking")
    add("--offline", **on, help="never use the network")
    add("-q", "--quiet", **on, help="nothing on standard error but errors")
    add("-v", "--verbose", **on, help="more there, and tracebacks of errors")
    return parser


def _flags(args: argparse.Namespace, record: Record) -> argparse.Namespace:
    """The flags of a generation with which the recorded engine would be loaded."""
    model = record.model
    name = args.model
    if name is None:
        name = model["source"] if os.path.exists(model["source"]) else model["name"]
    words = [f"--model={name}", f"--quant={model['quant']}"]
    if features := model.get("features"):
        words += ["--attention=srf", f"--features={features['m']}", f"--feature-seed={features['seed']}"]
    words.append(f"--{'state' if features else 'cache'}-type={model['cache']}")
    words += [f"--ctx-size={model['n_ctx']}", f"--threads={args.threads}"]
    words += [f"--rewind-every={record.rewind_every}", f"--batch-size={record.made_by.get('chunk', 512)}"]
    return parse(words + [flag for flag in ("--pull", "--offline") if getattr(args, flag[2:])])
