"""The faults of the original DRµGS, B1 to B25 in the project's notes on it: none of them occurs here.

A test's name begins with the number of its fault; NOT_HERE says of the others why there is nothing to test.
"""

import random
import re

import numpy as np
import pytest
import tiny
from engines import add_tokenizer, cached, edited, feed, logits, runtime, session

import tinydrug
from tinydrug.api import Options
from tinydrug.cli import main
from tinydrug.engine.draws import draw
from tinydrug.engine.generate import Request, generate
from tinydrug.engine.runtime import REWIND_EVERY
from tinydrug.engine.sampling import Sampler, Sampling
from tinydrug.errors import DrugError, UnsupportedModel
from tinydrug.kernels.tables import DOSE
from tinydrug.noise import SITES, Dose, Profile, Schedule, load_schedule

NOT_HERE = {
    "B17": "no function decodes for debugging: text comes from one detokenizer, and what it raises is raised",
}
ALL = "H:0.3,Q:0.5,pK:0.4,K:0.6,V:0.5,A:0.7,M:0.3"
MODELS = ["llama-gqa", "mistral-window", "gpt2"]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def run(runtimes):
    """run(name, **options) -> a runtime with an f32 cache, built once; it has no tokenizer."""

    def make(name="llama-gqa", **options):
        return runtimes(name, **options)

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return add_tokenizer(tiny.build("llama-gqa", tmp_path_factory.mktemp("faults") / "gqa"), TEMPLATE)


@pytest.fixture(scope="module")
def engine(folder):
    with tinydrug.load(folder, ctx=128, rewind_every=0, prefix_reuse=False) as engine:
        yield engine


def ids_of(n: int, name: str = "faults") -> list[int]:
    return (3 + tiny.counter_hash(name, n) % np.uint64(tiny.VOCAB - 4)).astype(int).tolist()


def greedy() -> Sampler:
    return Sampler(Sampling(), 0, want_logprob=True)


def requested(sequence, ids, n: int, **options) -> Request:
    return Request(sequence, ids, greedy(), n, **options)


def counted(model, monkeypatch) -> list[int]:
    """From now on, the tokens of every step that this model makes."""
    steps, step = [], model.step

    def noting(parts):
        steps.append(sum(len(part.ids) for part in parts))
        return step(parts)

    monkeypatch.setattr(model, "step", noting)
    return steps


def assert_same_cache(one, other) -> None:
    assert one.ids == other.ids
    for a, b in zip(cached(one), cached(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_fault_is_here_once():
    tested = [match[1] for name in globals() if (match := re.match(r"test_b(\d+)_", name))]
    expected = {f"B{i}" for i in range(1, 26)}
    assert {f"B{number}" for number in tested} == expected - NOT_HERE.keys() and NOT_HERE.keys() <= expected


# --- the rewind


def test_b1_the_regenerated_cache_is_the_one_used_next(run):
    """The sixth drugged token sees five clean ones before it, and not the rows that they had."""
    model, prompt = run(rewind_every=5), ids_of(9)
    sequence = session(model, f"{ALL},sink=0", 3)
    choices = [event.choice for event in generate(model, [requested(sequence, prompt, 13)])]
    tokens = [choice.id for choice in choices]
    for at in (5, 10):
        clean, dirty = (session(model, f"{ALL},sink=0", 3) for _ in range(2))
        clean.feed(prompt + tokens[:at])
        dirty.feed(prompt + tokens[: at - 5])
        dirty.feed(tokens[at - 5 : at], "all")
        seen, unseen = (greedy()(each.feed([tokens[at]], "all")[0], [], 0) for each in (clean, dirty))
        assert (choices[at + 1].id, choices[at + 1].logprob) == (seen.id, seen.logprob)
        assert seen.logprob != unseen.logprob


def test_b2_drugged_tokens_are_counted_from_the_first_one_on(run):
    model, prompt = run(rewind_every=5), ids_of(9)
    sequence, dirty = session(model, f"{ALL},sink=0", 3), []
    for _ in generate(model, [requested(sequence, prompt, 13)]):
        dirty.append(sequence.dirty)
        if len(dirty) == 7:  # one token after the first shower
            clean = session(model)
            clean.feed(sequence.ids[:14])
            for found, exact in zip(cached(sequence), cached(clean), strict=True):
                np.testing.assert_array_equal(found[:, :, :14], exact)
    assert dirty == [0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
    assert REWIND_EVERY == 420


def test_b3_a_shower_of_a_clean_cache_does_nothing(run, monkeypatch):
    model, ids = run(), ids_of(20)
    sober, showered, shortened = (session(model, drug, 1) for drug in (None, ALL, ALL))
    sober.feed(ids)
    showered.feed(ids, "all")
    showered.sober_up()
    shortened.feed(ids)
    shortened.feed(ids_of(4), "all")
    shortened.rewind(4)
    steps = counted(model, monkeypatch)
    for sequence in (sober, showered, shortened):
        assert sequence.dirty == 0 and sequence.sober_up() == 0 and sequence.pos == 20
        assert_same_cache(sequence, sober)
    assert steps == []


def test_b4_clean_tokens_after_dirty_ones_are_told_apart(run):
    """Someone says something after an answer that was never sobered up: twice."""
    model, ids = run(), ids_of(40)
    sequence, clean = session(model, f"{ALL},sink=0", 1), session(model)
    sequence.feed(ids[:10]), sequence.feed(ids[10:18], "all"), sequence.feed(ids[18:25])
    sequence.feed(ids[25:31], "all"), sequence.feed(ids[31:])
    assert sequence.spans == [(10, 18), (25, 31)] and sequence.dirty == 14 and sequence.clean == 10
    assert sequence.sober_up() == 0 and sequence.spans == []
    clean.feed(ids)
    assert_same_cache(sequence, clean)


def test_b5_a_shower_before_anything_was_read_does_nothing(run):
    model, ids = run(), ids_of(12)
    sequence, used = session(model, ALL, 1), session(model, ALL, 1)
    used.feed(ids, "all")
    used.reset()
    for each in (sequence, sequence.fork(), used):
        assert each.sober_up() == 0 and each.pos == each.dirty == 0
        np.testing.assert_array_equal(feed(each, ids, drugged="all"), logits(model, ids, ALL, 1))


# --- doses


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("site", SITES)
def test_b6_every_site_of_every_model_takes_effect_and_its_vectors_are_counted(name, site, run):
    """No backend lacks a site. What is told is the number of vectors that were moved, not of layers."""
    model, ids = run(name), ids_of(20)
    sequence = session(model, f"{site}:0.8", 1)
    sequence.verify(True)
    found = feed(sequence, ids, drugged="all")
    assert np.abs(found - logits(model, ids)).max() > 0.01
    moved = {letter: int(n) for letter, n in zip(SITES, sequence.moved, strict=False) if n}
    measured = {letter: n for letter, (n, _, _) in sequence.verified().items()}
    assert moved.keys() == measured.keys() == {site} and measured == moved


def test_b7_nothing_is_shared_between_sessions_nor_engines(folder, engine, run):
    ids = ids_of(20)
    with tinydrug.load(folder, ctx=64, rewind_every=0) as another:
        engines, drugs = (engine, engine, another, another), ("V:1", "H:0.5", None, "V:1")
        sessions = [where.session(drug, 1) for where, drug in zip(engines, drugs, strict=True)]
        alone = [engine.session("V:1", 1).feed(ids, "all")]
        rows = [each.feed(ids[:9], "all") for each in sessions]
        sessions[1].dose(Schedule.parse("Q:2"), 5)
        sessions[2].protect(range(64))
        rows = [each.feed(ids[9:], "all") for each in sessions]
        assert [str(each.schedule) for each in sessions] == ["V:1", "Q:2", "sober", "V:1"]
        assert [each.ids for each in sessions] == [ids] * 4
        np.testing.assert_array_equal(rows[0], alone[0])
        np.testing.assert_array_equal(rows[3], alone[0])
        assert (rows[1] != rows[0]).any() and (rows[2] != rows[0]).any()


def test_b8_a_shape_given_with_a_dose_is_the_shape_of_that_site():
    shape = Profile(((0, 1), (0.5, 0)), "ceil")
    for site in SITES:
        others = [Dose(other, 0.25) for other in SITES if other != site]
        table = Schedule((Dose(site, 0.5, shape), *others)).table(4)["theta"]
        np.testing.assert_array_equal(table[:, SITES[site].code], [0.5, 0.5, 0, 0])
        np.testing.assert_array_equal(
            np.delete(table, SITES[site].code, 1), np.full((4, len(SITES) - 1), 0.25)
        )


def test_b9_noise_at_a_spares_positions_and_no_head(tiny_model, tmp_path):
    """With one head's output let through at a time: its noise shows from position 6 on, and not before."""
    ids, heads = ids_of(12), 4
    for head in range(heads):

        def only(tensors, head=head):
            def kept(w):
                mask = np.repeat(np.arange(heads) == head, w.shape[1] // heads)
                return (w * mask).astype(w.dtype)

            return {name: kept(w) if name.endswith("o_proj.weight") else w for name, w in tensors.items()}

        model = runtime(edited(tiny_model("llama-mha"), tmp_path / str(head), only), threads=1)
        assert model.config.n_heads == heads
        quiet, noisy = logits(model, ids), logits(model, ids, "A:0.8", 1)
        np.testing.assert_array_equal(noisy[:6], quiet[:6])
        assert (noisy[6:] != quiet[6:]).any(-1).all()
        model.close()


def test_b10_sequences_of_a_batch_keep_their_own_sink_and_their_own_end(run):
    """Three prompts, one of them shorter than the sink; one sequence ends early and the others go on."""
    model, prompts = run(), [ids_of(n, f"{n}") for n in (3, 9, 20)]
    free = [requested(session(model, f"{ALL},prompt=all", i), ids, 12) for i, ids in enumerate(prompts)]
    list(generate(model, free))
    stop = frozenset([free[1].generated[4]])
    together, alone = (
        [
            requested(session(model, f"{ALL},prompt=all", i), ids, 12, stop_ids=stop)
            for i, ids in enumerate(prompts)
        ]
        for _ in range(2)
    )
    list(generate(model, together))
    for request in alone:
        list(generate(model, [request]))
    for one, other in zip(together, alone, strict=True):
        assert one.generated == other.generated and one.finish == other.finish
        np.testing.assert_array_equal(one.session.moved, other.session.moved)
    assert together[1].finish == "stop" and len(together[1].generated) <= 5
    assert max(len(request.generated) for request in together) > len(together[1].generated)


def test_b11_a_seed_decides_and_no_global_generator_does(engine):
    found = []
    for seed in (1, 1, 2):
        np.random.seed(len(found))
        random.seed(len(found))
        found.append(engine.generate("Tell me", n=20, ignore_eos=True, drug="A:1.5,V:1", drug_seed=seed).ids)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("law", ["uniform", "gauss", "sign"])
@pytest.mark.parametrize("form", ["", "L2", "NL"])
def test_b12_vectors_of_zeros_stay_zeros(law, form, tiny_model, tmp_path):
    """An embedding of zeros makes all vectors of all sites zeros."""

    def silent(tensors):
        return tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"] * 0}

    model, ids = runtime(edited(tiny_model("llama-gqa"), tmp_path, silent), threads=1), ids_of(9)
    drug = ",".join(f"{form}{site}:2~{law}" for site in SITES)
    sequence = session(model, f"{drug},sink=0", 1)
    np.testing.assert_array_equal(feed(sequence, ids, drugged="all"), np.zeros((9, tiny.VOCAB)))
    model.close()


@pytest.mark.parametrize(("law", "cosine"), [("uniform", 0.75), ("gauss", 0), ("sign", 0)])
def test_b13_the_one_sided_law_has_a_name_and_others_are_isotropic(law, cosine, run):
    """Two directions for one vector: of the published law they lie on one side of it."""
    config, schedule = run().config, Schedule.parse(f"H:1~{law}")
    r = np.stack([draw(schedule, 1, config, "H", 0, 0, t, t)[1] for t in range(2000)])
    x = np.random.default_rng(0).normal(size=r.shape[1])
    o = r - np.outer(r @ x, x) / (x @ x)
    o /= np.linalg.norm(o, axis=-1, keepdims=True)
    assert abs((o[::2] * o[1::2]).sum(-1).mean() - cosine) < 0.03


# --- generation


def test_b14_token_ids_need_no_tokenizer(run):
    model = run()
    request = requested(session(model, ALL, 1), ids_of(9), 5)
    assert [event.choice.id for event in generate(model, [request])] == request.generated
    assert len(request.generated) == 5


def test_b15_it_ends_where_it_ends(run, monkeypatch):
    """A first token that ends the text is all there is, and no tokens are none: no step too many."""
    model, ids = run(), ids_of(9)
    probe = requested(session(model), ids, 1)
    list(generate(model, [probe]))
    steps = counted(model, monkeypatch)
    ended = requested(session(model), ids, 9, stop_ids=frozenset(probe.generated))
    events = list(generate(model, [ended]))
    assert [(e.choice.id, e.finish) for e in events] == [(probe.generated[0], "stop")] and steps == [9]
    assert list(generate(model, [requested(session(model), ids, 0)])) == [] and steps == [9]
    list(generate(model, [requested(session(model), ids, 3)]))
    assert steps == [9, 9, 1, 1]


def test_b16_doses_survive_a_prompt_that_fails(run, monkeypatch):
    model, ids = run(), ids_of(9)
    sequence, undisturbed = session(model, ALL, 1), session(model, ALL, 1)

    def failing(*_):
        raise RuntimeError

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(model._team, "run", failing)
        list(generate(model, [requested(sequence, ids, 5)]))
    found, expected = (requested(each, ids, 12) for each in (sequence, undisturbed))
    list(generate(model, [found])), list(generate(model, [expected]))
    assert found.generated == expected.generated and sequence.moved.any()
    np.testing.assert_array_equal(sequence.moved, undisturbed.moved)


def test_b18_an_unknown_mode_between_points_is_refused(tmp_path):
    (tmp_path / "drug.toml").write_text(
        '[[dose]]\nsite = "V"\ntheta = 1\nprofile = [[0, 1], [1, 0]]\nmode = "sideways"\n'
    )
    for make in (
        lambda: Profile(((0, 1), (1, 0)), "sideways"),
        lambda: Schedule.parse("V:1@0:1/1:0/sideways"),
        lambda: load_schedule(tmp_path / "drug.toml"),
    ):
        with pytest.raises(DrugError, match="there is no mode 'sideways', only interpolate, ceil, floor"):
            make()


@pytest.mark.parametrize("site", ["K", "V", "A"])
def test_b19_protection_goes_by_position_wherever_a_ring_keeps_it(site, run):
    """A ring of 64 slots, gone around once and a half when position 90, the first unprotected one, comes."""
    model, ids, sink = run("mistral-window", n_ctx=128, chunk=16), ids_of(110), 90
    assert model.slots == 64
    sequence, window = session(model, f"{site}:0.9,sink={sink}", 1), model.config.sliding_window
    quiet, noisy = logits(model, ids, piece=16), feed(sequence, ids, 16, "all")
    np.testing.assert_array_equal(noisy[:sink], quiet[:sink])
    assert (noisy[sink:] != quiet[sink:]).any(-1).all()
    c = model.config
    if site == "A":
        expected = (110 - sink) * c.n_heads
    else:
        read = [min(window, position + 1 - sink) for position in range(sink, 110)]
        expected = sum(read) * c.n_kv_heads
    assert sequence.moved[SITES[site].code] == expected * c.n_layers


def test_b20_a_dose_stands_in_the_row_of_its_layer():
    """Of a table with a row a layer, as the kernels read it and as it is printed: no axis is one off."""
    schedule = Schedule.parse("V:0.5@single:8,K:0.25@stack:2,scale=2")
    theta = schedule.table(12)["theta"]
    assert theta.shape == (12, len(SITES)) and "theta" in DOSE.dtype.names
    np.testing.assert_array_equal(np.flatnonzero(theta[:, SITES["V"].code]), [7, 8, 9])
    np.testing.assert_array_equal(np.flatnonzero(theta[:, SITES["K"].code]), [0, 1, 2, 3])
    assert set(theta.ravel()) == {0, 0.5, 1}
    lines = [line.split() for line in schedule.describe(12).splitlines()[3:]]
    assert lines == [["0-3", "0.5", "·"], ["4-6", "·", "·"], ["7-9", "·", "1"], ["10-11", "·", "·"]]


@pytest.mark.parametrize("quant", ["none", "q8", "q4"])
def test_b21_theta_zero_is_sober_for_every_seed_whatever_the_weights(quant, run):
    """The control that the published samples lack: 8-bit weights add no variety of their own."""
    model, ids = run(quant=quant), ids_of(20)
    quiet = logits(model, ids)
    for seed in range(5):
        np.testing.assert_array_equal(logits(model, ids, "H:0,Q:0,K:0,V:0,A:0", seed), quiet)
        assert (logits(model, ids, "V:0.01", seed)[7:] != quiet[7:]).any()


def test_b22_a_single_token_answer_varies_with_drug_prompt_last(engine, folder, capsys):
    def answers(prompt):
        options = {"n": 1, "drug": f"A:2,V:1.5,prompt={prompt}", "ignore_eos": True}
        return {engine.generate("Is it so?", drug_seed=seed, **options).ids for seed in range(12)}

    sober = engine.generate("Is it so?", n=1, ignore_eos=True).ids
    assert answers("none") == {sober}
    assert len(answers("last")) > 2 and len(answers("all")) > 2
    said = {"none": set(), "last": set()}
    for prompt, texts in said.items():
        for seed in range(4):
            flags = f"-m {folder} -c 128 -no-cnv -n 1 --ignore-eos -q --drug A:2,V:1.5 --drug-prompt {prompt}"
            assert main([*flags.split(), "-p", "Is it so?", "--drug-seed", str(seed)]) == 0
            texts.add(capsys.readouterr().out)
    assert len(said["none"]) == 1 and len(said["last"]) > 1


def test_b23_split_weights_are_refused_and_nothing_takes_negative_prompts(tiny_model, tmp_path):
    with pytest.raises(UnsupportedModel, match="config field pretraining_tp = 2 is not supported") as error:
        runtime(edited(tiny_model("llama-gqa"), tmp_path, pretraining_tp=2))
    assert "\n" not in str(error.value)
    assert not [name for name in Options.__dataclass_fields__ if "negative" in name]


def test_b24_every_way_in_reads_the_prompt_sober_and_counts_what_it_drugs(engine):
    """generate, several at once, stream, chat and a kept session: there is one path."""
    prompt, n, c = "Tell me of the sea", 8, engine.config
    options = {"n": n, "ignore_eos": True}
    drugged = {"drug": "A:0.5", "drug_seed": 3}
    kept = engine.session("A:0.5", 3)
    stream = engine.stream(prompt, session=kept, **options)
    list(stream)
    done = [
        engine.generate(prompt, **options, **drugged),
        *engine.generate(prompts=[prompt], **options, **drugged),
        engine.chat([{"role": "user", "content": prompt}], **options, **drugged),
        stream.completion,
    ]
    expected = {"A": (n - 1) * c.n_heads * c.n_layers}  # the last token is not read
    for completion in done:
        assert completion.moved == expected
        assert completion.ids[0] == engine.generate(prompt, n=1, ignore_eos=True).ids[0]
    assert len({completion.ids for completion in (done[0], done[1], done[3])}) == 1
    assert kept.dirty == n - 1 and kept.clean == kept.pos - (n - 1)


@pytest.mark.parametrize("cell", ["f16", "f32"])
@pytest.mark.parametrize("site", ["K", "V"])
def test_b25_noise_at_k_and_v_reaches_what_attention_reads(site, cell, run):
    """Whatever the cache is made of and however many tokens come at once; the cache itself stays."""
    model, ids = run(cell=cell), ids_of(20)
    top = model.config.n_layers - 1
    quiet, noisy = session(model), session(model, f"{site}:0.8@{top}", 1)
    before, after = feed(quiet, ids), feed(noisy, ids, drugged="all")
    assert (after[7:] != before[7:]).any(-1).all()
    np.testing.assert_array_equal(logits(model, ids, f"{site}:0.8@{top}", 1, piece=1), after)
    assert_same_cache(noisy, quiet)
