"""The command without a word in front: answer one prompt, or hand over to the chat."""

import argparse
import sys

from tinydrug.cli import inputs
from tinydrug.cli.console import Console
from tinydrug.cli.output import JsonLines, PlainText, destination, recorder
from tinydrug.errors import ConfigError


def run(args: argparse.Namespace) -> int:
    """Returns the exit status."""
    with Console(args.quiet, args.verbose, args.color) as console:
        wanted = inputs.read(args)
        for text in inputs.idle_flags(args):
            console.warn(text)
        interactive = inputs.is_interactive(args)
        if sys.stdin.isatty() and inputs.is_typed(args) and not interactive:
            console.say("type the prompt, then Ctrl-D")
        if interactive and args.record is not None:
            raise ConfigError("--record is for one answer: in a chat, /record FILE keeps the last", "record")
        prompt = inputs.read_prompt(args)
        with destination(args.output_file) as write, recorder(args.record) as record:
            from tinydrug.cli.talk import Talk, load_engine  # Numba: only once all flags are found sound

            with load_engine(args, console) as engine:
                talk = Talk(args, wanted, engine, console)
                if args.show_schedule:
                    console.line(talk.describe())
                if interactive:
                    from tinydrug.cli.chat import Chat

                    return Chat(talk, console).run(prompt, args.single_turn)
                completion = _answer(args, talk, prompt, write)
                if record:
                    record(completion.record.to_json())
        console.say(talk.summary(completion))
        if args.verify_noise:
            console.line(talk.verified(completion))
        if args.show_schedule:
            console.line(talk.moved())
        elif not completion.schedule.is_sober and not completion.moved:
            console.warn("the noise moved nothing: the text is too short, see --drug-sink and --drug-prompt")
    return 130 if completion.finish_reason == "cancelled" else 0


def _answer(args, talk, text, write):
    """Write what the model makes of one prompt -> its completion."""
    prompt = talk.prompt_of(text)
    shown = talk.shown(prompt)
    out = JsonLines(write, talk, shown) if args.json else PlainText(write)
    if args.echo and not args.json:
        out.text(shown)
    completion = talk.answer(prompt, out.step)
    out.end(completion)
    return completion
