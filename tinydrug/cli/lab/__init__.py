"""`tinydrug lab`: experiments with noise, each a file of its own; the next word chooses which.

A file NAME.py has `arguments(parser)`, which adds its flags, and `run(args, console)`, which returns the exit
status (None: 0); the first sentence of its docstring is its help.
"""

import difflib
import importlib

from tinydrug.cli.console import Console
from tinydrug.cli.options import Formatter, Parser
from tinydrug.errors import ConfigError


def run(argv: list[str]) -> int:
    """Returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, words = argv[0], argv[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1) or COMMANDS
        raise ConfigError(f"there is no experiment {name!r}, only {', '.join(near)}")
    experiment = importlib.import_module(f"{__name__}.{name}")
    parser = Parser(
        f"tinydrug lab {name}",
        description=experiment.__doc__.strip(),
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    experiment.arguments(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="nothing on standard error but errors")
    parser.add_argument("-v", "--verbose", action="store_true", help="more there, and tracebacks of errors")
    args = parser.parse_args(words)
    if args.quiet and args.verbose:
        raise ConfigError("give --quiet or --verbose, not both", "quiet")
    with Console(args.quiet, args.verbose) as console:
        return experiment.run(args, console) or 0


def _help() -> str:
    lines = [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: tinydrug lab EXPERIMENT ... (EXPERIMENT --help tells its flags)", "", *lines])


COMMANDS = {  # name of the file: what it is for
    "vergence": "how far noise drives hidden states from the sober ones, layer by layer",
    "topk": "what a dose does to the likeliest next tokens",
    "meter": "what a dose does on a text, and which theta has a given effect",
    "doubt": "how sure the model is, told by noise",
    "sweep": "prompts x sites x laws x doses x seeds: variety, coherence, cliffs",
    "explore": "a page over sweeps: two doses beside each other, word by word",
    "variety": "at equal coherence, is noise more varied than temperature, top-p and min-p?",
    "repeat": "does noise keep long greedy texts from repeating themselves?",
}
