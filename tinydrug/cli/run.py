"""The command without a word in front: answer one prompt, or hand over to the chat."""

import argparse
import sys

from tinydrug.cli import inputs
from tinydrug.cli.console import Console
from tinydrug.cli.options import parse
from tinydrug.cli.output import JsonLines, PlainText, destination


def run(argv: list[str]) -> int:
    """Returns the exit status."""
    args = parse(argv)
    with Console(args.quiet, args.verbose, args.color) as console:
        from tinydrug.cli.talk import Talk, load_engine

        schedule = inputs.read_schedule(args)
        inputs.read_sampling(args), inputs.read_template(args)  # refused before anything is loaded
        interactive = inputs.is_interactive(args)
        if sys.stdin.isatty() and not interactive and not (args.prompt or args.file):
            console.say("type the prompt, then Ctrl-D")
        prompt = inputs.read_prompt(args)
        ...
