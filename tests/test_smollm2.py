"""The real default model, SmolLM2-135M-Instruct: against transformers on the same dequantised weights."""

import naive
import numpy as np
import pytest
from engines import feed, logits, runtime, session

from tinydrug.engine.sampling import log_softmax

LOGITS = 2e-3  # asked for by the project; float32 on both sides, logits up to 42: measured 7e-5
PERPLEXITY = 5e-5  # relative, four digits; measured 7e-8
# With its own 4-bit blocks activations are rounded to int8, a scale for each 32 of them, as in llama.cpp;
# the weights are the same. On 200 tokens of a real text:
KL = 0.01  # nats, mean over positions of KL(f32 || native): measured 0.0032
TOP1 = 0.93  # share of positions whose likeliest token is the same: measured 0.96
# Relative change over 2,000 tokens: measured 0.0037, with a standard error of 0.0017 (of 700 tokens 0.003).
NATIVE_PERPLEXITY = 0.005


@pytest.fixture(scope="module")
def exact(smollm2):
    """f32 weights and cache."""
    model = runtime(smollm2, quant="f32", n_ctx=2048, chunk=512)
    yield model
    model.close()


@pytest.fixture(scope="module")
def native(smollm2):
    """As the file has it."""
    model = runtime(smollm2, n_ctx=2048, chunk=512, cell="f16")
    yield model
    model.close()


@pytest.fixture(scope="module")
def reference(golden):
    arrays = golden("smollm2")
    return arrays | {"ids": arrays["ids"].astype(np.int64), "top_ids": arrays["top_ids"].astype(np.int64)}


@pytest.fixture(scope="module")
def first_200(exact, reference):
    return logits(exact, reference["ids"][:200])


def nll(model, ids) -> np.ndarray:
    """ids (T,) -> negative log-likelihoods (T - 1,) float64, a few rows of logits at a time."""
    sequence, rows = session(model), []
    for at in range(0, len(ids), 250):
        piece = log_softmax(feed(sequence, ids[at : at + 250]))
        targets = ids[at + 1 : at + 251]
        rows.append(-piece[np.arange(len(targets)), targets])
    return np.concatenate(rows)


def test_shape(exact, native):
    c = exact.config
    assert (c.n_layers, c.hidden_size, c.n_heads, c.n_kv_heads, c.head_dim) == (30, 576, 9, 3, 64)
    assert (c.vocab_size, c.intermediate_size, c.tied) == (49152, 1536, True)
    assert native.weights["0.q_proj"].format == "q4_1" and exact.weights["0.q_proj"].format == "f32"
    assert native.weights.nbytes < 100e6 < 500e6 < exact.weights.nbytes


def test_logits_over_200_tokens(first_200, reference):
    np.testing.assert_allclose(first_200[reference["positions"]], reference["logits"], rtol=0, atol=LOGITS)
    top = np.take_along_axis(first_200, reference["top_ids"], -1)
    np.testing.assert_allclose(top, reference["top_logits"], rtol=0, atol=LOGITS)
    np.testing.assert_array_equal(first_200.argmax(-1), reference["top_ids"][:, 0])
    wide = first_200.astype(np.float64)
    peak = wide.max(-1)
    logsumexp = peak + np.log(np.exp(wide - peak[:, None]).sum(-1))
    np.testing.assert_allclose(logsumexp, reference["logsumexp"], rtol=0, atol=LOGITS)


def test_perplexity_of_2000_tokens(exact, reference):
    found = nll(exact, reference["ids"])
    assert np.exp(found.mean()) == pytest.approx(float(reference["perplexity"]), rel=PERPLEXITY)
    np.testing.assert_allclose(found, reference["nll"], rtol=0, atol=2 * LOGITS)


def test_its_own_format(native, first_200, reference):
    found = logits(native, reference["ids"][:200])
    p, q = (naive.softmax(x.astype(np.float64)) for x in (first_200, found))
    assert (p * np.log(p / q)).sum(-1).mean() < KL
    assert (found.argmax(-1) == first_200.argmax(-1)).mean() > TOP1


def test_perplexity_in_its_own_format(native, reference):
    found = nll(native, reference["ids"])
    assert np.exp(found.mean()) == pytest.approx(float(reference["perplexity"]), rel=NATIVE_PERPLEXITY)


def last_rows(model, ids, first: int, piece: int, drug=None) -> np.ndarray:
    """The last 5 rows of logits: ids[:first] fed at once and sober, the rest in pieces, under the drug."""
    sequence, rows = session(model, drug, 5), []
    if first:
        sequence.feed(ids[:first])
    for at in range(first, len(ids), piece):
        part = ids[at : at + piece]
        rows.append(sequence.feed(part, "none" if drug is None else "all", min(5, len(part))))
    return np.concatenate(rows)[-5:]


@pytest.mark.parametrize("drug", [None, "V:0.3,K:0.3,H:0.05,A:0.2"])
def test_bits_do_not_depend_on_pieces_or_threads(drug, native, smollm2, reference):
    ids = reference["ids"][:300].tolist()
    first = 0 if drug is None else 270
    whole = last_rows(native, ids, first, 300, drug)
    for before, piece in ((first, 64), (first, 7), (290, 1)) if drug is None else ((first, 1), (first, 7)):
        np.testing.assert_array_equal(last_rows(native, ids, before, piece, drug), whole)
    alone = runtime(smollm2, threads=1, n_ctx=2048, chunk=512, cell="f16")
    np.testing.assert_array_equal(last_rows(alone, ids, first, 300, drug), whole)
    alone.close()
