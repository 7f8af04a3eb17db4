"""Doing the jobs of a sweep: on an engine here, on processes of this machine, or on a Dask cluster.

Each way gives the same rows, bit for bit: what a job gives depends on the job and the model alone.
"""

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

from tinydrug.api import Completion, Engine, Options
from tinydrug.api import Job as Generation
from tinydrug.engine.sampling import Sampling
from tinydrug.errors import ConfigError, TinydrugError
from tinydrug.lab.plan import Job
from tinydrug.loading import load

PLACES = 64  # sequences written together
TASK = 64  # jobs of one task of a cluster: its rows come back together
PULSE = 0.1  # seconds between two looks at what has come
TAIL = 0.2  # of a text, scored apart: it wanders off late if it does
SHARED = ("model", "made_by", "ids", "text", "prompt_ids", "format")  # what a row's record leaves out


@dataclass(frozen=True)
class Source:
    """How a process gets its engine: the arguments of tinydrug.load."""

    model: str | None
    quant: str = "none"
    cache: str = "f16"
    threads: int | None = None

    def engine(self) -> Engine:
        return load(self.model, quant=self.quant, cache=self.cache, threads=self.threads, offline=True)


def rows(
    engine: Engine, jobs: Iterable[Job], places: int = PLACES, pulse: Callable[[], None] = lambda: None
) -> Iterator[dict]:
    """What came of each job, as plain data, in the order in which they end. pulse() is called between two
    steps of the model, and may raise to stop."""
    taken: list[Job] = []

    def generations():
        for job in jobs:
            taken.append(job)
            yield _generation(job)

    for i, completion in engine.batch(generations(), places, pulse):
        yield _row(engine, taken[i], completion)


def _generation(job: Job) -> Generation:
    sampling = Sampling(**dict(job.condition.sampling), seed=job.seed)
    options = Options(n=job.n, sampling=sampling, drug_seed=job.seed, ignore_eos=job.ignore_eos)
    return Generation(job.prompt.content, job.condition.drug, options)


def _row(engine: Engine, job: Job, completion: Completion) -> dict:
    """Nothing in it depends on when, where and beside what it was made."""
    ended = completion.finish_reason == "stop"
    said = completion.ids[:-1] if ended else completion.ids  # without the token that ends it
    surprise = -engine.score_after(completion.prompt_ids, said).logprobs  # (T,) nats
    tail = surprise[int(len(surprise) * (1 - TAIL)) :]
    record = replace(
        completion.record, kept=0, history=()
    ).to_dict()  # what was kept were sober rows: as if read
    return {
        "id": job.id,
        "prompt": job.prompt.name,
        "condition": job.condition.name,
        "seed": job.seed,
        "text": completion.text,
        "tokens": len(said),
        "ended": ended,
        "nll": float(surprise.mean()) if len(surprise) else None,
        "nll_tail": float(tail.mean()) if len(tail) else None,
        "moved": completion.moved,
        "ids": list(completion.ids),
        "prompt_ids": list(completion.prompt_ids),
        "record": {name: value for name, value in record.items() if name not in SHARED},
    }


# --- processes of this machine ------------------------------------------------------------------------------
def on_processes(
    source: Source,
    jobs: Sequence[Job],
    workers: int,
    places: int = PLACES,
    pulse: Callable[[], None] = lambda: None,
) -> Iterator[dict]:
    """The rows, by so many processes, each with an engine of its own; a process gets its next job when it has
    a place for it. They end with this one, however it ends. Raises what a worker met."""
    context = get_context("spawn")
    pipes: dict[Connection, object] = {}
    waiting = iter(jobs)
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, source, places), daemon=True)
            process.start()
            theirs.close()
            pipes[ours] = process
        while pipes:
            pulse()
            for pipe in wait(list(pipes), PULSE):
                try:
                    kind, value = pipe.recv()
                except (EOFError, OSError):
                    raise TinydrugError("a worker process died: is there enough memory?") from None
                if kind == "next":
                    pipe.send(next(waiting, None))
                elif kind == "row":
                    yield value
                elif kind == "end":
                    pipes.pop(pipe).join()
                else:
                    raise _error(*value)
    finally:
        for process in pipes.values():
            process.kill()
            process.join()


def _worker(pipe: Connection, source: Source, places: int) -> None:
    """A process: asks for jobs, sends rows, and leaves when nobody is at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who gives out the jobs
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            for row in rows(source.engine(), iter(lambda: _asked(pipe), None), places):
                pipe.send(("row", row))
            pipe.send(("end", None))
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            pipe.send(("error", _plain(error)))


def _asked(pipe: Connection) -> Job | None:
    pipe.send(("next", None))
    return pipe.recv()


# --- a cluster ----------------------------------------------------------------------------------------------
def on_dask(
    source: Source,
    jobs: Sequence[Job],
    address: str,
    places: int = PLACES,
    pulse: Callable[[], None] = lambda: None,
) -> Iterator[dict]:
    """The rows, by the workers of the Dask cluster whose scheduler is at this address. ConfigError without
    the library, or if nobody answers there."""
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise ConfigError(
            "--dask: distributed is not installed: pip install 'tinydrug[dask]'", "dask"
        ) from None
    try:
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--dask: no scheduler at {address}: {error}", "dask") from None
    with client:
        tasks = [jobs[at : at + TASK] for at in range(0, len(jobs), TASK)]
        futures = [client.submit(_task, source, task, places, pure=False) for task in tasks]
        try:
            completed = as_completed(futures, loop=client.loop)
            while completed.count():
                pulse()
                for future in completed.next_batch(block=False):
                    done, error = future.result()
                    yield from done
                    if error:
                        raise _error(*error)
                time.sleep(PULSE)
        finally:
            client.cancel(futures)


def _task(source: Source, jobs: Sequence[Job], places: int) -> tuple[list[dict], tuple | None]:
    """On a worker: rows, and the error that ended them if one did."""
    done = []
    try:
        done.extend(rows(_engine(source), jobs, places))
    except Exception as error:
        return done, _plain(error)
    return done, None


@lru_cache(maxsize=1)
def _engine(source: Source) -> Engine:
    """A worker's engine, kept from task to task."""
    return source.engine()


# --- errors that cross processes ----------------------------------------------------------------------------
def _plain(error: Exception) -> tuple[str, int | None]:
    """Message and exit status; no status: it is a bug, not bad input."""
    known = isinstance(error, TinydrugError)
    return (str(error) if known else f"{type(error).__name__}: {error}"), error.exit_status if known else None


def _error(message: str, status: int | None) -> Exception:
    if status is None:
        return RuntimeError(f"in a worker: {message}")
    error = TinydrugError(message)
    error.exit_status = status
    return error
