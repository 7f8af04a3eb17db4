"""The flags: llama.cpp's names, one parser, and the checks that need nothing but the command line."""

import argparse
import difflib
import os
import re

from tinydrug.errors import ConfigError

DESCRIPTION = """\
Answer a prompt, or chat, with a language model on the CPU, with noise in its attention vectors if asked for.
Without -p or -f: a chat on a terminal; in a pipe, the prompt is read from standard input."""
EPILOG = """\
examples:
  tinydrug -p "Tell me about the sea." --drug V:0.05
  tinydrug -m gpt2 -no-cnv -p "The sea" -n 50 --temp 0.8 -s 7
  cat notes.txt | tinydrug -sys "Summarise this." -q > summary.txt
  tinydrug models                                        the known names

The text goes to standard output, all else to standard error. Exit status: 0; 1 a failure at run time; 2 bad
input; 130 Ctrl-C, 143 terminated, 141 nobody reads the output."""

TEXT_FLAGS = {  # their value is the next word whatever it is, so that it may begin with a dash
    "-p": "--prompt",
    "-r": "--stop",
    "-sys": "--system-prompt",
    **{
        flag: flag
        for flag in (
            "--prompt",
            "--stop",
            "--reverse-prompt",
            "--system-prompt",
            "--chat-template",
            "--drift",
        )
    },
}
ELSEWHERE = {  # what people try, and what it is called here
    "-hf": "-m ORG/NAME --pull",
    "--hf-repo": "-m ORG/NAME --pull",
    "-i": "no -p on a terminal",
    "--interactive": "no -p on a terminal",
    "-ub": "--batch-size",
    "--ubatch-size": "--batch-size",
    "-ctk": "--cache-type",
    "-ctv": "--cache-type",
    "-sysf": '-sys "$(cat FILE)"',
    "--chat-template-file": "--chat-template FILE",
    "--no-display-prompt": "nothing: the prompt is not shown unless --echo asks for it",
    "--samplers": "nothing: the order is fixed, penalties, bias, top-k, top-p, min-p, temperature",
}


class Parser(argparse.ArgumentParser):
    """One that raises ConfigError in place of printing its usage and leaving."""

    def error(self, message: str):
        raise ConfigError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Every name of a flag, then its value once."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action):
        names = ", ".join(action.option_strings)
        return names if action.nargs == 0 else f"{names} {action.metavar}"


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags of a generation. Raises ConfigError, or SystemExit after --help and --version."""
    parser = _parser()
    argv = _joined(argv)
    _check_names(argv, parser._option_string_actions)
    args, rest = parser.parse_known_args(argv)
    if rest:
        raise ConfigError(f"unexpected {rest[0]!r}: a prompt goes after -p, in quotes")
    _check_together(args)
    return args


def _joined(argv: list[str]) -> list[str]:
    """["-p", "-text"] -> ["--prompt=-text"]: argparse would take the text for a flag."""
    joined, words = [], iter(argv)
    for word in words:
        value = next(words, None) if word in TEXT_FLAGS else None
        joined.append(word if value is None else f"{TEXT_FLAGS[word]}={value}")
    return joined


def _check_names(argv: list[str], known: dict) -> None:
    """Refuse flags that do not exist, naming the nearest that do."""
    for word in argv:
        name = word.partition("=")[0]
        if name in known:
            continue
        if name in ELSEWHERE:
            raise ConfigError(f"there is no {name}: use {ELSEWHERE[name]}")
        longer = f"-{name}" if name.startswith("-") and f"-{name}" in known else None  # -temp
        if name.startswith("--") or longer:
            near = [longer] if longer else difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {near[0]}?" if near else "see --help"
            raise ConfigError(f"there is no {name}: {advice}")


def _check_together(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other."""
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    for one, other in (("prompt", "file"), ("drug", "drug_file"), ("offline", "pull"), ("quiet", "verbose")):
        if {one, other} <= given:
            raise ConfigError(f"give {_flag(one)} or {_flag(other)}, not both", one)
    for name, needed in (("logprobs", "json"), ("keep", "context_shift")):
        if name in given and needed not in given:
            raise ConfigError(f"{_flag(name)} needs {_flag(needed)}", name)
    if args.record is not None:
        written = [os.path.realpath(path) for path in (args.record, args.output_file) if path is not None]
        if args.record == "-" or len(written) > len(set(written)):
            raise ConfigError("--record: give it a file of its own", "record")
    for name in ("system_prompt", "chat_template"):
        if name in given and args.conversation is False:
            raise ConfigError(f"{_flag(name)} is for a chat: drop it or --no-conversation", name)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def whole(least: int):
    """A converter to an int of at least `least`."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,20}", text, re.ASCII) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return convert


def real(text: str) -> float:
    """A number; whether it makes sense is for whoever uses it to say."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def bias(text: str) -> tuple[int, float]:
    """`15043+1`, `15043-inf` -> token id and what is added to its logit."""
    match = re.fullmatch(r"(\d{1,10})([+-].+)", text, re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID+BIAS or ID-BIAS, as in 15043-1")
    return int(match[1]), real(match[2])


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        from tinydrug.cli.version import describe

        print(describe())
        parser.exit()


def _parser() -> Parser:
    parser = Parser(
        "tinydrug",
        usage="%(prog)s [flags]\n       %(prog)s COMMAND ...",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
        allow_abbrev=False,
        add_help=False,
    )

    def group(title):
        add = parser.add_argument_group(title).add_argument

        def flag(*names, help, **more):
            if "action" not in more:
                more.setdefault("metavar", "N")
            add(*names, help=help, **more)

        return flag

    on = {"action": "store_true"}

    # fmt: off
    add = group("model")
    add("-m", "--model", metavar="NAME", help="a file, a folder, a name that `tinydrug models` lists, or "
        "ORG/NAME on the Hugging Face hub (default: the one marked in that list)")
    add("--quant", choices=("none", "f32", "q8", "q4"), default="none", metavar="KIND",
        help="quantise on loading: q8, q4, f32, or none: as the file has it (default: none)")
    add("--keep-packed", **on, help="keep the weights as they are packed in weights/MODEL-KIND, so that the "
        "next start maps them (see `tinydrug quantize`)")
    add("-c", "--ctx-size", type=whole(0), default=0, help="context in tokens (default: 0, the model's own)")
    add("--cache-type", choices=("f16", "f32"), default="f16", metavar="KIND",
        help="numbers of the key-value cache: f16 or f32 (default: f16)")
    add("--attention", choices=("softmax", "srf"), default="softmax", metavar="KIND",
        help="softmax, or srf: estimated by random features, for models tuned to it (default: softmax)")
    add("--features", type=whole(1), help="of srf: how many (default: as many as a head is wide)")
    add("--feature-seed", type=whole(0), default=0, help="of srf: what they are drawn from (default: 0)")
    add("--state-type", choices=("f32", "f16"), default="f32", metavar="KIND",
        help="of srf: numbers of the state it has in place of a cache: f32 or f16 (default: f32)")
    add("-b", "--batch-size", type=whole(1), default=512, help="prompt tokens read at once (default: 512)")
    add("-t", "--threads", type=whole(-1), default=-1, help="threads (default: -1, all this process may use)")
    add("--no-mmap", **on, help="copy the file into memory instead of mapping it")
    add("--check-tensors", **on, help="look for NaN and infinity in the weights first")
    add("--pull", **on, help="download a model that is not here without asking")
    add("--offline", **on, help="never use the network")

    add = group("prompt")
    add("-p", "--prompt", metavar="TEXT", help='the prompt; "-" reads standard input')
    add("-f", "--file", metavar="FILE", help="read the prompt from a file, without its last newline")
    add("-sys", "--system-prompt", metavar="TEXT", help="what the model is told before a chat")
    add("-cnv", "--conversation", **on, default=None,
        help="chat, through the model's template; after -p on a terminal, go on chatting (default: chat if "
        "there is a template)")
    add("-no-cnv", "--no-conversation", dest="conversation", action="store_false", default=None,
        help="continue the text as it is")
    add("-st", "--single-turn", **on, help="leave the chat after one answer")
    add("--chat-template", metavar="WHICH",
        help="a known name (chatml, llama2, llama3, mistral, zephyr), a file, or Jinja itself (default: the "
        "model's own)")
    add("--echo", "--display-prompt", **on, help="write what the model reads before what it writes")

    add = group("generation")
    add("-n", "--predict", "--n-predict", "--max-tokens", type=whole(-1),
        help="tokens at most; -1: until the context is full (default: 128, in a chat 512)")
    add("-r", "--stop", "--reverse-prompt", action="append", default=[], metavar="TEXT",
        help="end before this text; may be given several times")
    add("--ignore-eos", **on, help="go on after the model's end")
    add("--context-shift", **on, help="when the context is full, forget the older half of it and go on")
    add("--keep", type=whole(-1), help="tokens at the start that a shift keeps; -1: the prompt (default: 0)")

    add = group("sampling (greedy unless --temp; in this order)")
    add("-s", "--seed", type=whole(-1), default=-1, help="of sampling, and of noise without --drug-seed "
        "(default: -1, a new one, told at the end)")
    add(
        "--repeat-penalty",
        type=real,
        default=1.0,
        metavar="X",
        help="divide repeated logits (default: 1, off)",
    )
    add("--presence-penalty", type=real, default=0.0, metavar="X",
        help="subtract from logits of tokens that occurred (default: 0, off)")
    add("--frequency-penalty", type=real, default=0.0, metavar="X",
        help="the same for each time they did (default: 0, off)")
    add("--repeat-last-n", type=whole(-1), default=64,
        help="tokens the penalties look back at; 0: none, -1: all (default: 64)")
    add("-l", "--logit-bias", action="append", type=bias, default=[], metavar="ID±BIAS",
        help="add to the logit of a token: 15043+1, 15043-inf; may be given several times")
    add("--top-k", type=whole(0), default=0, help="only the k most likely tokens (default: 0, off)")
    add("--top-p", type=real, default=1.0, metavar="P",
        help="only the likeliest tokens that together have this probability (default: 1, off)")
    add("--min-p", type=real, default=0.0, metavar="P",
        help="only tokens of at least this share of the likeliest one's probability (default: 0, off)")
    add("--temp", "--temperature", type=real, default=0.0, metavar="X",
        help="temperature (default: 0, greedy: always the likeliest)")

    add = group("noise")
    add("--drug", action="append", metavar="SPEC",
        help="[L2|NL]SITE[n]:THETA[@WHERE][~LAW], SITE one of H Q pK K V A M, THETA in radians or 3deg, "
        "WHERE layers 8-15 or depth 0.3..0.5; several by commas or flags")
    add("--drift", metavar="SHARE", help="add this share of attention's output to it: 0.2, -0.5@8-15")
    add("--diffusion", metavar="STD", help="add normal noise of this size to attention's output: 0.1, "
        "0.1@0.3..0.5; learned: of the sizes a dd-gpt2 brings; off (default: off)")
    add("--drug-file", metavar="FILE", help="the same from .toml (profiles, too) or .csv")
    add("--drug-seed", type=whole(-1), default=-1, help="of the noise (default: -1, that of --seed)")
    add("--drug-scale", type=real, metavar="X", help="multiply every theta (default: 1; 0: sober)")
    add("--drug-sink", type=whole(0), help="first positions that are never touched (default: 6; 0: none)")
    add("--drug-prompt", choices=("none", "last", "all"), metavar="WHICH",
        help="prompt tokens read under noise: none, last or all (default: none)")
    add("--drug-protect-special", **on, help="never touch special tokens, such as a chat's markers")
    add("--rewind-every", type=whole(0), default=420,
        help="drugged tokens after which the cache is written anew without noise (default: 420; 0: never)")
    add("--verify-noise", **on, help="print how far noise turned vectors, beside what it should")
    add(
        "--show-schedule", **on, help="print the noise of every layer and site, and how many vectors it moved"
    )

    add = group("output")
    add("-o", "--output-file", metavar="FILE",
        help="write the text there instead, whole at the end; Ctrl-C keeps what there is")
    add("--record", metavar="FILE", help="write what `tinydrug replay FILE` needs to generate the same again")
    add("--json", **on, help="write a line of JSON for each token and one for the whole completion")
    add("--logprobs", type=whole(0), help="with --json: each token's log-probability and N alternatives")
    add("--color", choices=("auto", "always", "never"), default="auto", metavar="WHEN",
        help="auto (on a terminal, unless NO_COLOR is set), always or never (default: auto)")
    add("-q", "--quiet", **on, help="nothing on standard error but errors")
    add("-v", "--verbose", **on, help="more there, and tracebacks of errors")
    add("-h", "--help", action="help", help="print this and leave")
    add(
        "--version", action=_Version, nargs=0, help="print versions, the processor and where kernels are kept"
    )
    # fmt: on
    return parser
