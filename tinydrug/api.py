"""Text in, text out: generate, stream, chat, forward and score with a loaded model."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from tinydrug.engine.generate import Request, generate
from tinydrug.engine.history import Noise, Write
from tinydrug.engine.prefix import Prefix, common
from tinydrug.engine.record import Record, obstacle, versions
from tinydrug.engine.runtime import Runtime
from tinydrug.engine.sampling import Sampler, Sampling, log_softmax
from tinydrug.engine.session import Session
from tinydrug.errors import ConfigError, NumericalError, PromptError
from tinydrug.formats.config import Config
from tinydrug.noise import COUNTED, SOBER, Schedule
from tinydrug.noise.theory import expected_angles
from tinydrug.text.chat import named_template, render
from tinydrug.text.detokenizer import Detokenizer, StopStrings
from tinydrug.text.tokenizer import Tokenizer

log = logging.getLogger("tinydrug")

Prompt = str | Sequence[int] | Sequence[dict]  # text, token ids, or chat messages
Drug = Schedule | str | Sequence[str] | None
MAX_SEED = 2**64
FORWARD_ROWS = 128  # logits of this many positions are in memory at once


@dataclass(frozen=True)
class Options:
    """How to continue a prompt: the keyword arguments of stream, generate and chat. Raises ConfigError."""

    n: int | None = 128  # tokens at most; None: until the context is full
    sampling: Sampling | None = None  # None: greedy
    stop: Sequence[str] = ()  # strings that end the text, and are not part of it
    drug_seed: int | None = None  # of the noise; None: a fresh one, told in the completion
    ignore_eos: bool = False
    logprobs: int | None = None  # report each token's log-probability, and so many alternatives
    template: str | None = (
        None  # chat template for messages: a known name or Jinja text; None: the model's own
    )
    shift_keep: int | None = None  # context full: keep so many first tokens, drop the older half of the rest
    protect: Sequence[int] = ()  # positions that noise never touches, beside the sink
    protect_ids: Sequence[int] = ()  # tokens that it never touches wherever they stand (template markers)
    verify: bool = False  # measure what noise does to vectors: Completion.verified
    progress: Callable[[int, int], None] | None = None  # called with prompt tokens read, and all of them

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, flag, least in (
            ("n", "--n-predict", 0),
            ("shift_keep", "--keep", 0),
            ("logprobs", "--logprobs", 0),
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{flag}: {value!r} is not a whole number of at least {least}", name)


@dataclass(frozen=True)
class Step:
    """One streamed token: `text` is what it made final (often a word, sometimes nothing, never half a
    character)."""

    text: str
    id: int
    index: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None  # stop, length, context; set on the last step


class Verified(NamedTuple):
    """What noise did to the vectors of one site: angles to where they were, and how their norms drifted."""

    vectors: int
    angle: float  # mean, radians
    expected: float | None  # by theory; None where it depends on the vectors or on time
    drift: float  # mean relative change of the norm (geometric)


@dataclass(frozen=True)
class Completion:
    """A finished generation. `moved`: vectors that noise moved, by site; `verified`: what it did to them, if
    Options.verify asked; `timings`: seconds and tokens."""

    text: str
    ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[tuple[int, float, tuple[tuple[int, float], ...]], ...]  # (id, logprob, top), if asked for
    schedule: Schedule
    drug_seed: int
    seed: int
    moved: dict[str, int]
    verified: dict[str, Verified]
    timings: dict[str, float]
    _record: Callable[["Completion"], Record] = field(default=None, repr=False, compare=False)

    @cached_property
    def record(self) -> Record:
        """What `Engine.replay` needs to run it again. The first record of an engine hashes its weights."""
        return self._record(self)

    def __getstate__(self) -> dict:
        """A copy or a pickle takes the record along, not the engine that could make it."""
        return {"record": self.record} | {name: was for name, was in vars(self).items() if name != "_record"}


@dataclass(frozen=True, eq=False)
class Score:
    """What the model thought of a text: log-probabilities (T-1,) float64 of each token given those before
    it."""

    ids: tuple[int, ...]
    logprobs: np.ndarray

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood in nats."""
        return float(-self.logprobs.mean())

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll))


class Stream:
    """An iterator of Steps. Closing it stops the work; `completion` is what came out, once it has ended."""

    def __init__(self):
        self._run: Iterator[tuple[int, Step]] = iter(())
        self.completion: Completion | None = None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Step:
        return next(self._run)[1]

    def close(self) -> None:
        self._run.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class Engine:
    """A loaded model. Immutable: sequences live in sessions, so any thread may use one engine; steps run one
    at a time."""

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        name: str,
        source: str,
        timings: dict[str, float],
        prefix_reuse: bool = True,
    ):
        self._prefix = Prefix(prefix_reuse)
        self.runtime, self.tokenizer, self.name, self.source, self.timings = (
            runtime,
            tokenizer,
            name,
            source,
            timings,
        )

    @property
    def config(self) -> Config:
        return self.runtime.config

    @property
    def n_ctx(self) -> int:
        """Tokens a context holds."""
        return self.runtime.n_ctx

    @property
    def threads(self) -> int:
        return self.runtime.threads

    def close(self) -> None:
        """Let the threads go, and what was kept of the last sequence."""
        self._prefix.clear()
        self.runtime.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # --- prompts --------------------------------------------------------------------------------------------
    def render(self, messages: Sequence[dict], template: str | None = None) -> str:
        """The text the model reads for a conversation. template: a known name (chatml, ...) or Jinja text;
        None: the model's own. PromptError if there is none."""
        if template is not None and "{" not in template:
            template = named_template(template)
        template = template or self.tokenizer.chat_template
        if template is None:
            raise PromptError(
                f"{self.name} has no chat template: give --chat-template, or prompt it as a base model"
            )
        return render(template, list(messages), tokens=self.tokenizer.special_tokens)

    def encode(self, prompt: Prompt, template: str | None = None) -> list[int]:
        """Token ids of a text (with the model's BOS rule), of chat messages, or ids as they are. PromptError
        if empty."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            if not ids and self.tokenizer.bos_id is not None:  # GPT-2 writes no BOS, and starts from one
                ids = [self.tokenizer.bos_id]
        elif len(prompt) and isinstance(prompt[0], dict):
            ids = self.tokenizer.encode(self.render(prompt, template), bos=False)
        else:
            ids = [int(token) for token in prompt]
        if not ids:
            raise PromptError(
                "the prompt is empty and this model has no BOS token to start from: give it a word"
            )
        return ids

    def session(self, drug: Drug = None, drug_seed: int | None = None) -> Session:
        """A sequence to keep: pass it to `stream`, and only what is new in a prompt is read."""
        return Session(self.runtime, *_schedule(drug, drug_seed, 0))

    def load_session(self, path: str | os.PathLike) -> Session:
        """What `session.save` wrote: it continues bit for bit as the original would, under its own schedule.

        BadModelFile if the file is damaged, ConfigError naming what differs if it is another model's.
        """
        return Session.load(self.runtime, path)

    # --- generation -----------------------------------------------------------------------------------------
    def stream(
        self, prompt: Prompt, *, drug: Drug = None, session: Session | None = None, **options
    ) -> Stream:
        """Continue one prompt, token by token; `options` are the fields of Options.

        session: continue a kept one, under its own schedule; whatever prefix it shares with the prompt is not
        read again. Closing the stream stops the work.
        """
        if session is not None and drug is not None:
            raise ConfigError("a session has its own schedule: change it with session.dose", "drug")
        stream = Stream()

        def finished(completions):
            stream.completion = completions[0]

        stream._run = self._run([prompt], [drug], [session], Options(**options), finished)
        return stream

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        drug: Drug | Sequence[Drug] = None,
        **options,
    ) -> Completion | list[Completion]:
        """Continue one prompt, or several in one forward pass a token (then a list comes back); `options` are
        the fields of Options.

        With `prompts`, `drug` is one schedule for all or a list of one each; sequence i uses noise seed
        drug_seed + i and sampler seed + i, unless its schedule has a seed of its own.
        """
        if (prompt is None) == (prompts is None):
            raise ConfigError("give either prompt or prompts", "prompt")
        several = [prompt] if prompts is None else list(prompts)
        each = isinstance(drug, (list, tuple)) and prompts is not None
        drugs = list(drug) if each else [drug] * len(several)
        if len(drugs) != len(several):
            raise ConfigError(f"{len(several)} prompts but {len(drugs)} drugs: give one, or one each", "drug")
        done: list[Completion] = []
        for _ in self._run(several, drugs, [None] * len(several), Options(**options), done.extend):
            pass
        return done[0] if prompts is None else done

    def chat(self, messages: Sequence[dict], **options) -> Completion:
        """The answer to a conversation of {"role", "content"} messages; options as for `generate`."""
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise PromptError('messages: expected a list of objects with "role" and "content"')
        return self.generate(list(messages), **options)

    def replay(self, record: Record, each: Callable[[Step], None] = lambda step: None) -> Completion:
        """Run a recorded generation again, handing every step to `each`; `record.difference` compares.

        ConfigError naming what stands in the way: another model or context, code in the sampling.
        """
        record.check(self.runtime.identity)
        for text in record.other_versions():
            log.warning("%s: if the replay differs, this may be why", text)
        session = self.session()
        session.rewind_every = record.rewind_every
        session.retrace(record.prompt_ids[: record.kept], record.history)
        session.put_noise(record.noise)
        stream = self.stream(
            record.prompt_ids,
            session=session,
            n=len(record.ids) if record.finish_reason == "cancelled" else record.n,
            sampling=record.sampling,
            stop=record.stop,
            ignore_eos=record.ignore_eos,
            shift_keep=record.shift_keep,
        )
        for step in stream:
            each(step)
        return stream.completion

    def forward(self, ids: Sequence[int], drug: Drug = None, drug_seed: int | None = None) -> np.ndarray:
        """Logits (T, V) float32 at every position. With a drug, every position beyond the sink is read under
        noise."""
        return np.concatenate(list(self._forward(ids, drug, drug_seed)))

    def score(self, text: Prompt, drug: Drug = None, drug_seed: int | None = None) -> Score:
        """Log-probability of every token of a text given those before it. PromptError for fewer than two
        tokens."""
        ids = self.encode(text)
        if len(ids) < 2:
            raise PromptError("a text to score needs at least two tokens")
        logprobs, at = np.empty(len(ids) - 1), 0
        for rows in self._forward(ids, drug, drug_seed):
            targets = ids[at + 1 : at + 1 + len(rows)]
            logprobs[at : at + len(targets)] = log_softmax(rows[: len(targets)])[
                np.arange(len(targets)), targets
            ]
            at += len(rows)
        return Score(tuple(ids), logprobs)

    # --- inside ---------------------------------------------------------------------------------------------
    def _forward(self, ids, drug, drug_seed):
        """Logits of all positions, a few at a time."""
        session = self.session(drug, drug_seed)
        ids = self.encode([int(token) for token in ids])
        session.check(ids)
        drugged = "none" if session.schedule.is_sober else "all"
        for at in range(0, len(ids), FORWARD_ROWS):
            rows = session.feed(ids[at : at + FORWARD_ROWS], drugged, len(ids[at : at + FORWARD_ROWS]))
            if not np.isfinite(rows).all():
                raise NumericalError(
                    "a logit is NaN or infinite: the weights are damaged or overflow, try --check-tensors"
                )
            yield rows

    def _run(self, prompts, drugs, sessions, options, finished):
        """The one generation path -> (index, Step); `finished` gets the completions, in order, at the end."""
        if options.shift_keep is not None and options.shift_keep >= self.n_ctx:
            raise ConfigError(
                f"--keep: {options.shift_keep} tokens fill the context of {self.n_ctx}: keep fewer",
                "shift_keep",
            )
        sampling = options.sampling or Sampling()
        seed, noise_seed = _seed(sampling.seed, "seed"), _seed(options.drug_seed, "drug_seed")
        stop_ids = frozenset() if options.ignore_eos else self.tokenizer.eos_ids
        requests, outs, starts, own = [], [], [], []
        for i, (prompt, drug, session) in enumerate(zip(prompts, drugs, sessions, strict=True)):
            ids = self.encode(prompt, options.template)
            if session is None:
                session = Session(self.runtime, *_schedule(drug, noise_seed, i))
                self._prefix.share(session, ids)
                own.append(session)
            if options.protect or options.protect_ids:
                session.protect(options.protect, options.protect_ids)
            if options.verify:
                session.verify(True)
            _share_prefix(session, ids)
            starts.append(_Start(session.pos, tuple(session.history), session.noise, session.rewind_every))
            want = options.logprobs
            sampler = Sampler(sampling, (seed + i) % MAX_SEED, want or 0, want is not None)
            requests.append(
                Request(session, ids[session.pos :], sampler, options.n, stop_ids, options.shift_keep)
            )
            outs.append(_Text(ids, Detokenizer(self.tokenizer, continues=True), StopStrings(options.stop)))
        moved = [request.session.moved.copy() for request in requests]
        start = time.perf_counter()
        first, sound = None, False
        try:
            for event in generate(self.runtime, requests, options.progress):
                first = first or time.perf_counter()
                request, out, choice = requests[event.index], outs[event.index], event.choice
                text = out.push(choice, event.finish)
                if out.stopped and event.finish is None:
                    request.stopped = True
                finish = "stop" if out.stopped else event.finish
                step = Step(text, choice.id, len(out.ids) - 1, choice.logprob, choice.top, finish)
                yield event.index, step
            sound = True
        except GeneratorExit:  # closed early, between two steps
            sound = True
            raise
        finally:  # ended, closed early or failed
            done = _completions(requests, outs, moved, start, first or time.perf_counter())
            finished([self._recorded(*each, options) for each in zip(done, requests, starts, strict=True)])
            if sound:
                self._prefix.keep(*own)

    def _recorded(self, completion, request, start, options) -> Completion:
        """The completion with a way to make its record."""
        sampling = replace(options.sampling or Sampling(), seed=completion.seed)
        now = replace(request.session.noise, born=start.noise.born)
        changed = None if now == start.noise else "the noise of its session was changed while it ran"

        def record(completion: Completion) -> Record:
            return Record(
                made_by=versions() | {"threads": self.threads, "chunk": self.runtime.chunk},
                model={"name": self.name, "source": self.source, **self.runtime.identity},
                prompt_ids=completion.prompt_ids,
                kept=start.kept,
                history=start.history,
                noise=replace(start.noise, born=0),
                rewind_every=start.rewind_every,
                sampling=sampling,
                n=options.n,
                stop=tuple(options.stop),
                ignore_eos=options.ignore_eos,
                shift_keep=options.shift_keep,
                ids=completion.ids,
                finish_reason=completion.finish_reason,
                text=completion.text,
                obstacle=obstacle(sampling) or changed,
            )

        return replace(completion, _record=record)


class _Start(NamedTuple):
    """What a record says of a sequence as it was before a generation."""

    kept: int
    history: tuple[Write, ...]
    noise: Noise
    rewind_every: int


def _completions(requests, outs, moved, start: float, first: float) -> list[Completion]:
    """What came out so far. `moved`: the sessions' counters before; start, first: when it began, and gave its
    first token."""
    timings = {
        "prefill_s": first - start,
        "prefill_tokens": sum(len(request.ids) for request in requests),
        "decode_s": time.perf_counter() - first,
        "decode_tokens": sum(max(0, len(request.generated) - 1) for request in requests),
    }
    return [
        Completion(
            text=out.text,
            ids=tuple(out.ids),
            prompt_ids=tuple(out.prompt_ids),
            finish_reason="stop" if out.stopped else request.finish or "cancelled",
            logprobs=tuple(out.logprobs),
            schedule=request.session.schedule,
            drug_seed=request.session.noise_seed % MAX_SEED,
            seed=request.sampler.seed,
            moved={
                name: int(after - before)
                for name, after, before in zip(COUNTED, request.session.moved, was, strict=True)
                if after > before
            },
            verified=_verified(request.session),
            timings=timings,
        )
        for request, out, was in zip(requests, outs, moved, strict=True)
    ]


def _verified(session: Session) -> dict[str, Verified]:
    """What a verification measured, beside what it should."""
    expected = expected_angles(session.schedule, session.runtime.config.n_layers)
    return {
        site: Verified(n, angle, expected.get(site), float(np.expm1(drift)))
        for site, (n, angle, drift) in session.verified().items()
    }


class _Text:
    """The text of one sequence as its tokens come."""

    def __init__(self, prompt_ids, detokenizer, stops):
        self.prompt_ids, self._detokenizer, self._stops = prompt_ids, detokenizer, stops
        self.ids, self.logprobs, self.text, self.stopped = [], [], "", False

    def push(self, choice, finish) -> str:
        self.ids.append(choice.id)
        if choice.logprob is not None:
            self.logprobs.append((choice.id, choice.logprob, choice.top))
        text = self._detokenizer.push(choice.id)
        if finish:
            text += self._detokenizer.flush()
        text, self.stopped = self._stops.push(text)
        if finish and not self.stopped:
            text += self._stops.flush()
        self.text += text
        return text


def _schedule(drug: Drug, drug_seed: int | None, index: int) -> tuple[Schedule, int]:
    """A drug as given -> its schedule and the noise seed of sequence number `index`."""
    schedule = SOBER if drug is None else Schedule.parse(drug)
    return schedule, (_seed(drug_seed, "drug_seed") + index) % MAX_SEED


def _seed(seed: int | None, name: str) -> int:
    """The seed asked for, or a fresh one of 32 bits, short enough to type again."""
    if seed is None:
        return int.from_bytes(os.urandom(4), "little")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < MAX_SEED:
        raise ConfigError(f"--{name.replace('_', '-')}: {seed!r} is not an integer in [0, 2**64)", name)
    return seed


def _share_prefix(session: Session, ids: Sequence[int]) -> None:
    """Rewind a kept session to what it shares with this prompt, leaving at least one token to feed."""
    try:
        session.rewind(session.pos - common(session.ids, ids[:-1]))
    except ValueError:  # the ring has moved on
        session.reset()
