"""Drift-diffusion GPT-2, and its terms on any architecture, against float64 that replays the draws."""

import logging
import math
from functools import partial

import naive
import numpy as np
import pytest
import tiny
from engines import add_tokenizer, cached, edited, feed, logits, runtime, session
from safetensors.numpy import load_file
from test_srf import SRF, quadratic

import tinydrug
from tinydrug.cli import inputs, options
from tinydrug.engine.draws import diffusion_draw, draw
from tinydrug.engine.runtime import Part
from tinydrug.engine.session import Session
from tinydrug.errors import DrugError, TinydrugError
from tinydrug.hub.table import Repo, read_table
from tinydrug.models import dd_gpt2
from tinydrug.noise import SOBER, Schedule, Term, load_schedule, save_schedule

REPLAY = 1e-4  # asked for by the project; float32 against float64
FOLDED = 1e-5  # asked for by the project: logits of a drift folded into c_proj in float32 and not
SIGMAS = 4.5  # of a mean of independent draws: passed by chance but for 1 in 150,000
KOLMOGOROV = 2.2  # sqrt(n) times the largest gap between two distributions: exceeded once in 8,000 tests
SEED = 2**64 - 3
H, D_HEAD, LAYERS = 4, 10, 2  # of the tiny checkpoint: heads of ten, a width that is padded

EACH, ONE = (H, D_HEAD), (H, 1, 1)
GATE, FACTOR = {"drift_param": EACH}, {"drift_param": ONE}
BASELINE, STD = {"baseline": EACH}, {"diffusion_param": EACH}
LAYOUTS = {  # name: shapes of the parameters of a layer, and the flags: drift, diffusion, baseline
    "gate with baseline": (GATE | BASELINE, (True, False, True)),
    "gate": (GATE, (True, False, False)),
    "factor": (FACTOR, (True, False, True)),
    "diffusion": (STD, (False, True, True)),
    "gate, baseline and diffusion": (GATE | BASELINE | STD, (True, True, True)),
    "factor and diffusion": (FACTOR | STD, (True, True, False)),
    "neither": ({}, (False, False, False)),
}
FLAGS = ("apply_drift", "apply_diffusion", "baseline_each_head")


def parameters(shapes: dict) -> dict[str, np.ndarray]:
    """The parameters of both layers by their names in a file, spread as the code initialises them."""
    spread = {"drift_param": 1.0, "baseline": 0.5, "diffusion_param": 0.3}
    return {
        f"transformer.h.{i}.attn.{name}": spread[name] * tiny.uniform(f"dd/{i}/{name}", shape)
        for i in range(LAYERS)
        for name, shape in shapes.items()
    }


def prefixed(tensors: dict) -> dict:
    return {f"transformer.{name}": x for name, x in tensors.items() if not name.endswith(".attn.bias")}


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """checkpoint(shapes, flags, extra tensors, **fields) -> folder of a tiny dd-gpt2."""

    def make(shapes, flags=(True, True, True), more=(), kind="<f4", **fields):
        def change(tensors):
            tensors = prefixed(tensors) | parameters(shapes) | dict(more)
            return {name: x.astype(kind) for name, x in tensors.items()}

        said = {flag: value for flag, value in zip(FLAGS, flags, strict=True) if value is not None}
        known = {"model_type": "dd-gpt2", "architectures": ["DDGPT2LMHeadModel"]}
        return edited(tiny_model("gpt2"), tmp_path_factory.mktemp("dd"), change, **(known | said | fields))

    return make


@pytest.fixture(scope="module")
def run(checkpoint, tiny_model):
    """run(layout or name of a spec, **options) -> a runtime, built once."""
    built = {}

    def make(name, **options):
        key = (name, *sorted(options.items()))
        if key not in built:
            path = checkpoint(*LAYOUTS[name]) if name in LAYOUTS else tiny_model(name)
            built[key] = runtime(path, **options)
        return built[key]

    yield make
    for each in built.values():
        each.close()


IDS = tiny.ids("gpt2")[:24].tolist()


# --- the formulae


def drifted(x: np.ndarray, drift_param: np.ndarray, baseline: np.ndarray | float = 0.0) -> np.ndarray:
    """x (T, H, d) -> (T, H, d): the document's factor or the code's gate, from their definitions."""
    if drift_param.ndim == 3:
        return x + drift_param[:, 0] * x
    return x + (x - baseline) / (1 + np.exp(-drift_param))


def attended(model, drug, seed=SEED, name=None):
    """A hook for naive's forward passes: A, the model's own drift, then the schedule's terms."""
    schedule = SOBER if drug is None else Schedule.parse(drug)
    own = naive.canonical(parameters(LAYOUTS[name][0])) if name in LAYOUTS else {}
    amounts = schedule.term_table(model.config.n_layers)
    theta = schedule.table(model.config.n_layers)["theta"]

    def hook(site, layer, x, positions, query=None):
        if site != "A":
            return x
        x, awake = x.copy(), positions >= schedule.sink
        mine = {n: own[f"h.{layer}.attn.{n}"] for n in LAYOUTS.get(name, [{}])[0]}
        for t, h in np.argwhere(np.broadcast_to(awake[:, None], x.shape[:2])):
            if theta[layer, 5]:
                phi, r = draw(
                    schedule, seed, model.config, "A", layer, h, int(positions[t]), int(positions[t])
                )
                x[t, h] = naive.rotate(x[t, h], r, phi)
        std = mine.pop("diffusion_param", np.zeros(x.shape[1:]))
        x = drifted(x, **mine) if mine else x
        x[awake] *= 1 + amounts["drift"][layer]
        std = std * amounts["learned"][layer] + amounts["diffusion"][layer]
        for t, h in np.argwhere(np.broadcast_to(awake[:, None], x.shape[:2])):
            x[t, h] += std[h] * diffusion_draw(seed, model.config, layer, int(h), int(positions[t]))
        return x

    return hook


def naively(model, name: str, drug=None, ids=IDS) -> np.ndarray:
    spec = "gpt2" if name in LAYOUTS else name
    weights, hook = naive.canonical(tiny.weights(spec)), attended(model, drug, name=name)
    return naive.MODELS[tiny.SPECS[spec]["model_type"]](tiny.SPECS[spec], weights, np.array(ids), hook)


def test_published_values():
    """seeds.md section 8: the gate at a = 2, p = 0.5, with a baseline of 0.1 and without."""
    x, p = np.full((1, 1, 2), 2.0), np.full((1, 2), 0.5)
    for baseline, expected in (((), 3.2449186624), ((np.full((1, 2), 0.1),), 3.1826727293)):
        np.testing.assert_allclose(drifted(x, p, *baseline), expected, atol=1e-10)
        gain, shift = dd_gpt2.gain_and_shift(2, p, *baseline)
        np.testing.assert_allclose(gain * x - shift, expected, atol=1e-10)
        weight, bias = dd_gpt2.fold(np.eye(2), np.zeros(2), p, *baseline)
        np.testing.assert_allclose(x[0] @ weight + bias, expected, atol=1e-10)


def test_gates_at_the_ends_do_not_overflow():
    gain, _ = dd_gpt2.gain_and_shift(4, np.array([[-1e4, -30, 30, 1e4]], np.float32))
    np.testing.assert_allclose(gain, [[1, 1, 2, 2]], atol=1e-12)


# --- checkpoints


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_of_every_layout(name, run):
    """The fold equals the definition: c_proj of the drifted output, unfolded and in float64."""
    model = run(name)
    found = logits(model, IDS)
    np.testing.assert_allclose(found, naively(model, name), rtol=0, atol=FOLDED)
    np.testing.assert_array_equal(logits(model, IDS), found)
    np.testing.assert_array_equal(logits(model, IDS, piece=1), found)
    drifts = LAYOUTS[name][1][0]
    assert (np.abs(found - logits(run("gpt2"), IDS)).max() > 0.1) == drifts, (
        "a drift of this size must be seen"
    )


@pytest.mark.parametrize("kind", ["<f4", "<f2"])
@pytest.mark.parametrize("quant", ["none", "q8", "q4"])
@pytest.mark.parametrize("name", ["gate with baseline", "factor"])
def test_it_is_folded_in_float_and_then_quantised(name, quant, kind, checkpoint, tiny_model, tmp_path):
    """As a plain GPT-2 whose c_proj was folded by hand and stored as f32, whatever the quantisation."""
    folder = checkpoint(*LAYOUTS[name], kind=kind)
    given = load_file(folder / "model.safetensors")

    def by_hand(_):
        plain = {n.removeprefix("transformer."): x for n, x in given.items()}
        for i in range(LAYERS):
            own = {n: plain.pop(f"h.{i}.attn.{n}").astype("f8") for n in LAYOUTS[name][0]}
            zero, ones = np.zeros((1, *EACH)), np.ones((1, *EACH))
            shift = drifted(zero, **own)[0]  # what the drift makes of 0, and of 1 beyond that
            gain = (drifted(ones, **own)[0] - shift).reshape(-1, 1)
            w, b = plain[f"h.{i}.attn.c_proj.weight"], plain[f"h.{i}.attn.c_proj.bias"]
            plain[f"h.{i}.attn.c_proj.weight"] = (w * gain).astype("<f4")
            plain[f"h.{i}.attn.c_proj.bias"] = (b + shift.reshape(-1) @ w).astype("<f4")
        return plain

    models = [runtime(path, quant) for path in (folder, edited(tiny_model("gpt2"), tmp_path, by_hand))]
    one, other = (logits(model, IDS) for model in models)
    np.testing.assert_allclose(one, other, rtol=0, atol=FOLDED)
    for model in models:
        model.close()


TOLD = [("neither", (None, None, None))]
TOLD += [
    (name, flags)
    for name in ("gate with baseline", "gate, baseline and diffusion", "factor and diffusion")
    for flags in ((None, None, None), (True, None, None), (None, None, LAYOUTS[name][1][2]))
]


@pytest.mark.parametrize(("name", "flags"), TOLD)
def test_flags_that_are_absent_are_told_by_the_tensors(name, flags, checkpoint, run, caplog):
    shapes, _ = LAYOUTS[name]
    with caplog.at_level(logging.WARNING, "tinydrug"):
        model = runtime(checkpoint(shapes, flags))
    (message,) = (record.getMessage() for record in caplog.records)
    assert "by the tensors, for the config does not say" in message and "\n" not in message
    for flag, value in zip(FLAGS, flags, strict=True):
        assert (f"{flag} is " in message) == (value is None)
    np.testing.assert_array_equal(logits(model, IDS), logits(run(name), IDS))
    model.close()


def test_flags_win_over_tensors(checkpoint, run):
    """Parameters that the config does not apply are not applied, as the code would not even make them."""
    for flags, like in (
        ((False, False, False), "neither"),
        ((True, False, False), "gate"),
        ((True, False, True), "gate with baseline"),
    ):
        model = runtime(checkpoint(GATE | BASELINE | STD, flags))
        np.testing.assert_array_equal(logits(model, IDS), logits(run(like), IDS))
        with pytest.raises(DrugError, match="diffusion:learned needs"):
            session(model, "diffusion:learned")
        model.close()


def test_what_the_config_says_of_diffusion_is_told_not_done(checkpoint, run, caplog):
    with caplog.at_level(logging.INFO, "tinydrug"):
        documented = runtime(checkpoint(FACTOR, (True, True, True), diffusion_std=0.25))
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.endswith("its diffusion is off, as in the code that trained it: --diffusion 0.25")
    np.testing.assert_array_equal(logits(documented, IDS), logits(run("factor"), IDS))
    documented.close()


@pytest.mark.parametrize("factor", [-1.0, -1 - 1e-7, -0.5, 0.0])
def test_an_erased_head_is_erased_and_noise_still_reaches_it(factor, checkpoint, tmp_path):
    weights = parameters(FACTOR)
    for i in range(LAYERS):
        weights[f"transformer.h.{i}.attn.drift_param"][1] = factor
    model = runtime(checkpoint(FACTOR, more=weights.items(), diffusion_std=0.1))
    config, plain = tiny.SPECS["gpt2"], naive.canonical(tiny.weights("gpt2"))
    own = naive.canonical(weights)
    for drug in (None, "drift:0.5,diffusion:0.1,sink=0"):
        after = attended(model, drug)

        def hook(site, layer, x, positions, query=None, after=after):
            if site == "A":
                x = drifted(x, own[f"h.{layer}.attn.drift_param"])
            return after(site, layer, x, positions, query)

        expected = naive.gpt2(config, plain, np.array(IDS), hook)
        np.testing.assert_allclose(logits(model, IDS, drug, SEED), expected, rtol=0, atol=REPLAY)
    model.close()


BAD = [  # shapes, fields, what the message must hold
    (
        {"drift_param": (H,)},
        {},
        r"h\.0\.attn\.drift_param: is \(4,\), expected \(4, 10\), a gate, or \(4, 1, 1\), a",
    ),
    (
        {"drift_param": (D_HEAD, H)},
        {},
        r"h\.0\.attn\.drift_param is \(10, 4\), expected \(4, 10\) \(transposed",
    ),
    ({"drift_param": (H, 1, 2)}, {}, r"h\.1\.attn\.drift_param is \(4, 1, 2\), expected \(4, 1, 1\)"),
    ({"drift_param": (H + 1, 1, 1)}, {}, r"h\.0\.attn\.drift_param is \(5, 1, 1\), expected \(4, 1, 1\)"),
    ({}, {}, r"h\.0\.attn\.drift_param is missing; .*h\.1\.attn\.drift_param is missing"),
    (GATE, {}, r"h\.0\.attn\.baseline is missing"),
    (GATE | {"baseline": (H, 1)}, {}, r"h\.0\.attn\.baseline is \(4, 1\), expected \(4, 10\)"),
    (GATE | BASELINE, {"apply_diffusion": True}, r"h\.0\.attn\.diffusion_param is missing"),
    (
        {"diffusion_param": ONE},
        {"apply_drift": False, "apply_diffusion": True},
        r"h\.1\.attn\.diffusion_param is \(4, 1, 1\), expected \(4, 10\)",
    ),
    (GATE | BASELINE, {"apply_drift": "yes"}, r"config field apply_drift is 'yes', not bool"),
    (GATE | BASELINE, {"apply_diffusion": 1}, r"config field apply_diffusion is 1, not bool"),
    (GATE | BASELINE, {"diffusion_std": "0.1"}, r"config field diffusion_std is '0\.1', not float"),
]


@pytest.mark.parametrize(("shapes", "fields", "message"), BAD)
def test_what_does_not_fit_is_refused_in_one_line(shapes, fields, message, checkpoint):
    folder = checkpoint(shapes, (True, False, True), **fields)
    with pytest.raises(TinydrugError, match=message) as error:
        runtime(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


# --- the terms of a schedule


@pytest.mark.parametrize(
    "drug",
    [
        "drift:0.4,sink=0",
        "drift:-1@1",
        "diffusion:0.3",
        "diffusion:0.3@0,sink=2",
        "A:0.6,drift:0.3,diffusion:0.2@0:1/0.5:0.5",
    ],
)
@pytest.mark.parametrize("name", ["llama-gqa", "llama-head12", "mistral-window", "gpt2", *LAYOUTS])
def test_replay_of_terms(name, drug, run):
    """The order everywhere: A, the model's own drift, drift, diffusion, c_proj or o_proj."""
    model = run(name)
    found = logits(model, IDS, drug, SEED)
    np.testing.assert_allclose(found, naively(model, name, drug), rtol=0, atol=REPLAY)
    assert np.abs(found - logits(model, IDS)).max() > 0.01, "terms of this size must be seen"


@pytest.mark.parametrize("drug", ["diffusion:learned", "diffusion:learned@1,drift:0.2,scale=0.5,sink=0"])
@pytest.mark.parametrize(
    "name", [name for name, (shapes, _) in LAYOUTS.items() if STD.items() <= shapes.items()]
)
def test_replay_of_the_learned_diffusion(name, drug, run):
    model = run(name)
    found = logits(model, IDS, drug, SEED)
    np.testing.assert_allclose(found, naively(model, name, drug), rtol=0, atol=REPLAY)
    assert np.abs(found - logits(model, IDS)).max() > 0.01


@pytest.mark.parametrize(
    "drug", [None, "A:0.4,drift:0.3,diffusion:0.2,sink=2", "diffusion:learned,drift:-1@1"]
)
def test_random_features_change_what_drifts_and_not_how(drug, run, monkeypatch):
    """Drift and diffusion act on attention's output, whatever attention is."""

    def attention(q, k, v, positions, layer, noise, window=None):
        return quadratic(q, k, v, SRF.directions(layer, q.shape[2]))

    name = "gate, baseline and diffusion"
    model = run(name, features=SRF)
    monkeypatch.setattr(naive, "self_attention", attention)
    found = logits(model, IDS, drug, SEED)
    np.testing.assert_allclose(found, naively(model, name, drug), rtol=0, atol=REPLAY)
    np.testing.assert_array_equal(logits(model, IDS, drug, SEED, piece=5), found)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gate, baseline and diffusion"])
def test_protected_positions_and_tokens_are_spared(name, run):
    """In the last layer alone, so that nothing spreads."""
    model, top = run(name), run(name).config.n_layers - 1
    sober, sequence = logits(model, IDS), session(model, f"drift:0.3@{top},diffusion:0.3@{top},sink=2", SEED)
    sequence.protect([9, 10], [IDS[15]])
    found = feed(sequence, IDS, drugged="all")
    spared = [t for t, token in enumerate(IDS) if t < 2 or t in (9, 10) or token == IDS[15]]
    assert np.flatnonzero((found == sober).all(-1)).tolist() == spared
    heads = (len(IDS) - len(spared)) * model.config.n_heads
    assert sequence.moved.tolist()[-2:] == [heads, heads]


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gate with baseline"])
def test_a_learned_diffusion_is_refused_where_there_is_none(name, run):
    with pytest.raises(DrugError, match=r"^diffusion:learned needs .*: write diffusion:STD") as error:
        session(run(name), "diffusion:learned")
    assert "\n" not in str(error.value)


def test_the_draws_are_normal_and_independent(run):
    config = run("gpt2").config
    coordinates = {
        "position": [(SEED, 0, 0, p) for p in range(2001)],
        "head": [(SEED, 0, h, 9) for h in range(2001)],
        "layer": [(SEED, i, 0, 9) for i in range(2001)],
        "seed": [(s, 0, 0, 9) for s in range(2001)],
    }
    for name, where in coordinates.items():
        n = np.stack([diffusion_draw(seed, config, *rest) for seed, *rest in where])  # (2001, d)
        sample = np.sort(n.ravel())
        phi = 0.5 * (1 + np.vectorize(math.erf)(sample / math.sqrt(2)))
        grid = np.arange(sample.size + 1) / sample.size
        gap = max(np.abs(phi - grid[:-1]).max(), np.abs(phi - grid[1:]).max())
        assert math.sqrt(sample.size) * gap < KOLMOGOROV, name
        assert abs(sample.mean()) * math.sqrt(sample.size) < SIGMAS, name
        assert abs((sample**2).mean() - 1) * math.sqrt(sample.size / 2) < SIGMAS, name
        assert abs((n[1:] * n[:-1]).mean()) * math.sqrt(n[1:].size) < SIGMAS, name
        assert abs((n[:, 1:] * n[:, :-1]).mean()) * math.sqrt(n[:, 1:].size) < SIGMAS, name


def test_the_draws_are_not_those_of_a(run):
    config = run("gpt2").config
    n = np.stack([diffusion_draw(SEED, config, 0, 0, p) for p in range(1000)])
    _, r = zip(
        *(draw(Schedule.parse("A:1~gauss"), SEED, config, "A", 0, 0, p, p) for p in range(1000)), strict=True
    )
    assert abs(np.corrcoef(n.ravel(), np.stack(r).ravel())[0, 1]) * 100 < SIGMAS


MIXED = [None, "diffusion:0.3", "drift:0.5,diffusion:0.2@1,sink=0", "A:0.3,drift:-0.4", "V:0.1,diffusion:0.1"]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gate, baseline and diffusion"])
def test_bits_do_not_depend_on_pieces_threads_or_batch(name, run):
    own = [IDS[i : i + n] for i, n in enumerate((20, 11, 17, 1, 9))]
    alone = [
        logits(run(name), ids, drug, seed=i) for i, (ids, drug) in enumerate(zip(own, MIXED, strict=True))
    ]
    for threads in (1, 2):
        model = run(name, threads=threads)
        for i, (ids, drug) in enumerate(zip(own, MIXED, strict=True)):
            for piece in (1, 7):
                np.testing.assert_array_equal(logits(model, ids, drug, i, piece), alone[i], f"{drug} {piece}")
        together = [session(model, drug, seed=i) for i, drug in enumerate(MIXED)]
        parts = [Part(s, ids, True, len(ids)) for s, ids in zip(together, own, strict=True)]
        found = model.step(parts)
        for i, at in enumerate(np.cumsum([0, *map(len, own)])[:-1]):
            np.testing.assert_array_equal(found[at : at + len(own[i])], alone[i], f"{MIXED[i]} in a batch")


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gate, baseline and diffusion"])
def test_terms_of_nothing_change_no_bit(name, run):
    sober = logits(run(name), IDS)
    for drug in ("drift:0", "diffusion:off", "drift:0.5,diffusion:1,scale=0", f"diffusion:9,sink={len(IDS)}"):
        np.testing.assert_array_equal(logits(run(name), IDS, drug, SEED), sober, drug)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_who_is_spared_and_who_is_counted(name, run):
    """Positions below the sink see nothing; a sober prompt none at all; heads are counted by term."""
    model = run(name)
    found, sober = logits(model, IDS, "drift:0.3,diffusion:0.3@0", SEED), logits(model, IDS)
    np.testing.assert_array_equal(found[:6], sober[:6])
    assert (found[6:] != sober[6:]).any(-1).all()
    sequence = session(model, "drift:0.3,diffusion:0.3@0", SEED)
    sequence.feed(IDS[:-4])
    assert not sequence.moved.any() and sequence.dirty == 0
    sequence.feed(IDS[-4:], "all")
    L, heads = model.config.n_layers, model.config.n_heads
    assert sequence.moved.tolist()[-2:] == [4 * L * heads, 4 * heads] and not sequence.moved[:-2].any()
    assert sequence.dirty == 4
    sequence.sober_up()
    clean = session(model)
    clean.feed(IDS)
    for one, other in zip(cached(sequence), cached(clean), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_fork_and_a_saved_sequence_keep_their_terms(run, tmp_path):
    model, drug = run("gate, baseline and diffusion"), "V:0.2,drift:0.3,diffusion:learned@1"
    sequence = session(model, drug, SEED)
    sequence.feed(IDS[:12], "all")
    sequence.save(tmp_path / "kept")
    loaded, forked = Session.load(model, tmp_path / "kept"), sequence.fork()
    expected = sequence.feed(IDS[12:], "all", 12)
    for other in (loaded, forked):
        np.testing.assert_array_equal(other.feed(IDS[12:], "all", 12), expected)
        np.testing.assert_array_equal(other.moved, sequence.moved)


def test_through_the_front_door(checkpoint):
    folder = add_tokenizer(checkpoint(*LAYOUTS["gate, baseline and diffusion"]))
    about = tinydrug.inspect(folder)
    assert about.model_type == "dd-gpt2" and about.config.drift.diffusion_param
    with tinydrug.load(folder, threads=1) as engine:
        how = {"n": 4, "ignore_eos": True, "drug_seed": 3}
        done = engine.generate("The sea", drug="diffusion:learned,drift:0.1@1", **how)
        again = engine.generate("The sea", drug="drift:0.1@1,diffusion:learned", **how)
    assert done.ids == again.ids
    assert done.moved == {"drift": 3 * H, "diffusion": 3 * LAYERS * H}


def test_published_checkpoints_have_names():
    """The three of the document."""
    repos = [model.source.repo for model in read_table().models.values() if isinstance(model.source, Repo)]
    assert {f"BluebrainAI/{kind}-gpt2-medium-wikitext" for kind in ("drift", "diffusion", "dd")} <= {*repos}


def test_damaged_parameters_are_found_and_named(checkpoint):
    bad = {"transformer.h.1.attn.baseline": np.full(EACH, np.nan)}
    folder = add_tokenizer(checkpoint(*LAYOUTS["gate with baseline"], more=bad.items()))
    with pytest.raises(TinydrugError, match=r"tensor h\.1\.attn\.baseline: 40 values are NaN"):
        tinydrug.load(folder, threads=1, check_tensors=True)


# --- their text and flags


EVERY = "V:0.05,drift:-0.2@1-2,diffusion:0.1@0.3..0.5,sink=0,scale=0.5"


def test_terms_in_text_files_and_records(tmp_path):
    schedule = Schedule.parse(EVERY)
    assert schedule == Schedule.parse(
        ["V:0.05", " Drift:-0.2@1-2 , diffusion:std:0.1@0.3..0.5"], sink=0, scale=0.5
    )
    assert schedule.drift == Term("drift", -0.2, schedule.drift.where) and not schedule.is_sober
    assert str(schedule) == EVERY
    save_schedule(schedule, tmp_path / "drug.toml")
    for again in (Schedule.from_dict(schedule.to_dict()), load_schedule(tmp_path / "drug.toml")):
        assert again == schedule and hash(again) == hash(schedule)
    assert Schedule(drift=0.3, diffusion="learned@1") == Schedule.parse("diffusion:learned@1,drift:0.3")
    assert Schedule.parse("drift:1", drift="2@3").drift == Schedule.parse("drift:2@3").drift
    assert Schedule.parse("diffusion:off,drift:0").is_sober and not Schedule.parse("drift:-1").is_sober
    table = schedule.term_table(6)
    np.testing.assert_array_equal(table["drift"], [0, -0.1, -0.1, 0, 0, 0])
    np.testing.assert_array_equal(table["diffusion"], [0, 0, 0.05, 0.05, 0, 0])


def test_terms_in_the_printed_table(caplog, tmp_path):
    assert Schedule.parse("A:0.1,drift:0.2@0,diffusion:learned").describe(2).splitlines() == [
        "noise: largest angle theta in radians, by layer and site",
        "sink 6, prompt none, scale 1, seed none, law uniform",
        "drift: attention's output x becomes x + drift x",
        "learned: attention's output x becomes x + learned std N(0, 1), std from the checkpoint",
        "layer               A       drift     learned",
        "0                 0.1         0.2           1",
        "1                 0.1           ·           1",
    ]
    save_schedule(Schedule.parse("V:0.1,drift:1"), tmp_path / "drug.csv", 2)
    assert "without drift: save .toml" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "diffusion:foo",
            "'diffusion:foo': diffusion is off, learned or a standard deviation such as 0.1, not foo",
        ),
        ("diffusion:-0.1", "'diffusion:-0.1': diffusion must be at least 0, not -0.1"),
        ("diffusion:", "'diffusion:': diffusion is missing"),
        ("diffusion:1e999", "'diffusion:1e999': diffusion must be a finite number, not inf"),
        ("drift:nan", "'drift:nan': drift must be a finite number, not nan"),
        ("drift:3deg", "'drift:3deg': drift '3deg' is not a number"),
        ("drift:1@x", "'drift:1@x': cannot read 'x': "),
        ("drift:1@2-1", "'drift:1@2-1': layers 2-1 run backwards"),
        ("drift:1,DRIFT:2", "drift is given twice: keep one"),
        ("sober,diffusion:1", "sober and diffusion:1 contradict each other: keep one"),
        ("drift:1@9", "'drift:1@9': there is no layer 9: the model has 4 layers, 0 to 3"),
        ("drift:1@0.3..0.4", "'drift:1@0.3..0.4': reaches no layer: layer l of this model lies at depth l/4"),
        ("drift:-1e38,scale=9", "'drift:-1e+38': grows beyond what a float32 holds: lower it or the scale"),
    ],
)
def test_bad_terms_are_refused_with_the_reason(text, message):
    with pytest.raises(DrugError) as error:
        Schedule.parse(text).term_table(4)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Schedule, drift=True), "drift must be a finite number, not True"),
        (partial(Schedule, drift="diffusion:1"), "drift cannot be diffusion:1"),
        (partial(Schedule, diffusion=Term("drift", 1)), "diffusion cannot be drift:1"),
        (partial(Term, "dryft", 1), "there is no kind of term 'dryft', only drift, diffusion, learned"),
        (partial(Term, "learned", 2), "a learned diffusion has no amount: scale the schedule"),
        (partial(Term, "drift", 1, "8-15"), "where must be Layers, Depth or Profile, not '8-15'"),
        (partial(Schedule.from_dict, {"drift": [1]}), "drift must be a finite number, not [1]"),
    ],
)
def test_bad_values_are_refused_with_the_reason(make, message):
    with pytest.raises(DrugError) as error:
        make()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--drift 0.2", "drift:0.2"),
        ("--drift -0.5@8-15 --diffusion learned", "drift:-0.5@8-15,diffusion:learned"),
        ("--drug V:0.1,drift:1 --drift 2 --diffusion std:0.1", "V:0.1,drift:2,diffusion:0.1"),
        ("--drug-file FILE --diffusion off", "A:0.3,diffusion:0"),
    ],
)
def test_flags(flags, text, tmp_path):
    save_schedule(Schedule.parse("A:0.3,diffusion:0.7"), tmp_path / "drug.toml")
    argv = [str(tmp_path / "drug.toml") if flag == "FILE" else flag for flag in flags.split()]
    args = options.parse(["-p", "The sea", *argv])
    assert inputs.read(args).schedule == Schedule.parse(text)
    assert inputs.idle_flags(options.parse(["-p", "The sea", "--drug-sink", "0", *argv])) == []
