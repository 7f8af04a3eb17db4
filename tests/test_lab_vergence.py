"""Hidden states against Hugging Face and the naive twin; the vergence measurement; its files and its page."""

import csv
import json

import naive
import numpy as np
import pytest
import tiny
from engines import add_tokenizer, runtime, session
from scipy.spatial.distance import cosine

import tinydrug
from tinydrug.cli import main
from tinydrug.engine.runtime import Part
from tinydrug.errors import ConfigError, PromptError
from tinydrug.lab import lanes
from tinydrug.lab.vergence import Plan, one_minus_cosine, vergence
from tinydrug.lab.vergence_page import vergence_page

PROMPT = "Tell me of the sea"
NAIVE = 1e-5  # float32 against float64, on vectors of length sqrt(D); measured 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return add_tokenizer(tiny.build("llama-gqa", tmp_path_factory.mktemp("vergence") / "gqa"))


@pytest.fixture(scope="module")
def engine(folder):
    with tinydrug.load(folder, ctx=128, cache="f32", chunk=64) as engine:
        yield engine


# --- hidden states


@pytest.mark.parametrize("name", ["llama-gqa", "llama-bias", "mistral-window"])
def test_hidden_states_are_those_of_the_naive_twin(name, tiny_model):
    """The twin with fewer layers, no head and a final norm without weights: x / rms(x) after each layer."""
    config, w = tiny.SPECS[name], naive.canonical(tiny.weights(name))
    ids, D = tiny.ids(name), config["hidden_size"]
    w = w | {"norm.weight": np.ones(D), "lm_head.weight": np.eye(D)}
    model = runtime(tiny_model(name))
    _, states = model.hidden([Part(session(model), ids.tolist(), False, len(ids))])
    assert states.shape == (config["num_hidden_layers"], len(ids), D) and states.dtype == np.float32
    for layer, state in enumerate(states):
        cut = config | {"num_hidden_layers": layer + 1, "tie_word_embeddings": False}
        rms = np.sqrt((state.astype("f8") ** 2).mean(-1, keepdims=True) + config["rms_norm_eps"])
        np.testing.assert_allclose(state / rms, naive.llama(cut, w, ids), rtol=0, atol=NAIVE)
    model.close()


@pytest.mark.parametrize("name", ["llama-gqa", "llama-head12", "gpt2"])
def test_hidden_states_are_those_of_hugging_face(name, tiny_model):
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model(name), dtype=torch.float32
    ).eval()
    layers = reference.transformer.h if name == "gpt2" else reference.model.layers
    kept = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _, inputs, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
    ids = tiny.ids(name)
    with torch.no_grad():
        outputs = reference(torch.tensor(ids)[None], output_hidden_states=True)
    model = runtime(tiny_model(name))
    _, states = model.hidden([Part(session(model), ids.tolist(), False, len(ids))])
    for state, expected in zip(states, kept, strict=True):
        np.testing.assert_allclose(state, expected.numpy().reshape(state.shape), rtol=0, atol=1e-5)
    for state, expected in zip(states[:-1], outputs.hidden_states[1:-1], strict=True):  # the last is normed
        np.testing.assert_allclose(state, expected[0].numpy(), rtol=0, atol=1e-5)
    model.close()


def test_looking_changes_no_bit(tiny_model):
    """With and without hidden states, in one piece, token by token, beside other sequences."""
    model, ids, drug = runtime(tiny_model("llama-gqa")), tiny.ids("llama-gqa").tolist(), "K:0.5,A:0.4"
    plain = model.step([Part(session(model, drug, 3), ids, True, len(ids))])
    looked, states = model.hidden([Part(session(model, drug, 3), ids, True, len(ids))])
    np.testing.assert_array_equal(looked, plain)
    one, other = session(model, drug, 3), session(model)
    for t, token in enumerate(ids):
        logits, some = model.hidden([Part(other, [token], False, 0), Part(one, [token], True, 1)])
        np.testing.assert_array_equal(logits[0], plain[t])
        np.testing.assert_array_equal(some[:, 0], states[:, t])
    assert len(model.hidden([Part(other, [5], False, 0)])[0]) == 0
    model.close()


def test_engine_gives_hidden_states(engine):
    ids = engine.encode(PROMPT * 5)
    states = engine.hidden(ids, "H:0.3", 7)
    assert states.shape == (3, len(ids), 48) and len(ids) > engine.runtime.chunk
    assert (states[:, 6:] != engine.hidden(ids)[:, 6:]).any() and (
        states[:, :6] == engine.hidden(ids)[:, :6]
    ).all()


# --- the measurement


def test_one_minus_cosine_is_scipys():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 40)).astype(np.float32)
    expected = [cosine(x.astype("f8"), y.astype("f8")) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(one_minus_cosine(a, b), expected, rtol=1e-12)
    assert (one_minus_cosine(a, a) == 0).all()


PLAN = Plan(sites=("V", "pK"), doses=(0.3, 0.9), width=1, seeds=(4, 5))


@pytest.fixture(scope="module")
def found(engine):
    return vergence(engine, PROMPT, PLAN)


def test_values_are_those_of_separate_runs(engine, found):
    ids = engine.encode(PROMPT)
    sober = engine.hidden(ids)[:, -1]
    for s, site in enumerate(PLAN.sites):
        for w, (first, last) in enumerate(found.windows):
            runs = [engine.hidden(ids, f"{site}:0.9@{first}-{last}", seed)[:, -1] for seed in PLAN.seeds]
            apart = np.array(
                [
                    [cosine(a.astype("f8"), b.astype("f8")) for a, b in zip(sober, x, strict=True)]
                    for x in runs
                ]
            )
            np.testing.assert_allclose(found.divergence[s, w, 2], apart.mean(0), atol=1e-12)
            np.testing.assert_allclose(found.error[s, w, 2], apart.std(0, ddof=1) / 2**0.5, atol=1e-9)


def test_axes_are_right(found):
    """Theta 0 is there and moves nothing; nothing moves before the window; every axis has its values."""
    assert found.divergence.shape == (2, 3, 3, 3) and found.doses.tolist() == [0, 0.3, 0.9]
    assert found.windows.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert (found.divergence[:, :, 0] == 0).all() and (found.error[:, :, 0] == 0).all()
    for w, (first, _) in enumerate(found.windows):
        assert (found.divergence[:, w, 1:, :first] == 0).all() and (
            found.divergence[:, w, 1:, first:] > 0
        ).all()
    assert (found.kl[:, :, 1:] > 0).all() and (found.kl[:, :, 0] == 0).all() and found.complete


def test_tokens_are_the_likeliest(engine, found):
    logits = engine.forward(engine.encode(PROMPT))[-1].astype("f8")
    p = np.exp(logits) / np.exp(logits).sum()
    assert found.tokens.tolist() == np.argsort(-p)[:10].tolist()
    np.testing.assert_allclose(found.sober, p[found.tokens], rtol=1e-6)
    np.testing.assert_allclose(found.drugged[:, :, 0], np.broadcast_to(found.sober, (2, 3, 10)), rtol=1e-12)


def test_only_the_last_position(engine):
    plan = Plan(sites=("V",), doses=(0.9,), width=3, prompt="last", seeds=(4,))
    one = engine.session("V:0.9", 4)
    ids = engine.encode(PROMPT)
    one.feed(ids[:-1], outputs=0)
    _, states = engine.runtime.hidden([Part(one, ids[-1:], True, 1)])
    sober = engine.hidden(ids)[:, -1]
    got = vergence(engine, PROMPT, plan)
    np.testing.assert_array_equal(got.divergence[0, 0, 1], one_minus_cosine(sober, states[:, 0]))
    assert np.isnan(got.error[0, 0, 1]).all()  # one seed has no spread


def test_batches_change_no_bit(engine, found, monkeypatch):
    monkeypatch.setattr(lanes, "MOST", 1)
    np.testing.assert_array_equal(vergence(engine, PROMPT, PLAN).divergence, found.divergence)


def test_stacked_windows(engine):
    assert Plan(stack=True).windows(3) == [(0, 0), (0, 1), (0, 2)]
    assert Plan(width=2).windows(4) == [(0, 1), (1, 2), (2, 3)]


def test_ctrl_c_keeps_what_is_done(engine, monkeypatch):
    monkeypatch.setattr(lanes, "MOST", 4)

    def progress(done, total, left):
        if done >= 8:
            raise KeyboardInterrupt

    part = vergence(engine, PROMPT, PLAN, progress)
    assert not part.complete and not part.record["complete"]
    assert np.isfinite(part.divergence[0, 0]).all() and np.isnan(part.divergence[1, 2, 2]).all()
    vergence_page(part)


BAD = [
    (dict(width=4), ConfigError, "a window of 4 layers does not fit this model of 3"),
    (dict(width=0), ConfigError, "--width: 0 is not a whole number of at least 1"),
    (dict(width=2.5), ConfigError, "--width: 2.5 is not a whole number"),
    (dict(sites=()), ConfigError, "--sites: there must be at least one"),
    (dict(doses=0.1), ConfigError, "--doses: expected a list, not 0.1"),
    (dict(doses=("a",)), tinydrug.DrugError, "theta must be a finite number, not 'a'"),
    (dict(seeds=3), ConfigError, "--seeds: expected a list of whole numbers"),
    (dict(seeds=()), ConfigError, "at least one"),
    (dict(prompt="none"), ConfigError, "is not all or last"),
    (dict(sites=("X",)), tinydrug.DrugError, "there is no site 'X'"),
    (dict(doses=(-1.0,)), tinydrug.DrugError, "at least 0"),
    (dict(sink=99), PromptError, "noise leaves the first 99 alone"),
]


@pytest.mark.parametrize(("fields", "kind", "message"), BAD, ids=[str(fields) for fields, _, _ in BAD])
def test_bad_plans(engine, fields, kind, message):
    with pytest.raises(kind, match=message):
        vergence(engine, PROMPT, Plan(**fields))


# --- the command


def test_command_writes_everything(folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--sites", "V,A", "--doses", "0.3,30deg", "--width", "1", "--seeds", "1-2", "-o", str(out)]
    assert main(["lab", "vergence", "-m", str(folder), "-p", PROMPT, *words]) == 0
    names = {path.name for path in out.iterdir()}
    pictures = {"vergence-sites.png", "vergence-V.png", "vergence-A.png"}
    assert names == {"vergence.npz", "vergence.csv", "vergence.json", "vergence.html"} | pictures
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    with np.load(out / "vergence.npz") as arrays:
        z, about = arrays["divergence"], json.loads(str(arrays["record"]))
        axes = [len(arrays[name]) for name in ("sites", "windows", "doses", "layers")]
    assert z.shape == tuple(axes) == (2, 3, 3, 3)
    assert about["settings"]["prompt_text"] == PROMPT and about["model"]["weights"] and about["made_by"]
    with open(out / "vergence.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == z.size
    assert [float(row["divergence"]) for row in rows] == z.ravel().tolist()
    data = json.loads((out / "vergence.json").read_text())
    assert data["divergence"] == z.tolist() and data["record"]["settings"] == about["settings"]
    assert capsys.readouterr().out == ""


def test_data_needs_no_pictures(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tinydrug.lab.page.find_spec", lambda name: None)
    words = ["lab", "vergence", "-m", str(folder), "-p", PROMPT, "--sites", "V", "--doses", "0.3", "-o"]
    assert main([*words, str(tmp_path / "a"), "--width", "1", "--seeds", "1", "--data-only"]) == 0
    assert len(list((tmp_path / "a").iterdir())) == 3
    capsys.readouterr()
    assert main([*words, str(tmp_path / "b")]) == 2
    assert "matplotlib is not installed: pip install 'tinydrug[lab]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", PROMPT, "--width", "9"], "a window of 9 layers does not fit this model of 3"),
        (["-p", "Hi"], "noise leaves the first 6 alone"),
        (["-p", " "], "the text is empty"),
        (["-f", "/no/such"], "--file: /no/such: No such file"),
        (["-p", PROMPT, "--sites", "Z"], "there is no site 'Z'"),
        (["-p", PROMPT, "--doses", "a"], "theta 'a' is not a number"),
        (["-p", PROMPT, "--doses", "0.1,kl=2"], "is not a list of angles"),
        (["-p", PROMPT, "--seeds", "x"], "is not a whole number"),
        (["-p", PROMPT, "--seeds", f"1,{2**63}"], "of at most 9223372036854775807"),
        (["-p", PROMPT, "--stack", "--width", "2"], "--width: the windows of --stack grow"),
        (["-p", PROMPT, "-f", "x"], "give --prompt or --file, not both"),
        (["-p", PROMPT, "-o", ""], "the name of the folder for results is empty"),
    ],
)
def test_bad_words_are_one_line(folder, tmp_path, words, message, capsys):
    assert main(["lab", "vergence", "-m", str(folder), "-o", str(tmp_path), "--data-only", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]


def test_experiments_have_help(capsys):
    assert main(["lab"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    for name in listed:
        assert main(["lab", name, "--help"]) == 0
        assert f"tinydrug lab {name}" in capsys.readouterr().out
    assert main(["lab", "vergense"]) == 2
    assert "only vergence" in capsys.readouterr().err


def test_real_model_heals(smollm2):
    """What DRµGS' surfaces claim: a push of keys at early layers has mostly gone by the end."""
    with tinydrug.load(smollm2, ctx=256) as engine:
        plan = Plan(sites=("K",), doses=(0.8,), seeds=(1, 2))
        text = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid."
        got = vergence(engine, text, plan)
    z = got.divergence[0]
    assert (z[:, 0] == 0).all() and np.isfinite(z).all()
    assert all((z[w, 1, :w] == 0).all() and z[w, 1, w] > 0 for w in range(28))
    early = z[:4, 1]  # (windows, layers)
    assert (early[:, -1] < early.max(1) / 2).all()
