"""Vergence: how far noise at one site and one window of layers drives the last token's hidden states apart.

1 - cos between the residual stream after each layer with and without noise, for every site, every injection
window and every dose, theta 0 included (it must be 0: what is not is no noise). Means over noise seeds, with
standard errors. After DRµGS' surfaces, with an axis value for every row and column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from tinydrug.api import Engine, Prompt
from tinydrug.engine.checks import whole, wholes
from tinydrug.engine.forced import divergence
from tinydrug.engine.sampling import log_softmax
from tinydrug.errors import ConfigError
from tinydrug.lab.lanes import Lanes, check_reach
from tinydrug.lab.progress import Progress, Work
from tinydrug.lab.results import record
from tinydrug.lab.tokens import likeliest, shown
from tinydrug.noise import SITES, SOBER, Dose, Layers, Schedule
from tinydrug.noise.checks import number

DOSES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.2, 1.6)  # radians
TOP = 10  # sober tokens whose likelihoods are kept
MODES = ("all", "last")


@dataclass(frozen=True)
class Plan:
    """What to measure. Raises ConfigError, DrugError."""

    sites: tuple[str, ...] = tuple(SITES)
    doses: tuple[float, ...] = DOSES  # radians; 0 is added if it is missing
    width: int = 3  # layers of an injection window
    stack: bool = False  # windows reach from the first layer on: each is one layer deeper than the one before
    law: str = "uniform"
    prompt: str = "all"  # which of the prompt's positions are read under noise: all, or the last one
    sink: int = SOBER.sink
    seeds: tuple[int, ...] = (1, 2, 3)  # of the noise

    def __post_init__(self):
        for name in ("sites", "doses"):
            if not isinstance(getattr(self, name), Sequence):
                raise ConfigError(f"--{name}: expected a list, not {getattr(self, name)!r:.60}", name)
        doses = {0.0, *(number(theta, "theta", least=0) for theta in self.doses)}
        object.__setattr__(self, "doses", tuple(sorted(doses)))
        object.__setattr__(self, "sites", tuple(self.sites))
        object.__setattr__(self, "seeds", wholes(self.seeds, "--seeds"))
        object.__setattr__(self, "width", whole(self.width, "--width", 1, field="width"))
        for theta, site in product(self.doses, self.sites):
            Dose(site, theta, law=self.law)
        if self.prompt not in MODES:
            raise ConfigError(f"--noise: {self.prompt!r} is not all or last", "prompt")
        for name in ("sites", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"--{name}: there must be at least one", name)

    def windows(self, n_layers: int) -> list[tuple[int, int]]:
        """(first, last) layer of every injection window. ConfigError if the model is too small for one."""
        if self.stack:
            return [(0, last) for last in range(n_layers)]
        if self.width > n_layers:
            raise ConfigError(
                f"--width: a window of {self.width} layers does not fit this model of {n_layers}", "width"
            )
        return [(first, first + self.width - 1) for first in range(n_layers - self.width + 1)]


@dataclass(frozen=True, eq=False)
class Vergence:
    """What came out. Axes: S sites, W windows, D doses, L layers, K tokens; NaN where it was not reached."""

    sites: tuple[str, ...]
    windows: np.ndarray  # (W, 2) first and last layer
    doses: np.ndarray  # (D,) theta, radians
    divergence: np.ndarray  # (S, W, D, L) mean of 1 - cos after each layer
    error: np.ndarray  # (S, W, D, L) its standard error over seeds; NaN for one seed
    kl: np.ndarray  # (S, W, D) mean KL(sober || drugged) of the next token, nats
    flips: np.ndarray  # (S, W, D) share of seeds whose likeliest next token is another
    tokens: np.ndarray  # (K,) the likeliest next tokens without noise
    sober: np.ndarray  # (K,) their likelihoods
    drugged: np.ndarray  # (S, W, D, K) and under noise, mean over seeds
    record: dict
    complete: bool

    @property
    def middle(self) -> int:
        """The index of the dose that pictures of one dose show."""
        return min(len(self.doses) - 1, 1 + (len(self.doses) - 1) // 2)

    def arrays(self) -> dict[str, np.ndarray]:
        """For an NPZ file, with an axis for each dimension."""
        names = ("windows", "doses", "divergence", "error", "kl", "flips", "tokens", "sober", "drugged")
        return {"sites": np.array(self.sites), "layers": np.arange(self.divergence.shape[-1])} | {
            name: getattr(self, name) for name in names
        }

    def rows(self) -> list[dict]:
        """A row a site, window, dose and layer."""
        out = []
        for s, site in enumerate(self.sites):
            for w, (first, last) in enumerate(self.windows.tolist()):
                for d, theta in enumerate(self.doses.tolist()):
                    about = {"site": site, "first": first, "last": last, "theta": theta}
                    for layer, value in enumerate(self.divergence[s, w, d]):
                        row = {"layer": layer, "divergence": value, "error": self.error[s, w, d, layer]}
                        out.append(about | row | {"kl": self.kl[s, w, d], "flips": self.flips[s, w, d]})
        return out


def vergence(
    engine: Engine, prompt: Prompt, plan: Plan | None = None, progress: Progress | None = None
) -> Vergence:
    """Measure it: sequences of many doses and seeds share each forward pass. Progress counts sequences; what
    is done when it raises KeyboardInterrupt is kept.

    Raises PromptError for a prompt that noise does not reach, ConfigError for a window that the model is too
    small for.
    """
    plan = plan or Plan()
    ids, L = engine.encode(prompt), engine.config.n_layers
    check_reach(ids, plan.sink)
    windows = plan.windows(L)
    reader = Lanes(engine, ids, len(ids) - 1 if plan.prompt == "last" else 0)
    (logits,), (states,) = reader.hidden([(SOBER, 0)])
    sober = np.exp(log_softmax(logits))
    tokens = likeliest(sober, TOP)
    shape = len(plan.sites), len(windows), len(plan.doses)
    sums, squares = np.zeros((*shape, L)), np.zeros((*shape, L))
    counts, kl, flips = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    drugged = np.zeros((*shape, len(tokens)))
    lanes = [
        (s, w, d, seed)
        for s, w, d in np.ndindex(shape)
        for seed in (plan.seeds if plan.doses[d] else plan.seeds[:1])  # sober is the same every time
    ]
    work = Work([lanes[at : at + reader.lanes] for at in range(0, len(lanes), reader.lanes)], progress, len)
    for group in work:
        noise = [(_schedule(plan, windows, s, w, d), seed) for s, w, d, seed in group]
        for (s, w, d, _), row, state in zip(group, *reader.hidden(noise), strict=True):
            apart = one_minus_cosine(states, state)
            sums[s, w, d] += apart
            squares[s, w, d] += apart**2
            counts[s, w, d] += 1
            kl[s, w, d] += divergence(logits[None], row[None, None])[0, 0]
            flips[s, w, d] += row.argmax() != logits.argmax()
            drugged[s, w, d] += np.exp(log_softmax(row))[tokens]
    with np.errstate(invalid="ignore", divide="ignore"):
        n = counts[..., None]
        mean = sums / n
        spread = np.maximum(squares / n - mean**2, 0) * n / (n - 1)
        error = np.where(np.array(plan.doses)[:, None] == 0, 0.0 * mean, np.sqrt(spread / n))
        return Vergence(
            sites=plan.sites,
            windows=np.array(windows),
            doses=np.array(plan.doses),
            divergence=mean,
            error=error,
            kl=kl / counts,
            flips=flips / counts,
            tokens=tokens,
            sober=sober[tokens],
            drugged=drugged / n,
            record=_record(engine, ids, plan, tokens, work.complete),
            complete=work.complete,
        )


def one_minus_cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 - cos of vectors (..., D) -> (...) float64: half the squared distance of the unit vectors, which is
    exactly 0 for equal ones and keeps its digits for close ones."""
    a, b = (
        x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
        for x in (one, other)
    )
    return ((a - b) ** 2).sum(-1) / 2


def _schedule(plan: Plan, windows, s: int, w: int, d: int) -> Schedule:
    dose = Dose(plan.sites[s], plan.doses[d], Layers((windows[w],)), plan.law)
    return Schedule((dose,), sink=plan.sink, prompt=plan.prompt)


def _record(engine: Engine, ids, plan: Plan, tokens, complete: bool) -> dict:
    settings = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    names = [shown(engine.tokenizer, int(token)) for token in tokens]
    prompt = engine.tokenizer.decode(ids, skip_special=False)
    about = record(engine, "vergence", **settings, prompt_ids=list(ids), prompt_text=prompt)
    return about | {"top_tokens": names, "complete": complete}
