"""From flags to values: the prompt, the schedule of noise, the sampling, the template. All but the model."""

import argparse
import os
import sys
from dataclasses import dataclass

from tinydrug.engine.sampling import Sampling
from tinydrug.errors import ConfigError, PromptError
from tinydrug.noise import Schedule, load_schedule
from tinydrug.text.chat import TEMPLATES, named_template


@dataclass(frozen=True)
class Inputs:
    """What the flags ask for, as values of the library."""

    schedule: Schedule
    sampling: Sampling  # with a seed
    template: str | None  # Jinja; None: the model's own
    system: str | None


def read(args: argparse.Namespace) -> Inputs:
    """DrugError, ConfigError or PromptError naming the flag."""
    doses = read_schedule(args, args.drug if args.drug_file is None else load_schedule(args.drug_file))
    return Inputs(
        schedule=Schedule.parse(doses, drift=args.drift, diffusion=args.diffusion),
        sampling=_sampling(args),
        template=_template(args.chat_template),
        system=None if args.system_prompt is None else _given(args.system_prompt, "--system-prompt"),
    )


def is_typed(args: argparse.Namespace) -> bool:
    """Whether the prompt comes from standard input."""
    return args.prompt == "-" or args.file == "-" or (args.prompt is None and args.file is None)


def is_interactive(args: argparse.Namespace) -> bool:
    """Whether to converse: on a terminal, if no prompt is given, or -cnv says to go on after it."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or args.json or args.output_file is not None:
        return False
    if args.prompt is None and args.file is None:
        return True
    return args.conversation is True and not args.single_turn and not is_typed(args)


def read_prompt(args: argparse.Namespace) -> str | None:
    """The prompt of -p, of -f or of standard input; None if the chat is to ask for it. PromptError."""
    if not is_typed(args):
        prompt = _file_text(args.file, "--file") if args.prompt is None else _given(args.prompt, "--prompt")
    elif is_interactive(args):
        return None
    else:
        prompt = _without_last_newline(_decoded(sys.stdin.buffer.read(), "standard input"))
    if not prompt.strip() and args.conversation is not False:
        raise PromptError("the prompt is empty: give it some words (with -no-cnv it may be empty)")
    return prompt


def idle_flags(args: argparse.Namespace) -> list[str]:
    """Warnings about flags that have no effect without another."""
    greedy = args.temp == 0
    drugged = args.drug or any(vars(args)[name] is not None for name in ("drug_file", "drift", "diffusion"))
    undosed = not drugged and not is_interactive(args)
    cuts = {"--top-k": args.top_k != 0, "--top-p": args.top_p != 1, "--min-p": args.min_p != 0}
    drugs = {f"--drug-{name}": vars(args)[f"drug_{name}"] is not None for name in ("scale", "sink", "prompt")}
    drugs["--drug-protect-special"] = args.drug_protect_special
    return [
        *(f"{flag} changes nothing at --temp 0, which is greedy" for flag in cuts if greedy and cuts[flag]),
        *(f"{flag} changes nothing without --drug" for flag in drugs if undosed and drugs[flag]),
    ]


def read_schedule(args: argparse.Namespace, doses) -> Schedule:
    """Doses as Schedule.parse takes them, with what the flags say of all doses. DrugError."""
    seed = None if args.drug_seed < 0 else args.drug_seed
    return Schedule.parse(
        doses, sink=args.drug_sink, prompt=args.drug_prompt, scale=args.drug_scale, seed=seed
    )


def _sampling(args: argparse.Namespace) -> Sampling:
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


def _template(which: str | None) -> str | None:
    """--chat-template as Jinja: a known name, a file, or Jinja itself."""
    if which is None or "{" in which:
        return which
    if which in TEMPLATES or not os.path.exists(which):
        return named_template(which)
    text = _file_text(which, "--chat-template")
    if "{" not in text:
        raise ConfigError(f"--chat-template: {which} is no template: there is no {{ in it", "chat_template")
    return text


def _given(text: str, flag: str) -> str:
    """Text of the command line, whose undecodable bytes Python keeps as lone surrogates."""
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
