"""What one-shot and interactive use share: loading with bars, answering until Ctrl-C, and saying how it went."""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from tinydrug.api import MAX_SEED, Completion, Engine, Prompt, Step
from tinydrug.cli import inputs
from tinydrug.cli.console import Console
from tinydrug.load import load
from tinydrug.noise import SITES, Schedule

SLOW = 1.0  # seconds after which compiling is worth a line
CONTINUES, ANSWERS = 128, 512  # tokens at most: of a text continued, of an answer, which mostly ends by itself


def load_engine(args: argparse.Namespace, console: Console) -> Engine:
    """The model of the flags, with bars on a terminal and a line when kernels are compiled for long."""
    bars, loaded, told = console.bars, None, False

    def progress(phase: str, share: float) -> None:
        nonlocal loaded, told
        if phase == "load":
            console.bar("loading the model", share)
            loaded = time.monotonic()
        elif time.monotonic() - (loaded or 0) > SLOW:
            console.bar("compiling kernels (once per machine)", share)
            if not (bars or told):
                console.say("compiling kernels (once per machine) ...")
                told = True

    def ask(question: str) -> bool:
        console.clear()
        print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    engine = load(
        args.model,
        quant=args.quant,
        threads=None if args.threads < 0 else args.threads,
        ctx=args.ctx_size,
        cache=args.cache_type,
        chunk=args.batch_size,
        mmap=not args.no_mmap,
        check_tensors=args.check_tensors,
        pull=True if args.pull else None,
        offline=args.offline,
        ask=ask if sys.stdin.isatty() and sys.stderr.isatty() else None,
        bars=bars,
        progress=progress,
    )
    console.clear()
    console.say(f"model {engine.source}")
    if console.verbose:
        console.say(f"{engine.threads} threads, context {engine.n_ctx}, weights {args.quant}, cache {args.cache_type}")
    return engine


class Talk:
    """One kept sequence and all that the flags say about its answers; `chat` tells if a template is used."""

    def __init__(self, args: argparse.Namespace, engine: Engine, console: Console, schedule: Schedule):
        self.engine, self._console = engine, console
        self.template = inputs.read_template(args)
        self.chat = args.conversation
        if self.chat is None:
            self.chat = bool(self.template or engine.tokenizer.chat_template)
        self.system = args.system_prompt if self.chat else None
        self._sampling = inputs.read_sampling(args)
        self.seed = self._sampling.seed
        limit = args.predict if args.predict is not None else ANSWERS if self.chat else CONTINUES
        self._keep = (args.keep or 0) if args.context_shift else None
        self._options = {
            "n": None if limit < 0 else limit,
            "stop": args.stop,
            "ignore_eos": args.ignore_eos,
            "logprobs": args.logprobs,
        }
        self._answers = 0
        started = time.perf_counter()
        self.session = engine.session(schedule, self.seed)
        engine.timings["compile_s"] += time.perf_counter() - started  # of the schedule's own kernels

    @property
    def schedule(self) -> Schedule:
        """The noise that is used, its seed included."""
        return self.session.schedule.with_seed(self.session.noise_seed % MAX_SEED)

    def describe(self) -> str:
        """The noise of every layer and site."""
        return self.schedule.describe(self.engine.config.n_layers)

    def prompt_of(self, text: str) -> Prompt:
        """What the model reads when someone says `text` first."""
        if not self.chat:
            return text
        return self.opening() + [{"role": "user", "content": text}]

    def opening(self) -> list[dict]:
        """A conversation in which nobody has spoken."""
        return [{"role": "system", "content": self.system}] if self.system is not None else []

    def shown(self, prompt: Prompt) -> str:
        """The prompt as the model reads it."""
        return self.engine.render(prompt, self.template) if self.chat else prompt

    def answer(self, prompt: Prompt, each: Callable[[Step], None]) -> Completion:
        """Answer, handing on every step; Ctrl-C ends it early, with finish_reason "cancelled".

        Each further answer has the next seeds, unless the schedule brings its own.
        """
        seed = (self.seed + self._answers) % MAX_SEED
        self._answers += 1
        self.session.dose(self.session.schedule, seed)
        ids = self.engine.encode(prompt, self.template)
        keep = len(ids) if self._keep == -1 else self._keep
        with interruptible() as check:

            def progress(done: int, total: int) -> None:
                check()
                if done < total:
                    self._console.bar("reading the prompt", done / total)

            stream = self.engine.stream(
                ids,
                session=self.session,
                sampling=replace(self._sampling, seed=seed),
                shift_keep=keep,
                progress=progress,
                **self._options,
            )
            with stream:
                try:
                    for step in stream:
                        self._console.clear()
                        each(step)
                        check()
                except KeyboardInterrupt:
                    pass
        return stream.completion


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Ctrl-C is noted, and raised by the function this gives: between two steps of the model, never inside
    one. A second one is raised at once."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, in the background
        yield lambda: None
        return
    noted = False

    def note(*_):
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    def check():
        if noted:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def speeds(completion: Completion) -> str:
    """How much was read and written, and how fast."""
    times = completion.timings

    def part(what: str) -> str:
        tokens, seconds = times[f"{what}_tokens"], times[f"{what}_s"]
        return f"{what} {tokens} tokens, {tokens / seconds if seconds else 0:.1f} t/s"

    return f"{part('prefill')}; {part('decode')}; {completion.finish_reason}"


def summary(engine: Engine, completion: Completion) -> str:
    """The line at the end of a run."""
    times = engine.timings
    seeds = f"seed {completion.seed}"
    if not completion.schedule.is_sober:
        seeds += f", drug seed {completion.drug_seed}"
    return f"load {times['load_s']:.2f} s; compile {times['compile_s']:.2f} s; {speeds(completion)}; {seeds}"


def moved(schedule: Schedule, counts: dict[str, int]) -> str:
    """How many vectors the noise really moved, by site."""
    dosed = [dose.site for dose in schedule.doses if dose.peak and schedule.scale]
    parts = [f"{site} {counts.get(site, 0)}" for site in SITES if site in dosed]
    return f"vectors moved: {', '.join(parts) or 'none, sober'}"
