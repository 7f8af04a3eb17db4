"""What one prompt and a chat have in common: loading, answering until Ctrl-C, and saying how it went."""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from tinydrug.api import MAX_SEED, Completion, Engine, Prompt, Step
from tinydrug.cli.console import Console
from tinydrug.cli.inputs import Inputs, read_schedule
from tinydrug.loading import load
from tinydrug.noise import COUNTED, Schedule
from tinydrug.noise.drift import TERMS

CONTINUES = 128  # tokens at most, of a text that is continued
ANSWERS = 512  # of an answer, which mostly ends by itself
IDLE_ROWS = 16  # tokens read at once while waiting for a line: how long the line may have to wait


def load_engine(args: argparse.Namespace, console: Console) -> Engine:
    """The model of the flags, with bars on a terminal and a line when kernels are compiled."""
    told = False

    def progress(phase: str, share: float) -> None:
        nonlocal told
        if phase == "load":
            console.bar("loading the model", share)
        else:
            console.bar("compiling kernels (once per machine)", share)
            if not (console.bars or told):
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
        attention=args.attention,
        features=args.features,
        feature_seed=args.feature_seed,
        state=args.state_type,
        chunk=args.batch_size,
        rewind_every=args.rewind_every,
        keep_packed=args.keep_packed,
        mmap=not args.no_mmap,
        check_tensors=args.check_tensors,
        pull=True if args.pull else None,
        offline=args.offline,
        ask=ask if sys.stdin.isatty() and sys.stderr.isatty() else None,
        bars=console.bars,
        progress=progress,
    )
    console.clear()
    console.say(f"model {engine.source}")
    if console.verbose:
        console.say(
            f"{engine.threads} threads, context {engine.n_ctx}, weights {args.quant}, cache {args.cache_type}"
        )
    return engine


class Talk:
    """One kept sequence and all that the flags say about its answers; `chat` tells if a template is used."""

    def __init__(self, args: argparse.Namespace, wanted: Inputs, engine: Engine, console: Console):
        self.engine, self._console = engine, console
        self._args, self._wanted = args, wanted
        own = wanted.template or engine.tokenizer.chat_template
        self.chat = bool(own) if args.conversation is None else args.conversation
        self._n = args.predict if args.predict is not None else ANSWERS if self.chat else CONTINUES
        self.seed = wanted.sampling.seed
        self._answers = 0
        started = time.perf_counter()
        self.session = engine.session(wanted.schedule, self.seed)
        noise_s = time.perf_counter() - started  # the schedule's own kernels
        self.timings = engine.timings | {"compile_s": engine.timings["compile_s"] + noise_s}

    @property
    def shifts(self) -> bool:
        """Whether a full context may lose its older half."""
        return self._args.context_shift

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
        system = self._wanted.system
        return [] if system is None else [{"role": "system", "content": system}]

    def shown(self, prompt: Prompt) -> str:
        """The prompt as the model reads it."""
        return self.engine.render(prompt, self._wanted.template) if self.chat else prompt

    def dose(self, doses: str) -> None:
        """Use these doses from the next answer on, with the flags for all doses. DrugError."""
        self.session.dose(self.engine.resolve(read_schedule(self._args, doses)))

    def answer(self, prompt: Prompt, each: Callable[[Step], None]) -> Completion:
        """Answer, handing on every step; Ctrl-C ends it early, with finish_reason "cancelled".

        Each further answer has the next seeds, unless the schedule brings its own.
        """
        args, seed = self._args, (self.seed + self._answers) % MAX_SEED
        self._answers += 1
        self.session.dose(self.session.schedule, seed)
        ids = self.engine.encode(prompt, self._wanted.template)
        special = self.engine.tokenizer.special_ids if args.drug_protect_special else ()
        keep = len(ids) if args.keep == -1 else args.keep or 0
        with interruptible() as check:

            def progress(done: int, total: int) -> None:
                check()
                if done < total:
                    self._console.bar("reading the prompt", done / total)

            stream = self.engine.stream(
                ids,
                session=self.session,
                n=None if self._n < 0 else self._n,
                sampling=replace(self._wanted.sampling, seed=seed),
                stop=args.stop,
                ignore_eos=args.ignore_eos,
                logprobs=args.logprobs,
                protect_ids=sorted(special),
                verify=args.verify_noise,
                shift_keep=keep if self.shifts else None,
                progress=progress,
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

    def summary(self, completion: Completion) -> str:
        """The line at the end of a run."""
        load, compiled = (f"{what} {self.timings[f'{what}_s']:.2f} s" for what in ("load", "compile"))
        seeds = f"seed {completion.seed}"
        if not completion.schedule.is_sober:
            seeds += f", drug seed {completion.drug_seed}"
        return f"{load}; {compiled}; {speeds(completion)}; {seeds}"

    def moved(self) -> str:
        """How many vectors the noise has really moved so far, by site, the dosed ones even if none."""
        schedule, counts = self.session.schedule, zip(COUNTED, self.session.moved, strict=True)
        dosed = {dose.site for dose in schedule.doses if dose.peak * schedule.scale}
        dosed |= {term.name for term in schedule.terms if term.peak * schedule.scale}
        parts = [f"{site} {count:,}" for site, count in counts if count or site in dosed]
        return f"vectors moved: {', '.join(parts) or 'none, sober'}"

    def verified(self, completion: Completion) -> str:
        """How far the noise turned vectors, site by site, beside theory."""
        lines = [f"{'site':<6}{'vectors':>12}{'mean angle':>12}{'expected':>12}{'norm drift':>12}"]
        for site, (vectors, angle, expected, drift) in completion.verified.items():
            theory = "-" if expected is None else f"{expected:.4f}"
            lines.append(f"{site:<6}{vectors:>12,}{angle:>12.4f}{theory:>12}{drift:>12.1e}")
        terms = [name for name in TERMS if completion.moved.get(name)]
        unmeasured = [f"{' and '.join(terms)}: not measured, only noise of an angle is"] if terms else []
        if not completion.verified:
            lines = [] if terms else ["no vector was moved"]
        return "\n".join(lines + unmeasured)

    @contextmanager
    def sobering(self) -> Iterator[None]:
        """Meanwhile, write the cache anew without noise, a few rows at a time; stop when this ends."""
        done = threading.Event()
        worker = threading.Thread(target=self.session.sober_up, args=(done.is_set, IDLE_ROWS), daemon=True)
        if self.session.rewind_every and self.session.dirty:
            worker.start()
        try:
            yield
        finally:
            done.set()
            if worker.ident is not None:
                worker.join()


def speeds(completion: Completion) -> str:
    """How much was read and written, how fast, and why it ended."""
    times = completion.timings

    def part(what: str) -> str:
        tokens, seconds = times[f"{what}_tokens"], times[f"{what}_s"]
        return f"{what} {tokens} tokens, {tokens / seconds if seconds else 0:.1f} t/s"

    return f"{part('prefill')}; {part('decode')}; {completion.finish_reason}"


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Ctrl-C is noted, and raised by the function this gives: between two steps of the model, never inside
    one, where it would leave the threads and the cache in disorder."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, in the background
        yield lambda: None
        return
    noted = []

    def check():
        if noted:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, lambda *_: noted.append(True))
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
