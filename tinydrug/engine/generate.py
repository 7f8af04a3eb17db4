"""Generation: several sequences prefilled and decoded together, one event a token."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tinydrug.engine.runtime import Part, Runtime
from tinydrug.engine.sampling import Choice, Sampler
from tinydrug.engine.session import Session


@dataclass
class Request:
    """One sequence to continue. Whoever reads the events may set `stopped` to end it early."""

    session: Session
    ids: Sequence[int]  # what to feed first
    sampler: Sampler
    max_tokens: int | None  # None: until the context is full
    stop_ids: frozenset[int] = frozenset()
    shift_keep: int | None = (
        None  # when the context is full, keep this many first tokens and shift; None: stop
    )
    generated: list[int] = field(default_factory=list)
    finish: str | None = None  # stop (a stop id), length (max_tokens), context (no room), cancelled
    stopped: bool = False


@dataclass(frozen=True)
class Event:
    """A token of request number `index`; `finish` is set on its last one."""

    index: int
    choice: Choice
    finish: str | None


def generate(
    runtime: Runtime, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
) -> Iterator[Event]:
    """Feed every prompt, then decode all sequences in one forward pass a token, until each is finished.

    Prompts are drugged as each schedule says, generated tokens always. progress(done, total) counts prompt
    tokens."""
    for request in requests:
        begin(request)
    logits = _prefill(runtime, requests, progress)
    active = [i for i, request in enumerate(requests) if request.finish is None]
    while active:
        for i in active:
            request = requests[i]
            yield Event(i, choose(request, logits[i]), request.finish)
            if request.stopped and request.finish is None:
                request.finish = "cancelled"
        active = [i for i in active if requests[i].finish is None]
        if active:
            logits = _decode(runtime, requests, active)


def begin(request: Request) -> None:
    """Check its tokens. PromptError, ContextOverflow."""
    request.session.check(request.ids)
    request.session.born = request.session.pos + len(request.ids)
    if request.max_tokens == 0:
        request.finish = "length"


def choose(request: Request, logits: np.ndarray) -> Choice:
    """Its next token, from logits (V,); sets `finish` if that is the last one."""
    session = request.session
    choice = request.sampler(logits, session.ids, len(request.generated))
    request.generated.append(choice.id)
    if choice.id in request.stop_ids:
        request.finish = "stop"
    elif len(request.generated) == request.max_tokens:
        request.finish = "length"
    elif session.pos == session.runtime.n_ctx and request.shift_keep is None:
        request.finish = "context"
    return choice


def follow(request: Request) -> Part:
    """Its last token, to be fed; before that, rows written under noise are rewound if there are enough of
    them, and a full context is shifted."""
    session = request.session
    if session.rewind_every and session.dirty >= session.rewind_every:
        session.sober_up()
    if session.pos == session.runtime.n_ctx:
        session.shift(request.shift_keep)
    return Part(session, request.generated[-1:], True, 1)


def _prefill(runtime, requests, progress) -> dict[int, np.ndarray]:
    """Every prompt in steps of at most a chunk, several prompts in one step where they fit -> logits (V,) by
    request."""
    parts = [
        (i, part)
        for i, request in enumerate(requests)
        if request.finish is None
        for part in request.session.parts(request.ids, request.session.schedule.prompt, 1)
    ]
    logits, done, total = {}, 0, sum(len(part.ids) for _, part in parts)
    while parts:
        size, step = 0, []
        while parts and size + len(parts[0][1].ids) <= runtime.chunk:
            size += len(parts[0][1].ids)
            step.append(parts.pop(0))
        rows = iter(runtime.step([part for _, part in step]))
        logits |= {i: next(rows) for i, part in step if part.outputs}
        done += size
        if progress:
            progress(done, total)
    return logits


def _decode(runtime, requests, active) -> dict[int, np.ndarray]:
    """The last token of each active request, together -> logits (V,) by request."""
    logits = {}
    for at in range(0, len(active), runtime.chunk):
        group = active[at : at + runtime.chunk]
        rows = runtime.step([follow(requests[i]) for i in group])
        logits |= dict(zip(group, rows, strict=True))
    return logits
