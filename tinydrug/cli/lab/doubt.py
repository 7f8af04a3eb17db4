"""How sure the model is of its answer, told by noise: K drugged passes of one prompt in one batch.

Prints the sober answer, each token coloured by how much the passes disagree about it, and what they answered.
With --evaluate: how well such doubt tells wrong answers from right ones, beside temperature sampling."""

import argparse

from tinydrug.cli.console import Console
from tinydrug.cli.lab.model import (
    bar,
    drug,
    drug_arguments,
    model,
    model_arguments,
    paint,
    paints,
    prompt,
    prompt_arguments,
    seed,
    status,
)
from tinydrug.cli.options import whole
from tinydrug.errors import ConfigError
from tinydrug.lab.doubt import KINDS, Doubt, doubt
from tinydrug.lab.doubt_page import doubt_page
from tinydrug.lab.results import write_csv, write_json, write_text

SHADES = (231, 230, 229, 222, 215, 208, 202, 196)  # of the terminal's 256 colours: from sure to not at all
TOKENS, BRIEF = 64, 24  # at most: of an answer, of the answer to a question with a known one
ONE_PROMPT = ("prompt", "file", "drug_file", "drug_sink", "drug_prompt", "by", "no_chat", "html")
LEAST = 0.1  # nats that the last shade stands for, if no token has more


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    prompt_arguments(parser)
    drug_arguments(parser)
    add("-k", "--passes", type=whole(0), default=10, metavar="K", help="drugged passes (default: 10)")
    add("-n", "--predict", type=whole(0), metavar="N",
        help=f"tokens at most (default: {TOKENS}; with --evaluate {BRIEF})")  # fmt: skip
    add("--seed", type=seed, default=1, metavar="N", help="of the first pass (default: 1)")
    add("--by", choices=KINDS, metavar="KIND",
        help=f"what the colours show: {', '.join(KINDS)} (default: {KINDS[0]})")  # fmt: skip
    add("--no-chat", action="store_true", help="continue the text as it is, not as a question in a chat")
    add("--html", metavar="FILE", help="write a page there, too")
    add("--csv", metavar="FILE", help="write the table of tokens there, too")
    add("--json", metavar="FILE", help="write all with the record of the run there, too")
    add("--evaluate", action="store_true", help="on questions with known answers, in place of a prompt")
    add("--questions", metavar="FILE", help="with --evaluate: these (TOML; default: 267 of the package)")
    model_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    _check_together(args)
    if args.evaluate:
        return _evaluate(args, console)
    text, schedule = prompt(args), drug(args)
    with model(args, console) as engine:
        chat = engine.tokenizer.chat_template and not args.no_chat
        asked = [{"role": "user", "content": text}] if chat else text
        n = TOKENS if args.predict is None else args.predict
        found = doubt(engine, asked, schedule, args.passes, n, args.seed)
    print(heat_map(found, args.by or KINDS[0]) if paints() else table(found))
    print(answers(found))
    if args.html:
        write_text(args.html, doubt_page(found, text))
    if args.csv:
        write_csv(args.csv, found.rows())
    if args.json:
        about = {"answer": found.text, "entropy": found.entropy, "answers": found.answers}
        write_json(args.json, {"record": found.record, **about, "tokens": found.rows()})
    return 0


def _check_together(args: argparse.Namespace) -> None:
    """Refuse flags that would do nothing."""
    if args.questions is not None and not args.evaluate:
        raise ConfigError("--questions needs --evaluate", "questions")
    given = [name for name in ONE_PROMPT if vars(args)[name] is not None and vars(args)[name] is not False]
    if args.evaluate and given:
        flag = f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"{flag} is for one prompt: drop it or --evaluate", given[0])


def heat_map(found: Doubt, by: str) -> str:
    """The answer in colours, and what they mean."""
    parts, full = [], max(LEAST, float(getattr(found, by).max()))
    for token, nats in zip(found.tokens, getattr(found, by), strict=True):
        shade = SHADES[min(int(nats / full * len(SHADES)), len(SHADES) - 1)]
        text = token.replace("␣", " ").replace("↵", "↵\n")
        parts.append(paint(f"30;48;5;{shade}", text))
    steps = [f"{full * i / len(SHADES):.2f}" for i in range(len(SHADES))]
    scale = "".join(paint(f"30;48;5;{shade}", f" {step} ") for shade, step in zip(SHADES, steps, strict=True))
    return "".join(parts) + f"\n{by} uncertainty in nats, from: {scale}"


def table(found: Doubt) -> str:
    """The tokens line by line."""
    width = max(8, *(len(token) for token in found.tokens))
    lines = [f"{'token':<{width}}{'p':>8}{'total':>9}{'aleatoric':>11}{'epistemic':>11}"]
    for row in found.rows():
        numbers = (
            f"{row['likelihood']:>8.3f}{row['total']:>9.3f}{row['aleatoric']:>11.3f}{row['epistemic']:>11.3f}"
        )
        lines.append(f"{row['token']:<{width}}{numbers}")
    return "\n".join(lines)


def answers(found: Doubt) -> str:
    """What the passes answered, and the entropy of that."""
    lines = [f"answers of {found.record['settings']['k']} passes, entropy {found.entropy:.3f} nats:"]
    return "\n".join([*lines, *(f"{count:>5}  {' '.join(text.split())}" for text, count in found.answers)])


def _evaluate(args: argparse.Namespace, console: Console) -> int:
    from tinydrug.lab.evaluate import DRUGS, evaluate, load_questions, report

    questions = load_questions(args.questions)
    with model(args, console) as engine, bar(console, "answering") as progress:
        n = BRIEF if args.predict is None else args.predict
        found = evaluate(engine, questions, args.drug or DRUGS, args.passes, n, progress, args.seed)
    print(report(found))
    if args.csv:
        write_csv(args.csv, found.rows())
    if args.json:
        write_json(args.json, {"record": found.record, "scores": found.rows(), "questions": found.answers})
    return status(found.record["complete"], console)
