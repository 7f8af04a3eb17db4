"""Doubt: how sure the model is of its answer, told by noise: many drugged passes of one prompt, in one batch.

The model answers without noise; then K noises read that answer. Of each token: total uncertainty is the
entropy of the mean prediction, aleatoric the mean entropy of the predictions, epistemic the difference
(BALD): what the passes disagree about. And each noise answers by itself: the entropy of these answers.
"""

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinydrug.api import Drug, Engine, Prompt
from tinydrug.engine.sampling import log_softmax
from tinydrug.errors import ConfigError, DrugError
from tinydrug.lab.lanes import Lanes, check_reach
from tinydrug.lab.metrics import entropy
from tinydrug.lab.page import need
from tinydrug.lab.results import record
from tinydrug.lab.tokens import shown
from tinydrug.noise import SOBER, Schedule

ROWS = 1024  # of logits in memory at once
MOST = 1000  # passes
KINDS = ("epistemic", "aleatoric", "total")


@dataclass(frozen=True, eq=False)
class Doubt:
    """Uncertainties of T tokens in nats, and what each noise answered."""

    text: str  # the sober answer
    tokens: tuple[str, ...]
    total: np.ndarray  # (T,)
    aleatoric: np.ndarray  # (T,)
    epistemic: np.ndarray  # (T,)
    likelihood: np.ndarray  # (T,) of each token without noise
    answers: tuple[tuple[str, int], ...]  # the most frequent first, and how many noises gave it
    entropy: float  # of the answers, nats
    record: dict

    def rows(self) -> list[dict]:
        """A row a token."""
        names = ("total", "aleatoric", "epistemic", "likelihood")
        columns = zip(self.tokens, *(getattr(self, name) for name in names), strict=True)
        return [dict(zip(("token", *names), values, strict=True)) for values in columns]


def doubt(engine: Engine, prompt: Prompt, drug: Drug, k: int = 10, n: int = 64, seed: int = 1) -> Doubt:
    """Answer a prompt with at most n tokens and measure how sure that is, by k noises.

    The prompt's last token is read under noise even if the schedule says none: else the first token would
    have no doubt. Raises ConfigError for k below 2, DrugError for a schedule without noise, PromptError.
    """
    schedule = check(engine, drug, k, n)
    ids = engine.encode(prompt)
    sober = engine.generate(ids, n=n)
    read = [*ids, *sober.ids[:-1]]
    check_reach(read, schedule.sink)
    total, aleatoric, likelihood = uncertainty(engine, ids, sober.ids, schedule, range(seed, seed + k))
    drunk = engine.generate(prompts=[ids] * k, drug=schedule, drug_seed=seed, n=n)
    said = [normal(each.text) for each in drunk]
    first = {normal(each.text): each.text.strip() for each in reversed(drunk)}
    settings = {"drug": str(schedule), "k": k, "n": n, "seed": seed, "prompt_ids": ids}
    return Doubt(
        text=sober.text,
        tokens=tuple(shown(engine.tokenizer, token) for token in sober.ids),
        total=total,
        aleatoric=aleatoric,
        epistemic=np.maximum(total - aleatoric, 0),
        likelihood=likelihood,
        answers=tuple((first[text], count) for text, count in Counter(said).most_common()),
        entropy=entropy(said),
        record=record(engine, "doubt", **settings),
    )


def check(engine: Engine, drug: Drug, k: int, n: int) -> Schedule:
    """The schedule of the passes. ConfigError, DrugError."""
    need("scipy")
    if isinstance(k, bool) or not isinstance(k, int) or not 2 <= k <= MOST:
        raise ConfigError(f"--passes: {k!r} is not a number of passes from 2 to {MOST}", "k")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigError(f"--predict: {n!r} is not a number of tokens of at least 1", "n")
    schedule = engine.resolve(drug)
    if schedule.is_sober:
        raise DrugError("sober passes never disagree: give a dose, for instance --drug A:kl=0.1")
    return replace(schedule, prompt="last") if schedule.prompt == "none" else schedule


def uncertainty(
    engine: Engine, prompt_ids: Sequence[int], ids: Sequence[int], schedule: Schedule, seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Total and aleatoric uncertainty of the predictions of these tokens after a prompt, read under as many
    noises as there are seeds, and their likelihoods without noise: (T,) each, nats."""
    from scipy.special import entr

    shared = len(prompt_ids) - 1 if schedule.prompt == "last" else 0
    lanes = Lanes(engine, [*prompt_ids, *ids[:-1]], shared)
    group = max(1, ROWS // len(ids))
    mean, aleatoric = 0.0, np.zeros(len(ids))
    for at in range(0, len(seeds), group):
        logits = lanes.read([(schedule, seed) for seed in seeds[at : at + group]], len(ids))  # (N, T, V)
        for row in logits:
            p = np.exp(log_softmax(row))
            aleatoric += entr(p).sum(-1) / len(seeds)
            mean = mean + p / len(seeds)
    sober = np.exp(log_softmax(lanes.read([(SOBER, 0)], len(ids))[0]))
    return entr(mean).sum(-1), aleatoric, sober[np.arange(len(ids)), ids]


def normal(text: str) -> str:
    """An answer as it is compared: its first line, without case, signs and spaces."""
    line = text.strip().partition("\n")[0].lower()
    return " ".join(line.translate(str.maketrans(string.punctuation, " " * len(string.punctuation))).split())
