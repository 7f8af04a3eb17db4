"""From flags to values: the prompt, the schedule of noise, the sampling, the template. All but the model."""

import argparse
import os
import sys

from tinydrug.engine.sampling import Sampling
from tinydrug.errors import ConfigError, PromptError
from tinydrug.noise import Schedule, load_schedule
from tinydrug.text.chat import TEMPLATES, named_template

STDIN = "standard input"


def is_interactive(args: argparse.Namespace) -> bool:
    """Whether to converse: at a terminal, no prompt given or -cnv after it, and the text goes nowhere else."""
    here = sys.stdin.isatty() and sys.stdout.isatty() and not (args.json or args.output_file)
    nothing_given = args.prompt is None and args.file is None
    chat_on = args.conversation is True and not args.single_turn and args.prompt != "-" and args.file != "-"
    return here and (nothing_given or chat_on)


def read_prompt(args: argparse.Namespace) -> str | None:
    """The prompt of -p, of -f or of standard input; None if it is to be typed. PromptError."""
    if args.prompt is not None and args.prompt != "-":
        prompt = given_text(args.prompt, "--prompt")
    elif args.file is not None and args.file != "-":
        prompt = _file_text(args.file, "--file")
    elif args.prompt is None and args.file is None and is_interactive(args):
        return None
    else:
        prompt = _without_last_newline(_decoded(sys.stdin.buffer.read(), STDIN))
    if not prompt.strip() and args.conversation is not False:
        raise PromptError("the prompt is empty: give it some words (with -no-cnv it may be empty)")
    return prompt


def read_schedule(args: argparse.Namespace, specs: list[str] | str | None = None) -> Schedule:
    """The noise of `specs`, else of --drug or --drug-file, with the other flags applied. DrugError."""
    if specs is None:
        specs = load_schedule(args.drug_file) if args.drug_file is not None else args.drug
    seed = None if args.drug_seed < 0 else args.drug_seed
    return Schedule.parse(
        specs, sink=args.drug_sink, prompt=args.drug_prompt, scale=args.drug_scale, seed=seed
    )


def read_sampling(args: argparse.Namespace) -> Sampling:
    """ConfigError naming the flag."""
    return Sampling(
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repeat_penalty=args.repeat_penalty,
        repeat_last_n=args.repeat_last_n,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        logit_bias=tuple(args.logit_bias),
        seed=int.from_bytes(os.urandom(4), "little") if args.seed < 0 else args.seed,
    )


def read_template(args: argparse.Namespace) -> str | None:
    """--chat-template as Jinja: a known name, a file, or Jinja itself. ConfigError, PromptError."""
    which = args.chat_template
    if which is None or "{" in which:
        return which
    if which not in TEMPLATES and os.path.exists(which):
        text = _file_text(which, "--chat-template")
        if "{" not in text:
            raise ConfigError(f"--chat-template: {which} is no template: there is no {{ in it", "chat_template")
        return text
    return named_template(which)


def given_text(text: str, flag: str) -> str:
    """Text of the command line, whose undecodable bytes Python keeps as lone surrogates. PromptError."""
    return _decoded(text.encode("utf-8", "surrogateescape"), flag)


def _file_text(path: str, flag: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise PromptError(f"{flag}: {path}: {error.strerror}") from None
    return _without_last_newline(_decoded(content, f"{flag}: {path}"))


def _without_last_newline(text: str) -> str:
    """An editor or `echo` put it there, and a model goes on differently after it."""
    return text.removesuffix("\n").removesuffix("\r")


def _decoded(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise PromptError(f"{source}: not UTF-8 text: byte 0x{byte:02x} at offset {error.start}") from None
