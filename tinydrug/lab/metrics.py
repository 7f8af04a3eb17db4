"""What a text is like, and how much several texts of one prompt differ: the field's metrics, of words.

A word is a run of letters and digits, or one other sign; case counts. Metrics of spread take the samples of
one prompt under one condition. All of them rise or fall with length and with brokenness: `cut` samples to
one length and leave broken ones out before comparing (lab/cells.py does).
"""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import combinations
from math import comb

import numpy as np

WORD = re.compile(r"\w+|[^\w\s]")
TAIL = 200  # words at the end in which a loop is looked for
TIMES = 3  # how often a phrase comes at least, to be a loop
STUCK = 0.5  # repetition of 4-grams in the tail above which a text is a loop, whatever its unit
SUBSETS = 64  # of samples, at most, that a rarefied metric is averaged over

Words = Sequence[str]


def words(text: str) -> list[str]:
    return WORD.findall(text)


def ngrams(sample: Words, n: int) -> list[tuple[str, ...]]:
    return [tuple(sample[i : i + n]) for i in range(len(sample) - n + 1)]


# --- one text ---------------------------------------------------------------------------------------------
def repetition(sample: Words, n: int = 4) -> float:
    """rep-n: the share of n-grams that occurred before, in [0, 1); 0 for a text without any."""
    grams = ngrams(sample, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_loop(sample: Sequence) -> bool:
    """Whether it ends in a phrase of two words (or tokens) or more said three times in a row, or most of what
    it last said it had said before: a loop whose unit varies."""
    tail = list(sample[-TAIL:])
    for size in range(2, len(tail) // TIMES + 1):
        if tail[-size * TIMES :] == tail[-size:] * TIMES:
            return True
    return repetition(tail, 4) > STUCK


def loops(text: str, ids: Sequence[int]) -> bool:
    """Whether a text is a loop, told by its words or by its tokens: 11111111 is one word, and a run of line
    ends is none."""
    return is_loop(words(text)) or is_loop(ids)


def compression(text: str) -> float:
    """Bytes after deflate for each byte before: low if text repeats itself in any way; NaN if empty."""
    data = text.encode()
    return len(zlib.compress(data, 9)) / len(data) if data else float("nan")


# --- several texts of one prompt ----------------------------------------------------------------------------
def entropy(samples: Sequence[Hashable]) -> float:
    """Of how often each value is there, in nats; NaN without any."""
    from scipy.stats import entropy

    return float(entropy(list(Counter(samples).values()))) if samples else float("nan")


def distinct(samples: Sequence[Words], n: int = 2) -> float:
    """distinct-n: different n-grams for each n-gram of all samples together; NaN without any."""
    grams = [gram for sample in samples for gram in ngrams(sample, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def self_bleu(samples: Sequence[Words]) -> float:
    """self-BLEU-4: mean BLEU of each sample against all others, in [0, 1]; add-1 smoothing, brevity against
    the closest in length. The lower the more diverse. NaN for fewer than two samples."""
    from sacrebleu import BLEU

    if len(samples) < 2:
        return float("nan")
    bleu = BLEU(smooth_method="add-k", smooth_value=1, effective_order=True, tokenize="none")
    texts = [" ".join(sample) for sample in samples]
    return float(
        np.mean([bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)])
        / 100
    )


def shared_prefix(samples: Sequence[Words]) -> float:
    """Mean number of first words that two samples have in common; NaN for fewer than two."""
    pairs = [common_prefix(one, other) for one, other in combinations(samples, 2)]
    return float(np.mean(pairs)) if pairs else float("nan")


def common_prefix(one: Sequence, other: Sequence) -> int:
    """How many first elements are the same."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def unique(samples: Sequence[Words]) -> float:
    """Different samples for each sample."""
    return len({tuple(sample) for sample in samples}) / len(samples) if samples else float("nan")


def vendi(samples: Sequence[Words], order: float = 1) -> float:
    """The Vendi score, the effective number of different samples, from 1 to their number: exp of the entropy
    of the eigenvalues of K / n, K the cosines of counts of words and pairs of words. order 2: of Rényi's,
    which weighs common kinds more. NaN without samples."""
    if not samples:
        return float("nan")
    return float(np.exp(_entropy(np.linalg.eigvalsh(similarity(samples) / len(samples)), order)))


def similarity(samples: Sequence[Words]) -> np.ndarray:
    """(n, n) cosines of the counts of words and pairs of words; two empty samples are the same."""
    bags = [[*ngrams(sample, 1), *ngrams(sample, 2)] for sample in samples]
    index = {gram: i for i, gram in enumerate(dict.fromkeys(gram for bag in bags for gram in bag))}
    counts = np.zeros((len(samples), len(index) + 1))
    for row, bag in zip(counts, bags, strict=True):
        np.add.at(row, [index[gram] for gram in bag] or [-1], 1)
    counts /= np.linalg.norm(counts, axis=1, keepdims=True)
    return counts @ counts.T


def _entropy(p: np.ndarray, order: float) -> float:
    p = p[p > 1e-12]
    return float(-np.log((p**2).sum()) if order == 2 else -(p * np.log(p)).sum())


# --- traps --------------------------------------------------------------------------------------------------
def cut(samples: Sequence[Words], length: int) -> list[Words]:
    """The first `length` words of each sample that has as many: the others say nothing at this length."""
    return [sample[:length] for sample in samples if len(sample) >= length]


def rarefied(metric: Callable[[Sequence], float], samples: Sequence, size: int) -> float:
    """Mean of a metric over subsets of so many samples (all, or a fixed choice of many): what it would have
    been with fewer, to compare groups of which some lost members. NaN if there are too few."""
    if len(samples) < size:
        return float("nan")
    if comb(len(samples), size) <= SUBSETS:
        subsets = list(combinations(range(len(samples)), size))
    else:
        draw = np.random.default_rng(0)
        subsets = [sorted(draw.permutation(len(samples))[:size]) for _ in range(SUBSETS)]
    return float(np.mean([metric([samples[i] for i in subset]) for subset in subsets]))
