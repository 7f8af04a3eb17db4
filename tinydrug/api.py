"""Text in, text out: generate, stream, chat, forward and score with a loaded model."""

import logging
import math
import operator
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinydrug.engine.angles import settle
from tinydrug.engine.batch import batch
from tinydrug.engine.checks import whole, wholes
from tinydrug.engine.forced import cut
from tinydrug.engine.generate import Request, generate
from tinydrug.engine.history import Noise, Write
from tinydrug.engine.prefix import Prefix, common, inherit
from tinydrug.engine.record import Record, obstacle, versions
from tinydrug.engine.runtime import Runtime
from tinydrug.engine.sampling import Choice, Sampler, Sampling, log_softmax
from tinydrug.engine.session import Session
from tinydrug.errors import ConfigError, NumericalError, PromptError
from tinydrug.formats.config import Config
from tinydrug.noise import COUNTED, SOBER, Schedule
from tinydrug.noise.checks import shown
from tinydrug.noise.theory import expected_angles
from tinydrug.text.chat import named_template, render
from tinydrug.text.detokenizer import Detokenizer, StopStrings
from tinydrug.text.tokenizer import Tokenizer

log = logging.getLogger("tinydrug")

Prompt = str | Sequence[int] | Sequence[dict]  # text, token ids, or chat messages
Drug = Schedule | str | Sequence[str] | None
MAX_SEED = 2**64
REFERENCE = Path(__file__).parent / "text" / "reference.txt"  # where doses are told by their effect
PIECE = 256  # tokens of it that are read at once
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
        for name, flag in (("n", "--n-predict"), ("shift_keep", "--keep"), ("logprobs", "--logprobs")):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole(value, flag, field=name))
        for name in ("protect", "protect_ids"):
            object.__setattr__(self, name, wholes(getattr(self, name), name))
        if not isinstance(self.sampling, Sampling | None):
            raise ConfigError(f"sampling: expected a Sampling, not {shown(self.sampling)}", "sampling")
        if not isinstance(self.stop, Sequence):
            raise ConfigError(f"stop: expected a list of texts, not {shown(self.stop)}", "stop")


@dataclass(frozen=True)
class Job:
    """One of the generations of `Engine.batch`."""

    prompt: Prompt
    drug: Drug = None
    options: Options = Options()


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
    def render(
        self, messages: Sequence[dict], template: str | None = None, guard: Callable[[str], str] = str
    ) -> str:
        """The text the model reads for a conversation. template: a known name (chatml, ...) or Jinja text;
        None: the model's own. guard is applied to what was said. PromptError if there is no template."""
        if not isinstance(template, str | None):
            raise ConfigError(f"template: expected a text, not {shown(template)}", "template")
        if template is not None and "{" not in template:
            template = named_template(template)
        template = template or self.tokenizer.chat_template
        if template is None:
            raise PromptError(
                f"{self.name} has no chat template: give --chat-template, or prompt it as a base model"
            )
        return render(template, messages, tokens=self.tokenizer.special_tokens, guard=guard)

    def encode(self, prompt: Prompt, template: str | None = None) -> list[int]:
        """Token ids of a text (with the model's BOS rule), of chat messages, or ids as they are. Special
        tokens are found in a text and in what a template writes, not in what messages say. PromptError if
        empty."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            if not ids and self.tokenizer.bos_id is not None:  # GPT-2 writes no BOS, and starts from one
                ids = [self.tokenizer.bos_id]
        elif isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], dict):
            ids = self.tokenizer.encode(self.render(prompt, template, self.tokenizer.guard), bos=False)
        else:
            ids = _ids(prompt)
        if not ids:
            raise PromptError(
                "the prompt is empty and this model has no BOS token to start from: give it a word"
            )
        return ids

    def session(self, drug: Drug = None, drug_seed: int | None = None) -> Session:
        """A sequence to keep: pass it to `stream`, and only what is new in a prompt is read."""
        return Session(self.runtime, *self._noise(drug, drug_seed, 0))

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
        if session is not None and getattr(session, "runtime", None) is not self.runtime:
            raise ConfigError("session: it is not of this engine: engine.session makes one", "session")
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
        session: Session | None = None,
        **options,
    ) -> Completion | list[Completion]:
        """Continue one prompt, or several in one forward pass a token (then a list comes back); `options` are
        the fields of Options.

        With `prompts`, `drug` is one schedule for all or a list of one each; sequence i uses noise seed
        drug_seed + i and sampler seed + i, unless its schedule has a seed of its own. session: as for
        `stream`, with one prompt.
        """
        if (prompt is None) == (prompts is None):
            raise ConfigError("give either prompt or prompts", "prompt")
        if isinstance(prompts, str) or not isinstance(prompts, Iterable | None):
            raise ConfigError(f"prompts: expected a list of prompts, not {shown(prompts)}", "prompts")
        if session is not None:
            if prompts is not None:
                raise ConfigError("session: it continues one prompt: give prompt", "session")
            stream = self.stream(prompt, drug=drug, session=session, **options)
            for _ in stream:
                pass
            return stream.completion
        several = [prompt] if prompts is None else list(prompts)
        each = isinstance(drug, (list, tuple)) and prompts is not None
        drugs = list(drug) if each else [drug] * len(several)
        if len(drugs) != len(several):
            raise ConfigError(f"{len(several)} prompts but {len(drugs)} drugs: give one, or one each", "drug")
        done: list[Completion] = []
        for _ in self._run(several, drugs, [None] * len(several), Options(**options), done.extend):
            pass
        return done[0] if prompts is None else done

    def batch(
        self, jobs: Iterable[Job], places: int = 32, pulse: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[int, Completion]]:
        """Many generations, `places` of them in one forward pass a token; when one ends, the next takes its
        place -> (number of the job, what came of it), as they end.

        Every bit is as if each ran alone. Jobs are drawn one by one, when there is a place; rows of a prompt
        that was just read are not read again. pulse() is called after each token of each, and may raise to
        stop. Raises what `generate` does for the job that it concerns.
        """
        places = whole(places, "places", 1)
        running: dict[int, tuple[int, _Run]] = {}  # by the id of its request
        done: deque[Session] = deque(maxlen=places)  # whose caches are free

        def requests():
            for i, job in enumerate(jobs):
                run = self._begin(
                    job.prompt, job.drug, None, job.options, 0, done.popleft() if done else None
                )
                running[id(run.request)] = i, run
                yield run.request

        for request, choice in batch(self.runtime, requests(), places):
            i, run = running[id(request)]
            if choice is not None:
                run.push(choice, request.finish)
            pulse()
            if request.finish or request.stopped:
                del running[id(request)]
                done.append(request.session)
                yield i, self._completed(run)

    def chat(self, messages: Sequence[dict], **options) -> Completion:
        """The answer to a conversation of {"role", "content"} messages; options as for `generate`."""
        listed = isinstance(messages, Sequence) and messages
        if not listed or not all(isinstance(message, dict) for message in messages):
            raise PromptError('messages: expected a list of objects with "role" and "content"')
        return self.generate(list(messages), **options)

    def replay(self, record: Record, each: Callable[[Step], None] = lambda step: None) -> Completion:
        """Run a recorded generation again, handing every step to `each`; `record.difference` compares.

        ConfigError naming what stands in the way: another model or context, code in the sampling.
        """
        if not isinstance(record, Record):
            raise ConfigError(
                f"record: expected a Record, not {shown(record)}: Record.load reads files", "record"
            )
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

    def hidden(self, ids: Sequence[int], drug: Drug = None, drug_seed: int | None = None) -> np.ndarray:
        """The residual stream after every layer at every position, (L, T, D) float32; noise as `forward`."""
        session, found = self.session(drug, drug_seed), []
        ids = self.encode(_ids(ids))
        session.check(ids)
        for part in session.parts(ids, "none" if session.schedule.is_sober else "all", len(ids)):
            found.append(self.runtime.hidden([part])[1])
        return np.concatenate(found, 1)

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

    def score_after(self, prompt: Prompt, ids: Sequence[int]) -> Score:
        """Log-probabilities (T,) of all these tokens after a prompt, read without noise. Of a prompt that
        begins like the one before, only what is new is read."""
        before, ids, session = self.encode(prompt), _ids(ids), self.session()
        session.check([*before, *ids])
        self._prefix.share(session, before)
        if session.pos < len(before) - 1:
            session.feed(before[session.pos : -1], outputs=0)
        read, logprobs = [before[-1], *ids[:-1]], np.empty(len(ids))
        for at in range(0, len(ids), FORWARD_ROWS):
            rows = session.feed(read[at : at + FORWARD_ROWS], outputs=len(read[at : at + FORWARD_ROWS]))
            for i, row in enumerate(rows, at):
                logprobs[i] = row[ids[i]] - _log_sum_exp(row)
        self._prefix.keep(session)
        return Score(tuple(ids), logprobs)

    # --- doses told by their effect -------------------------------------------------------------------------
    def resolve(
        self, drug: Drug, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Schedule:
        """A drug as a schedule of angles: V:kl=0.05 becomes the V:THETA that has this effect on this model.

        It is found on a reference text, once: the user's cache keeps it. progress(done, total) counts doses.
        Raises DrugError.
        """
        schedule = SOBER if drug is None else Schedule.parse(drug)
        return settle(self.runtime, schedule, self.pieces(), progress) if schedule.is_open else schedule

    def pieces(self, text: str | None = None, size: int = PIECE) -> list[list[int]]:
        """Token ids of a text (None: the reference text) in pieces of at most so many tokens, each to be read
        like a text of its own. PromptError if it is empty."""
        size = whole(size, "size", 2)  # of which one may be BOS
        text = REFERENCE.read_text("utf-8") if text is None else text
        return cut(self.encode(text), min(size, self.n_ctx), self.tokenizer.bos_id)

    # --- inside ---------------------------------------------------------------------------------------------
    def _noise(self, drug: Drug, drug_seed: int | None, index: int) -> tuple[Schedule, int]:
        """A drug as given -> its schedule and the noise seed of sequence number `index`."""
        return self.resolve(drug), (_seed(drug_seed, "drug_seed") + index) % MAX_SEED

    def _forward(self, ids, drug, drug_seed):
        """Logits of all positions, a few at a time."""
        session = self.session(drug, drug_seed)
        ids = self.encode(_ids(ids))
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
        seeds = {"seed": (options.sampling or Sampling()).seed, "drug_seed": options.drug_seed}
        seeds = {name: _seed(seed, name) for name, seed in seeds.items()}  # chosen once for all of them
        chosen = replace(options.sampling or Sampling(), seed=seeds["seed"])
        options = replace(options, sampling=chosen, drug_seed=seeds["drug_seed"])
        each = enumerate(zip(prompts, drugs, sessions, strict=True))
        runs = [self._begin(prompt, drug, session, options, i) for i, (prompt, drug, session) in each]
        sound = False
        try:
            for event in generate(self.runtime, [run.request for run in runs], options.progress):
                yield event.index, runs[event.index].push(event.choice, event.finish)
            sound = True
        except GeneratorExit:  # closed early, between two steps
            sound = True
            raise
        finally:  # ended, closed early or failed
            finished([self._completed(run, runs) for run in runs])
            if sound:
                self._prefix.keep(*(run.request.session for run in runs if run.own))

    def _begin(self, prompt, drug, session, options, index, kept=None) -> "_Run":
        """Sequence number `index` of a run, ready to be continued. kept: a sequence no longer needed, whose
        cache may serve again."""
        if options.shift_keep is not None and options.shift_keep >= self.n_ctx:
            raise ConfigError(
                f"--keep: {options.shift_keep} tokens fill the context of {self.n_ctx}: keep fewer",
                "shift_keep",
            )
        ids, own = self.encode(prompt, options.template), session is None
        if own:
            session = Session(self.runtime, *self._noise(drug, options.drug_seed, index))
            if kept is None:
                self._prefix.share(session, ids)
            else:
                inherit(session, kept, ids)
        if options.protect or options.protect_ids:
            session.protect(options.protect, options.protect_ids)
        if options.verify:
            session.verify(True)
        _share_prefix(session, ids)
        sampling, want = options.sampling or Sampling(), options.logprobs
        seed = (_seed(sampling.seed, "seed") + index) % MAX_SEED
        request = Request(
            session,
            ids[session.pos :],
            Sampler(sampling, seed, want or 0, want is not None),
            options.n,
            frozenset() if options.ignore_eos else self.tokenizer.eos_ids,
            options.shift_keep,
        )
        start = _Start(session.pos, tuple(session.history), session.noise, session.rewind_every)
        text = _Text(ids, Detokenizer(self.tokenizer, continues=True), StopStrings(options.stop))
        return _Run(request, options, own, start, text)

    def _completed(self, run: "_Run", together: Sequence["_Run"] = ()) -> Completion:
        """What came of a run so far. together: those whose timings it shares."""
        request, text, session = run.request, run.text, run.request.session
        counts = zip(COUNTED, session.moved, run.moved, strict=True)
        completion = Completion(
            text=text.text,
            ids=tuple(text.ids),
            prompt_ids=tuple(text.prompt_ids),
            finish_reason="stop" if text.stopped else request.finish or "cancelled",
            logprobs=tuple(text.logprobs),
            schedule=session.schedule,
            drug_seed=session.noise_seed % MAX_SEED,
            seed=request.sampler.seed,
            moved={name: int(after - before) for name, after, before in counts if after > before},
            verified=_verified(session),
            timings=_timings(together or [run]),
        )
        start, options = run.start, run.options
        now = replace(session.noise, born=start.noise.born)
        changed = None if now == start.noise else "the noise of its session was changed while it ran"
        return replace(completion, _record=lambda made: self._record(made, start, options, changed))

    def _record(self, completion: Completion, start: "_Start", options: Options, changed: str | None):
        """The record of a completion. changed: why it cannot be run again."""
        sampling = replace(options.sampling or Sampling(), seed=completion.seed)
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


def _log_sum_exp(row: np.ndarray) -> float:
    """row (V,) float32; summed in float64."""
    most = row.max()
    return float(most) + math.log(np.exp(row - most).sum(dtype=np.float64))


class _Start(NamedTuple):
    """What a record says of a sequence as it was before a generation."""

    kept: int
    history: tuple[Write, ...]
    noise: Noise
    rewind_every: int


def _verified(session: Session) -> dict[str, Verified]:
    """What a verification measured, beside what it should; nothing if there was none."""
    if not session.measured:
        return {}
    expected = expected_angles(session.schedule, session.runtime.config.n_layers)
    return {
        site: Verified(n, angle, expected.get(site), float(np.expm1(drift)))
        for site, (n, angle, drift) in session.verified().items()
    }


class _Run:
    """A sequence that is being continued."""

    def __init__(self, request: Request, options: Options, own: bool, start: _Start, text: "_Text"):
        self.request, self.options, self.start, self.text = request, options, start, text
        self.own = own  # its session is nobody else's
        self.moved = request.session.moved.copy()  # the session's counters before
        self.began, self.first = time.perf_counter(), None  # of its first token; seconds

    def push(self, choice: Choice, finish: str | None) -> Step:
        """Take its next token."""
        self.first = self.first or time.perf_counter()
        text, out = self.text.push(choice, finish), self.text
        if out.stopped and finish is None:
            self.request.stopped = True
        finish = "stop" if out.stopped else finish
        return Step(text, choice.id, len(out.ids) - 1, choice.logprob, choice.top, finish)


def _timings(runs: Sequence[_Run]) -> dict[str, float]:
    """Seconds and tokens of sequences that were continued together."""
    now, start = time.perf_counter(), max(run.began for run in runs)
    first = min((run.first for run in runs if run.first), default=now)
    requests = [run.request for run in runs]
    return {
        "prefill_s": first - start,
        "prefill_tokens": sum(len(request.ids) for request in requests),
        "decode_s": now - first,
        "decode_tokens": sum(max(0, len(request.generated) - 1) for request in requests),
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


def _ids(prompt: Iterable[int]) -> list[int]:
    """Token ids of any library's kind as plain ones. PromptError."""
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise PromptError(f"expected text, token ids or chat messages, not {shown(prompt)}") from None


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
