"""The sampler: a row of logits and the ids so far in, one chosen token id out, in a fixed, documented order.

    penalties -> bias -> user processors -> top-k -> top-p -> min-p -> temperature -> draw

The meanings are llama.cpp's: penalties look at the last `repeat_last_n` ids, prompt included; top-p is taken
of what top-k left; temperature comes last, so it never changes who is a candidate. Temperature 0 is greedy:
the largest logit after penalties, bias and processors, the lowest id among equals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, log
from numbers import Integral, Real

import numpy as np

from tinydrug.errors import ConfigError, NumericalError

STREAM = 0x73616D706C65  # "sample": the upper key word, so that equal seeds never share draws with the noise

Processor = Callable[[np.ndarray, Sequence[int]], np.ndarray]


@dataclass(frozen=True)
class Sampling:
    """What to do with the logits; every default leaves them alone, so `Sampling()` is greedy.

    `top_k` 0, `top_p` 1, `min_p` 0, `repeat_penalty` 1 and the other penalties 0 are off; `repeat_last_n` -1
    is all ids. `logit_bias` maps a token id to what is added to its logit (-inf forbids the token).
    `processors` are called as f(logits (V,) float64, ids) -> logits (V,); they may write to what they are
    given and return it. `seed` None lets the engine choose one. Raises ConfigError naming the command's flag.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    processors: tuple[Processor, ...] = ()

    def __post_init__(self):
        for field, (flag, kind, sound, words) in RULES.items():
            value = getattr(self, field)
            if value is None and field == "seed":
                continue
            number = _number(value, kind)
            if number is None or not sound(number):
                raise ConfigError(f"{flag}: {value!r} is not {words}", field)
            object.__setattr__(self, field, number)
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        if not isinstance(self.processors, Sequence) or not all(callable(f) for f in self.processors):
            raise ConfigError("processors: not a tuple of functions (logits, ids) -> logits", "processors")
        object.__setattr__(self, "processors", tuple(self.processors))


@dataclass(frozen=True)
class Choice:
    """A chosen token; logprobs are natural, under the model's own distribution, not the sampler's."""

    id: int
    logprob: float | None = None  # None unless asked for
    top: tuple[tuple[int, float], ...] = ()  # the n_top most probable (id, logprob), best first


class Sampler:
    """Chooses tokens; it has no state, so a choice is a pure function of seed, step, logits and ids."""

    def __init__(self, sampling: Sampling, seed: int, n_top: int = 0, want_logprob: bool = False):
        """`seed` in [0, 2**64); `n_top` > 0 asks for that many alternatives, and for the token's logprob."""
        self.sampling, self.seed, self.n_top = sampling, seed, _number(n_top, Integral)
        if self.n_top is None or self.n_top < 0:
            raise ConfigError(f"--logprobs: {n_top!r} is not an integer >= 0", "n_top")
        self.want_logprob = want_logprob or n_top > 0
        self.bias_ids = np.array([i for i, _ in sampling.logit_bias], np.int64)  # (B,)
        self.biases = np.array([b for _, b in sampling.logit_bias], np.float64)  # (B,)

    def __call__(self, logits: np.ndarray, ids: Sequence[int], step: int) -> Choice:
        """logits (V,) float32, ids so far, index of the generated token -> Choice.

        Raises NumericalError when a logit is not finite, or when nothing is left to choose from.
        """
        candidates, p = self.distribution(logits, ids)
        chosen = int(candidates[_pick(p, self.seed, step) if p.size > 1 else 0])
        if not self.want_logprob:
            return Choice(chosen)
        logprobs = log_softmax(logits)  # (V,)
        best = _descending(logits, self.n_top)
        return Choice(chosen, float(logprobs[chosen]), tuple((int(i), float(logprobs[i])) for i in best))

    def distribution(self, logits: np.ndarray, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """logits (V,), ids so far -> the candidates' ids (n,), ascending, and probabilities (n,) float64."""
        s = self.sampling
        with np.errstate(over="ignore", invalid="ignore"):
            suspicious = not isfinite(logits.sum())
        if suspicious and not (finite := np.isfinite(logits)).all():
            raise NumericalError(
                f"{np.count_nonzero(~finite)} of {logits.size} logits are NaN or infinite, the first "
                f"that of token {np.argmin(finite)}: the weights are damaged or overflow, try --check-tensors"
            )
        z = self._adjusted(logits, ids)  # (V,)
        if s.temperature == 0:
            return np.array([np.argmax(z)]), np.ones(1)
        candidates = np.arange(z.size)
        if 0 < s.top_k < z.size:
            candidates = np.sort(_descending(z, s.top_k))
        if s.top_p < 1:
            candidates = candidates[_nucleus(z[candidates], s.top_p)]
        if s.min_p > 0:
            candidates = candidates[z[candidates] >= z[candidates].max() + log(s.min_p)]
        return candidates, _softmax(z[candidates], s.temperature)

    def _adjusted(self, logits: np.ndarray, ids: Sequence[int]) -> np.ndarray:
        """logits (V,) -> the same after penalties, bias and processors, float64 if any of them is on."""
        s = self.sampling
        penalised = s.repeat_last_n and (s.repeat_penalty != 1 or s.presence_penalty or s.frequency_penalty)
        if not (penalised or s.logit_bias or s.processors):
            return logits
        z = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # an overflow is judged below, by its result
            if penalised:
                recent = ids if s.repeat_last_n < 0 else ids[-s.repeat_last_n :]
                seen, count = np.unique(np.asarray(recent, np.int64), return_counts=True)
                was = z[seen]
                z[seen] = np.where(was <= 0, was * s.repeat_penalty, was / s.repeat_penalty)
                z[seen] -= count * s.frequency_penalty + s.presence_penalty
            if s.logit_bias:
                if (last := self.bias_ids[-1]) >= z.size:
                    raise ConfigError(f"--logit-bias: token {last} is not below {z.size}", "logit_bias")
                z[self.bias_ids] += self.biases
        for processor in s.processors:
            z = _processed(processor, z, ids)
        most = z.max()  # NaN if there is one
        if most == -inf:
            raise NumericalError("no token is left to choose from: bias or processors exclude every one")
        if not isfinite(most):
            raise NumericalError("a logit is NaN or +infinity after penalties, bias and processors")
        return z


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """logits (..., V) -> log probabilities (..., V) float64."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _softmax(z: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """z (n,), its maximum finite -> probabilities (n,) float64."""
    z = np.asarray(z, np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature sends the losers to -inf
        p = np.exp((z - z.max()) / temperature)
    return p / p.sum()


def _descending(z: np.ndarray, k: int) -> np.ndarray:
    """z (n,) -> indices (min(k, n),) of its largest entries, largest first; of equals, lowest index first."""
    if k == 0:
        return np.empty(0, np.int64)
    if k < z.size:  # a partition settles who is in; only they are sorted
        least = np.partition(z, z.size - k)[z.size - k]
        above, level = np.flatnonzero(z > least), np.flatnonzero(z == least)
        among = np.sort(np.concatenate((above, level[: k - above.size])))
    else:
        among = np.arange(z.size)
    return among[np.argsort(-z[among], kind="stable")]


def _nucleus(z: np.ndarray, top_p: float) -> np.ndarray:
    """z (n,) -> ascending indices of the fewest most probable entries that together have at least `top_p`."""
    p = _softmax(z)
    for k in (256, 4096, z.size):  # the nucleus is mostly small, and then nobody sorts the vocabulary
        order = _descending(z, k)
        mass = np.cumsum(p[order])
        if mass[-1] >= top_p:
            break
    return np.sort(order[: np.searchsorted(mass, top_p) + 1])


def _pick(p: np.ndarray, seed: int, step: int) -> int:
    """p (n,) -> an index drawn from it by inversion, with the one number that belongs to (seed, step)."""
    u = (np.random.Philox(key=seed | STREAM << 64, counter=step).random_raw() >> 11) * 2.0**-53  # [0, 1)
    possible = np.flatnonzero(p)  # excluded and underflown entries are never drawn, however u falls
    mass = np.cumsum(p[possible])
    return possible[min(np.searchsorted(mass, u * mass[-1], side="right"), possible.size - 1)]


def _processed(processor: Processor, z: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """z (V,) -> what a user's processor makes of it, held to its contract."""
    out = processor(z, ids)
    if not isinstance(out, np.ndarray) or out.shape != z.shape or out.dtype.kind not in "fiu":
        got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        name = getattr(processor, "__name__", type(processor).__name__)
        raise ConfigError(f"processors: {name} returned {got}, not logits {z.shape}", "processors")
    return out.astype(np.float64, copy=False)


def _bias_pairs(bias: Mapping[int, float] | Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """A mapping or pairs (id, bias) -> pairs sorted by id."""
    try:
        pairs = [(i, b) for i, b in (bias.items() if isinstance(bias, Mapping) else bias)]
    except (TypeError, ValueError):
        raise ConfigError(f"--logit-bias: {bias!r} does not map ids to numbers", "logit_bias") from None
    biases = {}
    for i, b in pairs:
        token, number = _number(i, Integral), _number(b, Real)
        if token is None or not 0 <= token < 2**31:
            raise ConfigError(f"--logit-bias: {i!r} is not a token id", "logit_bias")
        if number is None or not number < inf:
            raise ConfigError(f"--logit-bias: {b!r} of token {i} is not a number below inf", "logit_bias")
        if token in biases:
            raise ConfigError(f"--logit-bias: token {i} twice", "logit_bias")
        biases[token] = number
    return tuple(sorted(biases.items()))


def _number(value, kind: type) -> int | float | None:
    """value as an int (kind Integral) or a float (Real); None if it is no such number, as a bool is not."""
    if isinstance(value, bool) or not isinstance(value, kind):
        return None
    try:
        return int(value) if kind is Integral else float(value)
    except OverflowError:  # an int beyond any float
        return None


# field: the command's flag, the kind of number, what holds of a sound value, and that in words
RULES = {
    "temperature": ("--temp", Real, lambda x: 0 <= x < inf, "a finite number >= 0 (0 is greedy)"),
    "top_k": ("--top-k", Integral, lambda x: x >= 0, "an integer >= 0 (0 is off)"),
    "top_p": ("--top-p", Real, lambda x: 0 < x <= 1, "in (0, 1]"),
    "min_p": ("--min-p", Real, lambda x: 0 <= x <= 1, "in [0, 1]"),
    "repeat_penalty": ("--repeat-penalty", Real, lambda x: 0 < x < inf, "a finite number > 0 (1 is off)"),
    "repeat_last_n": ("--repeat-last-n", Integral, lambda x: x >= -1, "an integer >= -1 (0: off, -1: all)"),
    "presence_penalty": ("--presence-penalty", Real, isfinite, "a finite number"),
    "frequency_penalty": ("--frequency-penalty", Real, isfinite, "a finite number"),
    "seed": ("--seed", Integral, lambda x: 0 <= x < 2**64, "an integer in [0, 2**64)"),
}
