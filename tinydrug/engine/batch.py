"""Continuous batching: of many sequences so many are written together, and when one ends the next begins."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from tinydrug.engine.generate import Request, begin, choose, follow
from tinydrug.engine.runtime import Part, Runtime
from tinydrug.engine.sampling import Choice


def batch(
    runtime: Runtime, requests: Iterable[Request], places: int
) -> Iterator[tuple[Request, Choice | None]]:
    """Continue every request, `places` at a time (at most a chunk), each as if it were alone.

    A request is drawn from the iterable when there is a place for it, and its prompt is read in the steps in
    which others write. Yields (request, choice) for each token, with `request.finish` set on the last one;
    whoever reads them may set `request.stopped` to end it early. A request of no tokens yields (request,
    None). PromptError, ContextOverflow.
    """
    requests, places = iter(requests), min(places, runtime.chunk)
    reading: deque[tuple[Request, Part]] = deque()  # parts of prompts, in order
    writing: list[Request] = []
    free = places
    while True:
        while free and (request := next(requests, None)) is not None:
            begin(request)
            if request.finish:
                yield request, None
                continue
            free -= 1
            parts = request.session.parts(request.ids, request.session.schedule.prompt, 1)
            reading.extend((request, part) for part in parts)
        step = [(request, follow(request)) for request in writing]
        step += _read(reading, runtime.chunk - len(step))
        if not step:
            return
        rows = iter(runtime.step([part for _, part in step]))
        asked = [request for request, part in step if part.outputs]
        yield from [(request, choose(request, next(rows))) for request in asked]
        for request in asked:
            if request.stopped and request.finish is None:
                request.finish = "cancelled"
        writing = [request for request in asked if request.finish is None]
        free += len(asked) - len(writing)


def _read(reading: deque[tuple[Request, Part]], room: int) -> list[tuple[Request, Part]]:
    """Take parts of so many tokens together off the front, the last one perhaps cut in two."""
    taken = []
    while reading and room:
        request, part = reading.popleft()
        if len(part.ids) > room:
            reading.appendleft((request, replace(part, ids=part.ids[room:])))
            part = replace(part, ids=part.ids[:room], outputs=0)
        room -= len(part.ids)
        taken.append((request, part))
    return taken
