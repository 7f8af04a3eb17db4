"""Generations of a sweep, decoded together with their places taken over, against one sequence at a time.

    python -m bench.sweep --model smollm2-135m

With weights as the file has them, and quantised to q8. All answer the same question under the same doses,
100 tokens each, ended by length alone. A sequence alone has all threads, and does not read its prompt again.
A sweep also scores every text without noise: rows "scored" hold that against generating and scoring one after
the other. Processes are counted once all of them are at work, from the first full batch to the last.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable

import tinydrug
from bench.card import Row, run
from tinydrug.api import Engine, Options
from tinydrug.api import Job as Generation
from tinydrug.lab.plan import Condition, Job, Prompt
from tinydrug.lab.work import PLACES, Source, on_processes, rows

TOKENS = 100
SWEEP = 4.0  # times one sequence alone: the target
DOSES = ("H:0.1", "Q:0.4", "K:0.4", "V:0.3", "A:0.3")
QUESTION = Prompt("sea", "Tell me about the sea.")
ALONE = 5  # generations of a round, one of each dose


def jobs(count: int) -> list[Job]:
    """So many, under all doses in turn."""
    doses = (DOSES[i % len(DOSES)] for i in range(count))
    return [Job(QUESTION, Condition(dose, dose, 0.0, dose), i, TOKENS, True) for i, dose in enumerate(doses)]


def alone(engine: Engine, scored: bool) -> float:
    """Tokens a second of one after the other."""
    start = time.perf_counter()
    for job in jobs(ALONE):
        drug = job.condition.drug
        made = engine.generate(QUESTION.content, drug=drug, drug_seed=job.seed, n=TOKENS, ignore_eos=True)
        if scored:
            engine.score_after(made.prompt_ids, made.ids)
    return ALONE * TOKENS / (time.perf_counter() - start)


def together(engine: Engine, count: int) -> float:
    """Tokens a second of so many generations in batches, unscored."""
    options = Options(n=TOKENS, drug_seed=1, ignore_eos=True)
    generations = [Generation(QUESTION.content, job.condition.drug, options) for job in jobs(count)]
    start = time.perf_counter()
    for _ in engine.batch(generations, PLACES):
        pass
    return count * TOKENS / (time.perf_counter() - start)


def together_scored(engine: Engine, count: int) -> float:
    start = time.perf_counter()
    for _ in rows(engine, jobs(count)):
        pass
    return count * TOKENS / (time.perf_counter() - start)


def on_all_processes(source: Source, workers: int, batches: int) -> float:
    """Tokens a second, scored, of so many processes together, once each has ended its first batch."""
    ended = [time.perf_counter() for _ in on_processes(source, jobs(workers * PLACES * batches), workers)]
    begun = ended[workers * PLACES - 1]
    return (len(ended) - workers * PLACES) * TOKENS / (ended[-1] - begun)


def measure(args: argparse.Namespace) -> Iterable[Row]:
    for quant in ("none", "q8"):
        yield from _measure(args, quant)


def _measure(args: argparse.Namespace, quant: str) -> Iterable[Row]:
    figures, count = defaultdict(list), PLACES if args.quick else 2 * PLACES
    with tinydrug.load(args.model, quant=quant, threads=args.threads) as engine:
        together(engine, 2)  # compiles
        for _ in range(args.rounds):
            figures["alone"].append(alone(engine, False))
            figures["together"].append(together(engine, count))
            figures["alone scored"].append(alone(engine, True))
            figures["together scored"].append(together_scored(engine, count))
    median = {what: statistics.median(values) for what, values in figures.items()}
    what = f"--quant {quant}: {PLACES} at a time, {TOKENS} tokens each"
    yield Row(what, median["together"], "tokens/s", "one at a time", median["alone"], SWEEP)
    yield Row(f"{what}, scored", median["together scored"], "tokens/s", "one, scored", median["alone scored"])
    speed = on_all_processes(Source(args.model, quant, threads=1), args.threads, 2 if args.quick else 3)
    name = f"{what}, scored, by {args.threads} processes"
    yield Row(name, speed, "tokens/s", "one, scored", median["alone scored"])


if __name__ == "__main__":
    run(__doc__, measure)
