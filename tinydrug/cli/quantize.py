"""`tinydrug quantize`: pack a model's weights once, into a folder from which every later start maps them."""

from tinydrug.cli.console import Console
from tinydrug.cli.options import Formatter, Parser, whole

EPILOG = """\
The folder needs nothing of the model: `tinydrug -m FOLDER` runs it. In the usual place, it is also found when
the model is asked for with the same --quant. Its name goes to standard output. Exit status: 0; 1 a failure at
run time; 2 bad input."""


def run(argv: list[str]) -> int:
    """Returns the exit status."""
    args = _parser().parse_args(argv)
    with Console(args.quiet, args.verbose) as console:
        from tinydrug.loading import quantize  # Numba: only once the flags are found sound

        doing = {"load": "packing the weights", "write": "writing them"}
        folder = quantize(
            args.model,
            quant=args.quant,
            output=args.output,
            threads=None if args.threads < 0 else args.threads,
            check_tensors=args.check_tensors,
            pull=True if args.pull else None,
            offline=args.offline,
            bars=console.bars,
            progress=lambda phase, share: console.bar(doing[phase], share),
        )
        console.clear()
        print(folder)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "tinydrug quantize",
        description=__doc__.strip(),
        epilog=EPILOG,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add, on = parser.add_argument, {"action": "store_true"}
    add("model", metavar="MODEL", help="a file, a folder, a known name or ORG/NAME, as -m takes it")
    add(
        "--quant",
        choices=("none", "f32", "q8", "q4"),
        default="q4",
        metavar="KIND",
        help="q8, q4, f32, or none: as the model has it (default: q4)",
    )
    add("-o", "--output", metavar="FOLDER", help="where to (default: weights/MODEL-KIND)")
    add("-t", "--threads", type=whole(-1), default=-1, metavar="N", help="threads (default: -1, all)")
    add("--check-tensors", **on, help="look for NaN and infinity in the weights first")
    add("--pull", **on, help="download a model that is not here without asking")
    add("--offline", **on, help="never use the network")
    add("-q", "--quiet", **on, help="nothing on standard error but errors")
    add("-v", "--verbose", **on, help="more there, and tracebacks of errors")
    return parser
