"""Sampling: processors against transformers, draws against their distribution, every value it must refuse."""

import numpy as np
import pytest
from golden.make_models import SAMPLING, hf_scores, sampling_inputs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tinydrug.engine.sampling import STREAM, Choice, Sampler, Sampling, log_softmax
from tinydrug.errors import ConfigError, NumericalError

LOGITS = np.array([0.5, 2.0, -1.0, 2.0, 1.0, -3.0], np.float32)


def choose(logits=LOGITS, ids=(), step=0, seed=7, n_top=0, want_logprob=False, **options) -> Choice:
    return Sampler(Sampling(**options), seed, n_top, want_logprob)(np.asarray(logits, np.float32), ids, step)


def probabilities(logits=LOGITS, ids=(), **options) -> np.ndarray:
    """The probability of every token (V,), zero where it is no candidate."""
    logits = np.asarray(logits, np.float32)
    candidates, p = Sampler(Sampling(**{"temperature": 1.0} | options), 0).distribution(logits, ids)
    out = np.zeros(logits.size)
    out[candidates] = p
    return out


# --- against transformers


@pytest.mark.parametrize("i", range(len(SAMPLING)), ids=[" ".join(case) for case in SAMPLING])
def test_distribution_equals_transformers(i, golden):
    expected = golden("sampling")
    for logits, scores in zip(expected["logits"], expected[f"case{i}"], strict=True):
        p = np.exp(log_softmax(scores))  # -inf where transformers excludes
        found = probabilities(logits, expected["ids"].tolist(), **SAMPLING[i])
        np.testing.assert_array_equal(found > 0, p > 0)
        np.testing.assert_allclose(found, p, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("i", range(len(SAMPLING)))
def test_golden_scores_are_what_transformers_says_today(i, golden):
    pytest.importorskip("torch", reason="torch is not installed; the committed golden scores stand for it")
    pytest.importorskip(
        "transformers", reason="transformers is not installed; the golden scores stand for it"
    )
    logits, ids = sampling_inputs()
    np.testing.assert_allclose(hf_scores(SAMPLING[i], logits, ids), golden("sampling")[f"case{i}"], rtol=1e-5)


# --- greedy


def test_greedy_is_the_default_and_takes_the_lowest_of_equals():
    assert choose() == Choice(1)
    assert {choose(step=step, seed=seed).id for step in range(5) for seed in range(5)} == {1}


def test_greedy_follows_penalties_bias_and_processors():
    assert choose(ids=[1], repeat_penalty=1.1).id == 3
    assert choose(logit_bias={5: 5.5}).id == 5
    assert choose(processors=(lambda z, ids: -z,)).id == 5


def test_greedy_neither_sorts_nor_normalises(monkeypatch):
    for name in ("sort", "argsort", "partition", "argpartition", "exp", "cumsum"):
        monkeypatch.setattr(np, name, None)
    assert choose(np.arange(1000.0)).id == 999


# --- log probabilities


def test_logprobs_are_those_of_the_model_not_of_the_sampler():
    expected = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    choice = choose(
        want_logprob=True, n_top=3, temperature=0.3, top_k=2, logit_bias={4: 50.0}, ids=[1], repeat_penalty=2
    )
    assert choice.id == 4
    assert choice.logprob == pytest.approx(expected[4], abs=1e-12)
    assert [i for i, _ in choice.top] == [1, 3, 4]  # equals in order of id
    np.testing.assert_allclose([logprob for _, logprob in choice.top], expected[[1, 3, 4]], atol=1e-12)


def test_logprobs_only_when_asked_for():
    assert choose().logprob is None and choose().top == ()
    assert choose(want_logprob=True).top == () and choose(want_logprob=True).logprob < 0
    assert choose(n_top=1).logprob is not None
    assert [i for i, _ in choose(n_top=100).top] == [1, 3, 4, 0, 2, 5]


def test_log_softmax_of_huge_logits():
    np.testing.assert_allclose(
        log_softmax(np.float32([[1e30, 1e30], [-1e30, 5]])), [np.log([0.5, 0.5]), [-1e30, 0]]
    )


# --- penalties and bias, by llama.cpp's rules


def adjusted(ids, **options) -> np.ndarray:
    """Logits after penalties and bias, recovered from the probabilities they give at temperature 1."""
    with np.errstate(divide="ignore"):
        z = np.log(probabilities(ids=ids, **options))
    return z - z[0] + LOGITS[0]  # token 0 is never touched below


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"repeat_penalty": 2.0}, {1: 1.0, 2: -2.0, 5: -6.0}),  # positive divided, negative multiplied
        ({"repeat_penalty": 0.5}, {1: 4.0, 2: -0.5, 5: -1.5}),
        ({"presence_penalty": 0.25}, {1: 1.75, 2: -1.25, 5: -3.25}),
        ({"frequency_penalty": 0.25}, {1: 1.75, 2: -1.75, 5: -3.25}),  # token 2 stands there three times
        ({"frequency_penalty": -1.0}, {1: 3.0, 2: 2.0, 5: -2.0}),
        (
            {"repeat_penalty": 2.0, "frequency_penalty": 0.25, "presence_penalty": 1.0},
            {1: -0.25, 2: -3.75, 5: -7.25},
        ),
        ({"repeat_penalty": 2.0, "repeat_last_n": 2}, {2: -2.0, 5: -6.0}),
        ({"frequency_penalty": 1.0, "repeat_last_n": 3}, {2: -3.0, 5: -4.0}),
        ({"repeat_penalty": 2.0, "repeat_last_n": 0}, {}),
        ({"repeat_penalty": 2.0, "repeat_last_n": -1}, {1: 1.0, 2: -2.0, 5: -6.0}),
        ({"repeat_last_n": 3}, {}),
        ({"logit_bias": {1: 1.5, 5: -2}}, {1: 3.5, 5: -5.0}),
        ({"logit_bias": ((5, -2), (1, 1.5)), "repeat_penalty": 2.0}, {1: 2.5, 2: -2.0, 5: -8.0}),
        ({"logit_bias": {1: -np.inf}}, {1: -np.inf}),
    ],
    ids=str,
)
def test_penalties_and_bias(options, changes):
    expected = LOGITS.astype(np.float64)
    expected[list(changes)] = list(changes.values())
    np.testing.assert_allclose(adjusted([1, 2, 2, 5, 2], **options), expected, atol=1e-12)


def test_minus_one_looks_at_all_ids_and_64_at_the_last_64():
    ids = [1] + [2] * 64
    assert choose(ids=ids, presence_penalty=1.0).id == 1
    assert choose(ids=ids, presence_penalty=1.0, repeat_last_n=-1).id == 3


# --- processors


def test_processors_run_in_order_after_bias_and_before_truncation():
    seen = []

    def halve(z, ids):
        seen.append((z.copy(), list(ids)))
        z *= 0.5  # in place is allowed
        return z

    def favour_5(z, ids):
        seen.append((z.copy(), list(ids)))
        return np.where(np.arange(6) == 5, np.float32(9), z.astype(np.float32))

    logits = LOGITS.copy()
    options = {"temperature": 1.0, "top_k": 1, "logit_bias": {0: 1.0}, "processors": [halve, favour_5]}
    assert choose(logits, ids=[4, 2], **options).id == 5
    biased = LOGITS + np.eye(6)[0]
    np.testing.assert_array_equal(seen[0][0], biased)
    np.testing.assert_array_equal(seen[1][0], biased / 2)
    assert seen[0][1] == seen[1][1] == [4, 2]
    np.testing.assert_array_equal(logits, LOGITS)  # the model's own logits stay as they were


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "processors: bad returned NoneType, not logits (6,)"),
        (np.zeros(5), "processors: bad returned float64 (5,), not logits (6,)"),
        (np.zeros((1, 6)), "processors: bad returned float64 (1, 6), not logits (6,)"),
        (np.zeros(6, complex), "processors: bad returned complex128 (6,), not logits (6,)"),
        ([0.0] * 6, "processors: bad returned list, not logits (6,)"),
    ],
    ids=["nothing", "too short", "one more axis", "complex", "a list"],
)
def test_processors_that_break_their_contract(result, message):
    def bad(z, ids):
        return result

    with pytest.raises(ConfigError) as error:
        choose(processors=(bad,))
    assert str(error.value) == message


# --- truncation


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 6}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 99}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.37}, [1]),  # the probabilities are .378 .378 .139 .084 .019 .003
        ({"top_p": 0.40}, [1, 3]),
        ({"top_p": 0.78}, [1, 3, 4]),
        ({"top_p": 0.999999}, [0, 1, 2, 3, 4, 5]),
        ({"min_p": 1.0}, [1, 3]),
        ({"min_p": 0.36}, [1, 3, 4]),  # e ** -1 = .368
        ({"min_p": 0.37}, [1, 3]),
        ({"top_k": 3, "top_p": 0.45}, [1, 3]),  # of the three, token 1 alone has .422
        ({"top_k": 3, "top_p": 0.43}, [1, 3]),
        ({"top_k": 3, "top_p": 0.42}, [1]),
        ({"top_k": 3, "min_p": 0.1}, [1, 3, 4]),
        ({"temperature": 100.0, "top_p": 0.40}, [1, 3]),  # temperature comes last
        ({"temperature": 0.01, "min_p": 0.36}, [1, 3, 4]),
    ],
    ids=str,
)
def test_who_is_left(options, kept):
    candidates = Sampler(Sampling(**{"temperature": 1.0} | options), 0).distribution(LOGITS, ())[0]
    assert candidates.tolist() == kept


def test_a_nucleus_beyond_the_first_guess_is_found():
    logits = np.random.default_rng(3).normal(size=9000)
    order = np.argsort(-logits.astype(np.float32), kind="stable")
    p = np.exp(log_softmax(logits.astype(np.float32)))
    for top_p in (0.01, 0.5, 0.9, 0.9999):
        kept = np.flatnonzero(probabilities(logits, top_p=top_p))
        n = np.searchsorted(np.cumsum(p[order]), top_p) + 1
        np.testing.assert_array_equal(kept, np.sort(order[:n]))


@given(
    logits=arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32)),
    temperature=st.floats(0.05, 10),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.001, 1),
    min_p=st.floats(0, 1),
    step=st.integers(0, 10**6),
    data=st.data(),
)
def test_invariants(logits, temperature, top_k, top_p, min_p, step, data):
    ids = data.draw(st.lists(st.integers(0, logits.size - 1), max_size=10))
    forbidden = data.draw(st.sets(st.integers(0, logits.size - 1), max_size=logits.size - 1))
    sampling = Sampling(temperature, top_k, top_p, min_p, 1.2, logit_bias=dict.fromkeys(forbidden, -np.inf))
    sampler = Sampler(sampling, 3, want_logprob=True)
    candidates, p = sampler.distribution(logits, ids)
    assert p.sum() == pytest.approx(1)
    assert np.all(np.diff(candidates) > 0)
    assert not top_k or candidates.size <= top_k
    greedy = Sampler(Sampling(repeat_penalty=1.2, logit_bias=sampling.logit_bias), 0)(logits, ids, 0).id
    assert greedy in candidates  # nothing ever excludes the most probable token
    assert p[candidates == greedy] == p.max()
    choice = sampler(logits, ids, step)
    assert choice.id in candidates[p > 0] and choice.id not in forbidden
    assert choice.logprob == pytest.approx(log_softmax(logits)[choice.id])
    assert sampler(logits, ids, step) == choice


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy_among_equals(temperature):
    chosen = {choose(step=step, temperature=temperature).id for step in range(40)}
    assert chosen == {1, 3}


# --- draws

CRITICAL = {
    4: 18.47,
    5: 20.52,
    15: 37.70,
}  # chi-square exceeded with probability 0.001, by degrees of freedom


def chi_square(chosen, p) -> float:
    expected = np.asarray(p) * len(chosen)
    return float(
        np.sum((np.bincount(chosen, minlength=len(p)) - expected)[expected > 0] ** 2 / expected[expected > 0])
    )


@pytest.mark.parametrize("options", [{}, {"temperature": 2.5}, {"temperature": 0.7, "top_k": 5}], ids=str)
def test_draws_over_steps_follow_the_distribution(options):
    sampler = Sampler(Sampling(**{"temperature": 1.0} | options), 11)
    chosen = [sampler(LOGITS, (), step).id for step in range(6000)]
    p = probabilities(**options)
    assert chi_square(chosen, p) < CRITICAL[np.count_nonzero(p) - 1]
    assert set(chosen) == set(np.flatnonzero(p))


def test_draws_over_seeds_follow_the_distribution():
    chosen = [choose(temperature=1.0, seed=seed).id for seed in range(6000)]
    assert chi_square(chosen, probabilities()) < CRITICAL[5]


def test_one_draw_tells_nothing_of_the_next():
    sampler = Sampler(Sampling(temperature=1.0), 5)
    even = np.zeros(4, np.float32)
    chosen = np.array([sampler(even, (), step).id for step in range(8001)])
    assert chi_square(4 * chosen[:-1] + chosen[1:], np.full(16, 1 / 16)) < CRITICAL[15]


def philox(counter: int, key: tuple[int, int]) -> int:
    """The first word of a Philox 4x64 block of ten rounds, from its publication (Salmon et al. 2011)."""
    word, (k0, k1) = 2**64 - 1, key
    c0, c1, c2, c3 = counter, 0, 0, 0
    for _ in range(10):
        m0, m1 = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = (m1 >> 64) ^ c1 ^ k0, m1 & word, (m0 >> 64) ^ c3 ^ k1, m0 & word
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & word, (k1 + 0xBB67AE8584CAA73B) & word
    return c0


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_the_stream_is_philox_keyed_by_seed_and_counted_by_step(seed):
    """So a replay needs no library's generator; NumPy steps its counter before the first block."""
    fine = np.zeros(4096, np.float32)
    for step in (0, 1, 500, 2**40):
        u = philox(step + 1, (seed, STREAM)) / 2**64
        assert choose(fine, seed=seed, step=step, temperature=1.0).id == int(u * 4096)


def test_philox_of_this_file_by_its_published_vector():
    assert philox(0, (0, 0)) == 0x16554D9ECA36314C


def test_a_choice_depends_on_seed_step_and_logits_alone():
    sampler = Sampler(Sampling(temperature=1.0), 42)
    forwards = [sampler(LOGITS, (), step).id for step in range(50)]
    backwards = [Sampler(Sampling(temperature=1.0), 42)(LOGITS, (), step).id for step in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert forwards != [sampler(LOGITS, (), step).id for step in range(50, 100)]
    assert forwards != [Sampler(Sampling(temperature=1.0), 43)(LOGITS, (), step).id for step in range(50)]


# --- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "--temp: -0.1 is not a finite number >= 0 (0 is greedy)"),
        ({"temperature": float("nan")}, "--temp: nan is not a finite number >= 0 (0 is greedy)"),
        ({"temperature": float("inf")}, "--temp: inf is not a finite number >= 0 (0 is greedy)"),
        ({"temperature": "1"}, "--temp: '1' is not a finite number >= 0 (0 is greedy)"),
        ({"temperature": None}, "--temp: None is not a finite number >= 0 (0 is greedy)"),
        ({"temperature": True}, "--temp: True is not a finite number >= 0 (0 is greedy)"),
        ({"temperature": -(10**400)}, f"--temp: {-(10**400)} is not a finite number >= 0 (0 is greedy)"),
        ({"top_k": -1}, "--top-k: -1 is not an integer >= 0 (0 is off)"),
        ({"top_k": 1.5}, "--top-k: 1.5 is not an integer >= 0 (0 is off)"),
        ({"top_k": False}, "--top-k: False is not an integer >= 0 (0 is off)"),
        ({"top_p": 1.5}, "--top-p: 1.5 is not in (0, 1]"),
        ({"top_p": 0}, "--top-p: 0 is not in (0, 1]"),
        ({"top_p": float("nan")}, "--top-p: nan is not in (0, 1]"),
        ({"min_p": -0.01}, "--min-p: -0.01 is not in [0, 1]"),
        ({"min_p": 1.01}, "--min-p: 1.01 is not in [0, 1]"),
        ({"repeat_penalty": 0.0}, "--repeat-penalty: 0.0 is not a finite number > 0 (1 is off)"),
        ({"repeat_penalty": -1}, "--repeat-penalty: -1 is not a finite number > 0 (1 is off)"),
        ({"repeat_penalty": float("inf")}, "--repeat-penalty: inf is not a finite number > 0 (1 is off)"),
        ({"repeat_last_n": -2}, "--repeat-last-n: -2 is not an integer >= -1 (0: off, -1: all)"),
        ({"presence_penalty": float("nan")}, "--presence-penalty: nan is not a finite number"),
        ({"frequency_penalty": float("-inf")}, "--frequency-penalty: -inf is not a finite number"),
        ({"frequency_penalty": [1]}, "--frequency-penalty: [1] is not a finite number"),
        ({"seed": -1}, "--seed: -1 is not an integer in [0, 2**64)"),
        ({"seed": 2**64}, "--seed: 18446744073709551616 is not an integer in [0, 2**64)"),
        ({"seed": 1.0}, "--seed: 1.0 is not an integer in [0, 2**64)"),
        ({"logit_bias": 5}, "--logit-bias: 5 does not map ids to numbers"),
        ({"logit_bias": None}, "--logit-bias: None does not map ids to numbers"),
        ({"logit_bias": "12+3"}, "--logit-bias: '12+3' does not map ids to numbers"),
        ({"logit_bias": ((1, 2, 3),)}, "--logit-bias: ((1, 2, 3),) does not map ids to numbers"),
        ({"logit_bias": {2**31: 1.0}}, "--logit-bias: 2147483648 is not a token id"),
        ({"logit_bias": {-1: 1.0}}, "--logit-bias: -1 is not a token id"),
        ({"logit_bias": {"7": 1.0}}, "--logit-bias: '7' is not a token id"),
        ({"logit_bias": {1.0: 1.0}}, "--logit-bias: 1.0 is not a token id"),
        ({"logit_bias": {7: float("nan")}}, "--logit-bias: nan of token 7 is not a number below inf"),
        ({"logit_bias": {7: float("inf")}}, "--logit-bias: inf of token 7 is not a number below inf"),
        ({"logit_bias": {7: "1"}}, "--logit-bias: '1' of token 7 is not a number below inf"),
        ({"logit_bias": ((7, 1.0), (7, 2.0))}, "--logit-bias: token 7 twice"),
        ({"processors": max}, "processors: not a tuple of functions (logits, ids) -> logits"),
        ({"processors": (max, 3)}, "processors: not a tuple of functions (logits, ids) -> logits"),
    ],
    ids=str,
)
def test_refused(options, message):
    with pytest.raises(ConfigError) as error:
        Sampling(**options)
    assert str(error.value) == message
    assert error.value.field == next(iter(options))


@pytest.mark.parametrize("n_top", [-1, 1.5, True, None])
def test_refused_number_of_logprobs(n_top):
    with pytest.raises(ConfigError, match=f"--logprobs: {n_top} is not an integer >= 0"):
        Sampler(Sampling(), 0, n_top=n_top)


def test_bias_beyond_the_vocabulary():
    with pytest.raises(ConfigError, match="--logit-bias: token 6 is not below 6"):
        choose(logit_bias={1: 1.0, 6: 1.0})


def test_edges_are_accepted_and_plain_numbers_are_kept():
    sampling = Sampling(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        top_p=1,
        min_p=1,
        seed=2**64 - 1,
        logit_bias={np.int32(9): 1, 2: -np.inf},
    )
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 1.0)
    assert [type(x) for x in (sampling.temperature, sampling.top_k, sampling.top_p)] == [float, int, float]
    assert sampling.logit_bias == ((2, -np.inf), (9, 1.0))
    assert hash(sampling) == hash(Sampling(**vars(sampling))) and sampling == Sampling(**vars(sampling))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"top_k": 1, "temperature": 1.0}], ids=str)
def test_never_a_token_from_logits_that_are_not_finite(bad, options):
    logits = LOGITS.copy()
    logits[[2, 4]] = bad
    with pytest.raises(
        NumericalError, match="2 of 6 logits are NaN or infinite, the first that of token 2: "
    ):
        choose(logits, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": dict.fromkeys(range(6), -np.inf)}, "no token is left to choose from"),
        ({"processors": (lambda z, ids: np.full(6, -np.inf),)}, "no token is left to choose from"),
        ({"processors": (lambda z, ids: z * np.nan,)}, "a logit is NaN or [+]infinity after"),
        (
            {"processors": (lambda z, ids: np.where(z == 2, np.nan, z),)},
            "a logit is NaN or [+]infinity after",
        ),
        (
            {"processors": (lambda z, ids: np.where(z == 2, np.inf, z),)},
            "a logit is NaN or [+]infinity after",
        ),
        ({"repeat_penalty": 1e-310}, "a logit is NaN or [+]infinity after"),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_never_a_token_from_what_options_made_of_the_logits(options, message, temperature):
    with pytest.raises(NumericalError, match=message):
        choose(ids=[0, 1], temperature=temperature, **options)
