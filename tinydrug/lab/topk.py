"""What a dose does to the likeliest next tokens: their likelihoods and ranks beside the sober ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinydrug.api import Drug, Engine, Prompt
from tinydrug.engine.checks import whole, wholes
from tinydrug.engine.forced import divergence
from tinydrug.engine.sampling import log_softmax
from tinydrug.errors import ConfigError
from tinydrug.lab.lanes import Lanes, check_reach
from tinydrug.lab.results import record
from tinydrug.lab.tokens import likeliest, shown
from tinydrug.noise import SOBER


@dataclass(frozen=True, eq=False)
class Shift:
    """The K tokens that are likeliest sober, then those that are likeliest drugged and not among them."""

    tokens: np.ndarray  # ids
    names: tuple[str, ...]
    sober: np.ndarray  # likelihoods
    drugged: np.ndarray  # mean over noise seeds
    error: np.ndarray  # its standard error; NaN for one seed
    rank: np.ndarray  # of each without noise, from 1
    rank_drugged: np.ndarray  # and in the mean of the drugged
    kl: float  # mean over seeds of KL(sober || drugged), nats
    record: dict

    def rows(self) -> list[dict]:
        """A row a token."""
        names = {"token": self.tokens, "text": self.names, "sober": self.sober, "drugged": self.drugged}
        names |= {"error": self.error, "rank": self.rank, "rank_drugged": self.rank_drugged}
        return [dict(zip(names, values, strict=True)) for values in zip(*names.values(), strict=True)]


def topk(
    engine: Engine, prompt: Prompt, drug: Drug, k: int = 10, seeds: Sequence[int] = range(1, 9)
) -> Shift:
    """The shift of the next token's likelihoods after a prompt; all seeds share the forward passes.

    The prompt is read as the schedule says, but at least its last token under noise: else the next token
    would be the sober one. Raises ConfigError, DrugError, PromptError.
    """
    k, seeds = whole(k, "--top", 1, field="k"), wholes(seeds, "--seeds")
    if not seeds:
        raise ConfigError("--seeds: there must be at least one", "seeds")
    ids, schedule = engine.encode(prompt), engine.resolve(drug)
    check_reach(ids, schedule.sink)
    where = "all" if schedule.prompt == "all" else "last"
    lanes = Lanes(engine, ids, 0 if where == "all" else len(ids) - 1)
    logits = lanes.read([(SOBER, 0), *((schedule, seed) for seed in seeds)])[:, 0]
    p = np.exp(log_softmax(logits))  # (1 + seeds, V)
    sober, drugged = p[0], p[1:].mean(0)
    best = likeliest(sober, k)
    tokens = np.concatenate([best, [t for t in likeliest(drugged, k) if t not in best]]).astype(np.int64)
    error = (
        p[1:, tokens].std(0, ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else np.full(tokens.shape, np.nan)
    )
    settings = {"drug": str(schedule), "k": k, "seeds": list(seeds), "prompt": where, "prompt_ids": ids}
    return Shift(
        tokens=tokens,
        names=tuple(shown(engine.tokenizer, int(token)) for token in tokens),
        sober=sober[tokens],
        drugged=drugged[tokens],
        error=error,
        rank=_ranks(sober)[tokens],
        rank_drugged=_ranks(drugged)[tokens],
        kl=float(divergence(logits[:1], logits[1:, None]).mean()),
        record=record(engine, "topk", **settings),
    )


def _ranks(p: np.ndarray) -> np.ndarray:
    """The rank of every token of p (V,), from 1."""
    ranks = np.empty(p.size, np.int64)
    ranks[likeliest(p, p.size)] = np.arange(1, p.size + 1)
    return ranks
