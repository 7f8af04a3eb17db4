"""Metrics of texts against independent implementations, and the traps they must not fall into."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from tinydrug.lab import metrics
from tinydrug.lab.cells import interval
from tinydrug.lab.cliff import crossing

RANDOM = np.random.default_rng(7)


def sample(length: int, kinds: int = 25) -> list[str]:
    return [f"w{i}" for i in RANDOM.integers(0, kinds, length)]


GROUPS = [[sample(int(n)) for n in RANDOM.integers(5, 80, size)] for size in (2, 3, 5, 8)]


def bleu(hypothesis: list[str], references: list[list[str]]) -> float:
    """BLEU-4 from its definition (Papineni 2002; add-1 for n > 1 as Lin and Och), in exact fractions."""
    logs = 0.0
    for n in range(1, 5):
        grams = Counter(tuple(hypothesis[i : i + n]) for i in range(len(hypothesis) - n + 1))
        best = Counter()
        for reference in references:
            best |= Counter(tuple(reference[i : i + n]) for i in range(len(reference) - n + 1))
        hits, total = sum((grams & best).values()), sum(grams.values())
        share = Fraction(hits + (n > 1), total + (n > 1))
        if not share:
            return 0.0
        logs += math.log(share) / 4
    closest = min((abs(len(reference) - len(hypothesis)), len(reference)) for reference in references)[1]
    brevity = min(1.0, math.exp(1 - closest / len(hypothesis)))
    return brevity * math.exp(logs)


@pytest.mark.parametrize("group", GROUPS, ids=len)
def test_self_bleu(group):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: the [lab] extra")
    wanted = np.mean([bleu(text, group[:i] + group[i + 1 :]) for i, text in enumerate(group)])
    assert metrics.self_bleu(group) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("group", GROUPS, ids=len)
def test_self_bleu_as_nltk_has_it(group):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: the [lab] extra")
    nltk = pytest.importorskip("nltk.translate.bleu_score", reason="nltk is not installed: a second opinion")
    smooth = nltk.SmoothingFunction().method2
    each = [
        nltk.sentence_bleu(group[:i] + group[i + 1 :], text, smoothing_function=smooth)
        for i, text in enumerate(group)
    ]
    assert metrics.self_bleu(group) == pytest.approx(np.mean(each), rel=1e-9)


def test_self_bleu_of_copies_and_of_strangers():
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: the [lab] extra")
    text = sample(40)
    assert metrics.self_bleu([text, text]) == pytest.approx(1)
    assert metrics.self_bleu([text, [word.upper() for word in text]]) < 0.01
    assert math.isnan(metrics.self_bleu([text]))


@pytest.mark.parametrize("group", GROUPS, ids=len)
def test_vendi_from_its_definition(group):
    """exp of the entropy of the eigenvalues of K / n (Friedman and Dieng), K from dicts, not from arrays."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: the [lab] extra")

    def bag(text):
        return Counter(text) + Counter(zip(text, text[1:], strict=False))

    def cosine(a, b):
        return sum(a[k] * b[k] for k in a) / math.sqrt(
            sum(x * x for x in a.values()) * sum(x * x for x in b.values())
        )

    kernel = np.array([[cosine(bag(a), bag(b)) for b in group] for a in group]) / len(group)
    values = np.linalg.eigvals(kernel).real.clip(0)
    np.testing.assert_allclose(metrics.similarity(group) / len(group), kernel, atol=1e-12)
    assert metrics.vendi(group) == pytest.approx(math.exp(stats.entropy(values)), rel=1e-9)
    assert metrics.vendi(group, 2) == pytest.approx(1 / (values**2).sum(), rel=1e-9)


def test_vendi_counts_kinds():
    a, b, c = ([f"{kind}{i}" for i in range(10)] for kind in "abc")
    assert metrics.vendi([a, a, a]) == pytest.approx(1)
    assert metrics.vendi([a, b, c]) == pytest.approx(3)
    assert metrics.vendi([a, a, b, b]) == pytest.approx(2)
    assert metrics.vendi([[], []]) == pytest.approx(1)
    assert math.isnan(metrics.vendi([]))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_repetition_and_distinct(n):
    text = "a b a b a b c d".split()
    grams = list(zip(*(text[i:] for i in range(n)), strict=False))
    assert metrics.repetition(text, n) == pytest.approx(1 - len(set(grams)) / len(grams))
    assert metrics.distinct([text, text], n) == pytest.approx(len(set(grams)) / (2 * len(grams)))


def test_of_nothing():
    assert metrics.repetition([], 4) == metrics.repetition(["a"], 2) == 0
    assert math.isnan(metrics.distinct([[], []], 1)) and math.isnan(metrics.compression(""))
    assert math.isnan(metrics.shared_prefix([["a"]])) and math.isnan(metrics.unique([]))
    assert not metrics.is_loop([])


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("once upon a time there was a fox", False),
        ("and so on and so on and so on", True),
        ("well " + "the sea the sea the sea", True),
        ("no no", False),
        ("no no no no no no", True),
        ("a b c a b c x", False),
        ("I went there. " * 3, True),
        (
            " ".join(f"I have {i} apples and they are red and good to eat ." for i in range(12)),
            True,
        ),  # unit varies
        (" ".join(f"word{i}" for i in range(300)), False),
        ("x y " * 50 + " ".join(f"word{i}" for i in range(200)), False),  # it found its way out
    ],
)
def test_loops(text, loops):
    assert metrics.is_loop(metrics.words(text)) is loops


def test_loops_of_tokens():
    """What words do not show: digits are one word, line ends are none."""
    assert metrics.loops("The End 1111111111", [4, 5, *[33] * 10]) and not metrics.is_loop(
        ["The", "End", "1" * 10]
    )
    assert metrics.loops("so" + "\n" * 9, [7, *[198] * 9]) and not metrics.loops("so it is", [7, 8, 9])
    assert metrics.loops("and so on and so on and so on", [])


def test_words():
    assert metrics.words("Don't stop, 3.5 km: naïve 日本!") == [
        *("Don", "'", "t", "stop", ",", "3", ".", "5", "km", ":", "naïve", "日本", "!")
    ]


def test_prefixes():
    assert metrics.shared_prefix(["a b c d".split(), "a b x".split(), "a b c d".split()]) == pytest.approx(
        8 / 3
    )
    assert metrics.common_prefix([1, 2], [1, 2, 3]) == 2 and metrics.common_prefix([], [1]) == 0


def test_length_moves_vendi_and_cutting_takes_it_out():
    """The trap: of the same source, longer texts are further apart; cut to one length they are not."""
    short, long = ([sample(n, 400) for _ in range(6)] for n in (30, 90))
    assert metrics.distinct(long, 1) < metrics.distinct(short, 1)
    fair = metrics.cut(long, 30)
    assert [len(text) for text in fair] == [30] * 6
    assert metrics.cut([*long, sample(10)], 30) == fair, "what is too short says nothing at this length"


def test_rarefied_does_not_know_how_many_there_were():
    group = [sample(30, 400) for _ in range(9)]
    few, many = (metrics.rarefied(metrics.vendi, group[:n], 3) for n in (6, 9))
    assert metrics.vendi(group) > metrics.vendi(group[:6]) + 0.5 and few == pytest.approx(many, rel=0.05)
    assert metrics.rarefied(len, group, 3) == 3 and metrics.rarefied(metrics.vendi, group[:3], 3) == (
        metrics.vendi(group[:3])
    )
    assert math.isnan(metrics.rarefied(metrics.vendi, group[:2], 3))
    large = [sample(5) for _ in range(40)]
    assert metrics.rarefied(len, large, 20) == 20, "a fixed choice of subsets, not all 10^11"


def test_interval_as_scipy_has_it():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: the [lab] extra")
    values = RANDOM.normal(3, 1, 25)
    with_scipy = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=2000, random_state=1)
    np.testing.assert_allclose(interval(values), with_scipy.confidence_interval, atol=0.06)
    low, high = interval([1.0, math.nan, 1.0])
    assert low == high == 1
    assert all(map(math.isnan, interval([2.0])))


@pytest.mark.parametrize(
    ("shares", "wanted"),
    [
        ([1, 1, 1], math.nan),
        ([0.2, 0, 0], 0.1),
        ([1, 0, 0], 0.1 * 2**0.5),
        ([1, 0.5, 0], 0.2),
        ([1, 0.9, 0.1], 0.2 * 2**0.5),
        ([1, 0.4, 1], 0.1 * 2 ** (0.5 / 0.6)),
    ],
)
def test_crossing(shares, wanted):
    assert crossing([0.1, 0.2, 0.4], shares) == pytest.approx(wanted, nan_ok=True)
