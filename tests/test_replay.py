"""Records: every generation can be run again, bit for bit, or it is said why not. And prefixes used again."""

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
from engines import add_tokenizer, edited

import tinydrug
from tinydrug import Record, Sampling, Schedule
from tinydrug.cli import inputs, main
from tinydrug.cli.console import Console
from tinydrug.cli.options import parse
from tinydrug.errors import ConfigError, TinydrugError

DRUG = "H:0.2,K:0.6,V:0.6,A:0.4"
PROMPT = "Tell me of the sea"  # 18 tokens
TIRED = Sampling(temperature=1.5, top_k=40, repeat_penalty=1.1, seed=2**64 - 1)
CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return add_tokenizer(tiny.build("llama-gqa", tmp_path_factory.mktemp("replay") / "gqa"), template)


@pytest.fixture(scope="module")
def engine(folder):
    with tinydrug.load(folder, ctx=128, cache="f32", prefix_reuse=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(folder):
    """The same on one thread, in small pieces, with another habit of sobering up."""
    options = {"threads": 1, "chunk": 7, "rewind_every": 5}
    with tinydrug.load(folder, ctx=128, cache="f32", **options) as engine:
        yield engine


def through_json(record: Record) -> Record:
    return Record.from_dict(json.loads(record.to_json()))


def assert_replays(done, *engines) -> None:
    record = through_json(done.record)
    assert record == done.record and record.obstacle is None
    for engine in engines:
        steps = []
        again = engine.replay(record, steps.append)
        assert again.ids == done.ids == record.ids and again.text == done.text == record.text
        assert again.moved == done.moved and again.prompt_ids == done.prompt_ids
        assert record.difference(again.ids, again.finish_reason) is None
        assert "".join(step.text for step in steps) == done.text
        assert dataclasses.replace(again.record, made_by={}, n=record.n) == dataclasses.replace(
            record, made_by={}, finish_reason=again.finish_reason
        )


def streamed(engine, session, prompt, **options):
    stream = engine.stream(prompt, session=session, **options)
    for _ in stream:
        pass
    return stream.completion


# --- every generation yields a record that replays


OPTIONS = {
    "greedy": {},
    "sampled": {"sampling": TIRED},
    "a fresh seed": {"sampling": Sampling(temperature=2.0)},
    "drugged": {"drug": DRUG},
    "drugged prompt": {"drug": f"{DRUG},prompt=all", "drug_seed": 2**64 - 1},
    "drugged last": {"drug": f"{DRUG},prompt=last,sink=0"},
    "a seed of its own": {"drug": f"{DRUG},seed=7"},
    "over time": {"drug": "V:0.9~held,A:0.5~gauss+wander:8,K:0.8~sign+cosine:20,M:0.1~tied"},
    "drift and diffusion": {"drug": "drift:-0.3@0-1,diffusion:0.4,V:0.5", "drug_seed": 3},
    "protected": {"drug": f"{DRUG},prompt=all", "protect": np.array([8, 9]), "protect_ids": [71]},
    "verified": {"drug": DRUG, "verify": True},
    "stopped by text": {"stop": ["e", "st"], "sampling": TIRED, "n": 60},
    "stopped by a single text": {"stop": "ee", "sampling": TIRED, "n": 60},
    "until the end": {
        "sampling": Sampling(logit_bias={2: 4.0}, temperature=1.0),
        "ignore_eos": False,
        "n": 90,
    },
    "never the end": {"sampling": Sampling(logit_bias={2: -np.inf, 5: 2.5}, temperature=1.0)},
    "penalised": {"sampling": Sampling(frequency_penalty=0.5, presence_penalty=0.1, repeat_last_n=-1)},
    "until it is full": {"n": None, "drug": DRUG},
    "shifted": {"n": 160, "shift_keep": 5, "drug": DRUG, "sampling": TIRED},
    "nothing": {"n": 0},
    "one": {"n": 1, "drug": DRUG},
    "probable": {"logprobs": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_record_replays(options, engine, alone):
    done = engine.generate(PROMPT, **{"n": 30, "ignore_eos": True} | options)
    assert_replays(done, engine, alone)


def test_a_record_of_a_batch_is_of_each_alone(engine, alone):
    prompts, drugs = [PROMPT, "The", [5, 6, 7]], [None, DRUG, Schedule.parse("A:0.9,prompt=last")]
    for done in engine.generate(prompts=prompts, drug=drugs, n=12, sampling=TIRED, drug_seed=2**64 - 2):
        assert_replays(done, engine, alone)


def test_a_record_of_a_chat(engine, alone):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert_replays(engine.chat(messages, n=9, drug=DRUG), engine, alone)


def test_a_record_of_a_stream_closed_early(engine, alone):
    with engine.stream(PROMPT, n=50, drug=DRUG, ignore_eos=True) as stream:
        for _ in range(6):
            next(stream)
    assert stream.completion.finish_reason == "cancelled" and len(stream.completion.record.ids) == 6
    assert_replays(stream.completion, engine, alone)


def test_a_record_counts_drugged_tokens_as_the_session_did(folder, alone):
    """Sobered up every 6 tokens, in the middle of the generation."""
    with tinydrug.load(folder, ctx=128, cache="f32", rewind_every=6) as engine:
        done = engine.generate(PROMPT, n=40, drug=DRUG, drug_seed=1)
        never = engine.session(DRUG, 1)
        never.rewind_every = 0
        assert streamed(engine, never, PROMPT, n=40).ids != done.ids
        assert done.record.rewind_every == 6
        assert_replays(done, engine, alone)


def test_a_record_with_a_law_of_ones_own(engine):
    from tinydrug.kernels.noise import LAWS as KERNELS
    from tinydrug.noise.laws import LAWS

    tinydrug.register_law("replayed", lambda u: 2 * u - 1)
    try:
        done = engine.generate(PROMPT, n=10, drug="A:0.6~replayed")
        assert_replays(done, engine)
        data = done.record.to_dict()
    finally:
        del LAWS["replayed"], KERNELS["replayed"]
    with pytest.raises(ConfigError, match="noise: .*there is no law 'replayed'"):
        Record.from_dict(data)


# --- what a kept session had been through


def conversation(engine, **options):
    """Answers under changing noise, the first half sobered up before the second, with a turn gone back."""
    kept = engine.session(DRUG, 5)
    first = streamed(engine, kept, PROMPT, n=12, ignore_eos=True)
    yield first
    kept.sober_up(iter([False, True]).__next__, 4)
    kept.dose(Schedule.parse("V:0.9~gauss+linear:30,prompt=all"), 6)
    text = [*first.prompt_ids, *first.ids, 5, 6, 7]
    second = streamed(engine, kept, text, n=9, ignore_eos=True, sampling=TIRED, protect=[30])
    yield second
    kept.rewind(4)
    kept.protect()
    kept.dose(Schedule.parse("A:0.7,prompt=last"), 7)
    yield streamed(engine, kept, [*second.prompt_ids, *second.ids[:4], 9, 9], n=9, ignore_eos=True)
    kept.sober_up()
    yield streamed(engine, kept, [*second.prompt_ids, 11, 12], n=9, ignore_eos=True)


def test_a_record_of_a_kept_session_has_its_history(engine, alone):
    answers = list(conversation(engine))
    histories = [[(w.first, w.last, bool(w.noise)) for w in done.record.history] for done in answers]
    assert histories[0] == histories[3] == []
    assert histories[1] == [(18, 29, True), (18, 22, False)]
    assert histories[2] == [(18, 29, True), (18, 22, False), (29, 37, True)]
    assert [done.record.kept for done in answers] == [0, 29, 37, 33]
    for done in answers:
        assert_replays(done, engine, alone)


def test_a_history_matters(engine):
    """The same prompt and noise without it give other tokens: it is not for show."""
    done = list(conversation(engine))[1]
    data = done.record.to_dict() | {"history": [], "kept": 0}
    assert engine.replay(Record.from_dict(data)).ids != done.ids


def test_a_record_of_a_loaded_and_of_a_forked_session(engine, alone, tmp_path):
    kept = engine.session(DRUG, 5)
    first = streamed(engine, kept, PROMPT, n=12, ignore_eos=True)
    kept.save(tmp_path / "kept")
    again = [*first.prompt_ids, *first.ids, 5]
    answers = [
        streamed(engine, each, again, n=9)
        for each in (engine.load_session(tmp_path / "kept"), kept.fork(), kept)
    ]
    assert len({done.ids for done in answers}) == 1
    for done in answers:
        assert done.record.history
        assert_replays(done, engine, alone)


def test_a_record_of_a_ring_that_has_wrapped(tmp_path):
    folder = add_tokenizer(tiny.build("mistral-window", tmp_path))
    with tinydrug.load(folder, ctx=512, cache="f16", chunk=16, rewind_every=20) as engine:
        kept = engine.session(DRUG, 1)
        first = streamed(engine, kept, PROMPT, n=150, ignore_eos=True)
        assert kept.cache.slots == 64
        second = streamed(engine, kept, [*first.prompt_ids, *first.ids, 5, 6], n=70, ignore_eos=True)
        assert second.record.history
        assert_replays(first, engine)
        assert_replays(second, engine)


def test_a_ring_too_small_for_a_history_is_refused(tmp_path):
    """Rows far behind were written anew: a shorter ring no longer holds what they saw."""
    folder, drug = add_tokenizer(tiny.build("mistral-window", tmp_path)), "V:0.9,A:0.9"
    options = {"ctx": 512, "rewind_every": 0}
    with (
        tinydrug.load(folder, chunk=100, **options) as large,
        tinydrug.load(folder, chunk=16, **options) as small,
    ):
        kept = large.session(drug, 1)
        first = streamed(large, kept, [5] * 60, n=51, ignore_eos=True)
        kept.sober_up(iter([False, True]).__next__, 4)
        done = streamed(large, kept, [*first.prompt_ids, *first.ids, 6], n=9, ignore_eos=True)
        assert [(w.first, w.last) for w in done.record.history] == [(60, 110), (60, 64)]
        assert_replays(done, large)
        with pytest.raises(ConfigError, match="64 slots are too few"):
            small.replay(done.record)


# --- what cannot be replayed


def test_code_in_the_sampling_is_named(engine):
    def upside_down(z, ids):
        return -z

    done = engine.generate(PROMPT, n=4, sampling=Sampling(processors=(upside_down,)))
    record = through_json(done.record)
    assert record.obstacle == "its sampling.processors are code: upside_down"
    with pytest.raises(ConfigError, match="cannot be replayed: .*upside_down"):
        engine.replay(record)


def test_noise_changed_while_it_ran_is_named(engine):
    for change in (lambda s: s.dose(Schedule.parse("V:1")), lambda s: s.protect([20])):
        kept = engine.session(DRUG, 1)
        with engine.stream(PROMPT, session=kept, n=9, ignore_eos=True) as stream:
            next(stream)
            change(kept)
        assert "changed while it ran" in stream.completion.record.obstacle


@pytest.mark.parametrize(
    "options, words",
    [
        ({"quant": "q8"}, "quant was 'none', here it is 'q8'"),
        ({"cache": "f16"}, "cache was 'f32', here it is 'f16'"),
        ({"ctx": 100}, "n_ctx was 128, here it is 100"),
    ],
)
def test_a_record_of_another_engine_is_refused_by_name(options, words, engine, folder):
    record = engine.generate(PROMPT, n=4).record
    with tinydrug.load(folder, **{"ctx": 128, "cache": "f32"} | options) as other:
        with pytest.raises(ConfigError, match=words):
            other.replay(record)


def test_a_record_of_other_weights_or_tokenizer_is_refused_by_name(engine, folder, tmp_path):
    def change(tensors):
        tensors["model.norm.weight"][0] *= 2
        return tensors

    record = engine.generate(PROMPT, n=4).record
    weights = add_tokenizer(edited(folder, tmp_path / "weights", change))
    words = add_tokenizer(edited(folder, tmp_path / "words"))
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    for other, what in ((weights, "weights was"), (words, "tokenizer was")):
        with tinydrug.load(other, ctx=128, cache="f32") as other, pytest.raises(ConfigError, match=what):
            other.replay(record)


def test_other_versions_are_warned_of_and_no_more(engine, caplog):
    done = engine.generate(PROMPT, n=4, drug=DRUG)
    data = done.record.to_dict()
    data["made_by"] = {"tinydrug": "0.0.9", "numba": "0.1", "isa": "portable"}
    record = Record.from_dict(data)
    assert engine.replay(record).ids == done.ids
    assert "tinydrug was 0.0.9, here it is 0.1.0" in caplog.text and "numba was 0.1" in caplog.text
    caplog.clear()
    engine.replay(done.record)
    assert not caplog.records


@pytest.mark.parametrize(
    "ids, finish, words",
    [
        ((1, 2, 3), "length", None),
        ((1, 9, 9), "length", "token 1 was 2, now it is 9"),
        ((1, 2), "length", "it had 3 tokens, now it has 2"),
        ((1, 2, 3, 4), "length", "it had 3 tokens, now it has 4"),
        ((1, 2, 3), "stop", "it ended by length, now by stop"),
    ],
)
def test_what_differs_is_told(ids, finish, words, engine):
    record = dataclasses.replace(engine.generate(PROMPT, n=0).record, ids=(1, 2, 3), finish_reason="length")
    assert record.difference(ids, finish) == words


# --- records as values and as files


def test_a_completion_is_still_a_plain_value(engine):
    done, twin = (engine.generate(PROMPT, n=5, drug=DRUG, drug_seed=1, sampling=TIRED) for _ in range(2))
    assert done.record == twin.record and "_record" not in repr(done)
    for copied in (pickle.loads(pickle.dumps(done)), copy.deepcopy(done), copy.copy(done)):
        assert copied == done and copied.record == done.record
    assert dataclasses.asdict(done)["text"] == done.text


def test_the_weights_are_hashed_once_and_only_if_asked(folder, monkeypatch):
    from tinydrug.formats.weights import Weights

    calls, fingerprint = [], Weights.fingerprint
    monkeypatch.setattr(Weights, "fingerprint", lambda self: calls.append(1) or fingerprint(self))
    with tinydrug.load(folder, ctx=64) as engine:
        done = [engine.generate(PROMPT, n=2) for _ in range(3)]
        assert not calls
        hashes = {each.record.model["weights"] for each in done}
        assert len(calls) == len(hashes) == 1


def test_a_record_holds_what_the_issue_asks_for(engine, folder):
    done = engine.generate(PROMPT, n=5, drug=DRUG, drug_seed=3, sampling=TIRED, stop=["QQ"])
    data = json.loads(done.record.to_json())
    assert {"tinydrug", "python", "numpy", "numba", "llvmlite", "isa", "threads", "chunk"} <= data[
        "made_by"
    ].keys()
    assert (data["model"]["name"], Path(data["model"]["source"]).resolve()) == (folder.name, folder.resolve())
    assert (data["model"]["quant"], data["model"]["cache"], data["model"]["n_ctx"]) == ("none", "f32", 128)
    assert len(data["model"]["weights"]) == len(data["model"]["tokenizer"]) == 64
    assert data["prompt_ids"] == list(done.prompt_ids) and data["ids"] == list(done.ids)
    assert (
        Schedule.from_dict(data["noise"]["schedule"]) == Schedule.parse(DRUG) and data["noise"]["seed"] == 3
    )
    assert data["sampling"]["seed"] == 2**64 - 1 and data["sampling"]["temperature"] == 1.5
    assert (data["stop"], data["n"], data["rewind_every"]) == (["QQ"], 5, 420)
    assert (data["text"], data["finish_reason"]) == (done.text, done.finish_reason)


@pytest.mark.parametrize(
    ("loaded", "options"),
    [
        ({"rewind_every": 2**31 - 1}, {"drug": DRUG}),
        ({}, {"n": 2**31 - 1, "stop": "e"}),
        ({}, {"n": 4, "shift_keep": 127}),
        ({"attention": "srf", "features": 4, "feature_seed": 2**64 - 1}, {}),
    ],
)
def test_all_that_options_may_ask_for_is_recorded(loaded, options, folder, tmp_path):
    """What a record refuses to read, no flag and no option takes."""
    with tinydrug.load(folder, ctx=128, cache="f32", **loaded) as engine:
        record = engine.generate(PROMPT, **{"n": 4} | options).record
        record.save(tmp_path / "record.json")
        assert Record.load(tmp_path / "record.json") == record
        assert engine.replay(record).ids == record.ids


def test_files(engine, tmp_path):
    record = engine.generate("Tell mé", n=3, drug=DRUG).record
    record.save(tmp_path / "record.json")
    assert os.listdir(tmp_path) == ["record.json"]
    assert Record.load(tmp_path / "record.json") == record
    with pytest.raises(ConfigError, match="cannot be written"):
        record.save(tmp_path / "missing" / "record.json")


def changed(*path):
    """A change of a record's JSON: all but the last are keys, the last is the new value."""
    *keys, value = path

    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


REFUSED = {
    "no object": (lambda data: [], "not a record"),
    "another format": (changed("format", "tinydrug record 9"), "not a record"),
    "a field missing": (lambda data: data.__delitem__("kept"), "kept: it is missing"),
    "a field too many": (changed("extra", 1), "extra: a record has no such field"),
    "made by text": (changed("made_by", "me"), "made_by: not an object"),
    "a model of nothing": (changed("model", {}), "model: None is not a text"),
    "a model without context": (changed("model", "n_ctx", "all"), "model: 'all' is not a whole number"),
    "a prompt of text": (changed("prompt_ids", "abc"), "prompt_ids: not a list"),
    "a prompt of fractions": (changed("prompt_ids", [1.5]), "prompt_ids: 1.5 is not a whole number"),
    "a prompt of truth": (changed("prompt_ids", [True]), "prompt_ids: True is not a whole number"),
    "a negative id": (changed("ids", [-1]), "ids: -1 is not a whole number"),
    "kept too many": (changed("kept", 18), "history: 18 tokens were kept of a prompt of 18"),
    "a history of nothing": (changed("history", [{}]), "history: a write has first, last, noise"),
    "a history too long": (
        lambda data: data.update(history=[{"first": 0, "last": 5, "noise": data["noise"]}]),
        "history: it makes 5 rows, not 0",
    ),
    "no noise": (changed("noise", None), "noise: a noise has schedule, seed"),
    "an unknown site": (changed("noise", "schedule", {"dose": [{"site": "Z", "theta": 1}]}), "noise: .*Z"),
    "an unknown option": (changed("noise", "schedule", {"dosis": []}), "noise: unknown key 'dosis'"),
    "a noise seed too large": (
        changed("noise", "seed", 2**64),
        "noise: seed 18446744073709551616 does not fit",
    ),
    "a temperature below zero": (changed("sampling", "temperature", -1), "sampling: --temp: -1"),
    "an unknown sampler": (changed("sampling", "mirostat", 2), "sampling: expected temperature, top_k"),
    "no seed": (changed("sampling", "seed", None), "sampling: expected temperature"),
    "a bias of text": (changed("sampling", "logit_bias", [[3, "much"]]), "sampling: could not convert"),
    "a bias of one": (changed("sampling", "logit_bias", [[3]]), "sampling: "),
    "n of text": (changed("n", "all"), "n: 'all' is not a whole number"),
    "a negative n": (changed("n", -1), "n: -1 is not"),
    "stops of text": (changed("stop", "abc"), "stop: not a list"),
    "stops of numbers": (changed("stop", [1]), "stop: 1 is not a text"),
    "perhaps": (changed("ignore_eos", "perhaps"), "ignore_eos: 'perhaps' is not true or false"),
    "a shift of text": (changed("shift_keep", "x"), "shift_keep: 'x'"),
    "a rewind of nothing": (changed("rewind_every", None), "rewind_every: None"),
    "an end of nothing": (changed("finish_reason", None), "finish_reason: None is not a text"),
    "an obstacle of truth": (changed("obstacle", True), "obstacle: True is not a text"),
}


@pytest.fixture(scope="module")
def plain(engine):
    return engine.generate(PROMPT, n=4, drug=DRUG, sampling=TIRED).record.to_json()


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_record_is_refused_by_field(what, plain, tmp_path):
    change, words = REFUSED[what]
    data, path = json.loads(plain), tmp_path / "record.json"
    replaced = change(data)
    path.write_text(json.dumps(data if replaced is None else replaced))
    with pytest.raises(ConfigError, match=words) as error:
        Record.load(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_record_cut_anywhere_is_refused(plain, tmp_path):
    path = tmp_path / "record.json"
    for cut in range(0, len(plain) - 2, 23):
        path.write_text(plain[:cut])
        with pytest.raises(ConfigError, match="not a record"):
            Record.load(path)
    for text in (b"\xff\xfe", b"[" * 100_000, b"null", b"7"):
        path.write_bytes(text)
        with pytest.raises(ConfigError, match="not a record"):
            Record.load(path)
    with pytest.raises(ConfigError):
        Record.load(tmp_path / "missing")


@pytest.mark.parametrize(
    "change",
    [
        changed("prompt_ids", [1, 96]),
        changed("prompt_ids", []),
        changed("prompt_ids", [5] * 200),
        changed("stop", [""]),
        changed("shift_keep", 128),
        changed("noise", "schedule", {"dose": [{"site": "V", "theta": 1, "layers": "7"}]}),
    ],
)
def test_a_record_that_does_not_fit_its_model_is_refused(change, plain, engine):
    data = json.loads(plain)
    change(data)
    with pytest.raises(TinydrugError) as error:
        engine.replay(Record.from_dict(data))
    assert "\n" not in str(error.value)


# --- prefixes used again


def fed(engine, monkeypatch):
    """A list to which every step adds how many tokens it was given."""
    counts, step = [], engine.runtime.step

    def counted(parts):
        counts.append(sum(len(part.ids) for part in parts))
        return step(parts)

    monkeypatch.setattr(engine.runtime, "step", counted)
    return counts


@pytest.fixture
def reusing(folder, monkeypatch):
    """reusing(**options) -> an engine that uses prefixes again."""
    made = []

    def make(**options):
        made.append(tinydrug.load(folder, **{"ctx": 128, "cache": "f32"} | options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def read_of(engine, monkeypatch, prompt, **options):
    """The completion, and how many prompt tokens were read for it."""
    with monkeypatch.context() as patch:
        counts = fed(engine, patch)
        done = engine.generate(prompt, **{"n": 6, "logprobs": 2, "ignore_eos": True} | options)
    return done, sum(counts) - max(0, len(done.ids) - 1)


TURNS = [  # a prompt, options, and how many of its tokens are read after those before it
    ([5] * 20, {}, 20),
    ([5] * 20 + [6] * 3, {}, 3),  # 25 rows are kept, of which 20 serve
    ([5] * 10 + [7] * 4, {}, 4),
    ([5] * 10 + [7] * 4, {}, 1),  # a token must be read to know what follows it
    ([5] * 10 + [7] * 9, {"drug": DRUG}, 5),  # a drugged request may use what was read without noise
    ([5] * 10 + [7] * 9, {"drug": DRUG, "drug_seed": 4}, 1),
    ([5] * 10 + [7] * 9 + [8], {}, 1),  # the generated ones were drugged, the prompt was not
    ([5] * 10 + [7] * 9 + [8] * 9, {"drug": f"{DRUG},prompt=last"}, 8),
    ([5] * 10 + [7] * 9 + [8] * 9, {"drug": f"{DRUG},prompt=all"}, 28),  # would be read under noise
    ([5] * 10, {}, 4),  # and 6 of these were in the sink
    ([5] * 9, {"drug": "sober,prompt=all"}, 1),  # no noise at all
    ([9] * 9, {}, 9),
]


def test_a_prefix_is_used_again_and_no_bit_changes(reusing, monkeypatch):
    keeping, anew = reusing(), reusing(prefix_reuse=False)
    for i, (prompt, options, count) in enumerate(TURNS):
        options = {"drug_seed": 1, "sampling": TIRED} | options
        done, n = read_of(keeping, monkeypatch, prompt, **options)
        fresh, all_of_it = read_of(anew, monkeypatch, prompt, **options)
        assert (n, all_of_it) == (count, len(prompt)), f"turn {i}"
        assert (done.ids, done.logprobs, done.moved) == (fresh.ids, fresh.logprobs, fresh.moved), f"turn {i}"
        assert_replays(done, anew)


def test_generated_tokens_are_used_again_when_sober(reusing, monkeypatch):
    engine = reusing()
    for drug, count in ((None, 2), (DRUG, 7)):  # five of six generated tokens were fed, then two are new
        done = engine.generate([5] * 20, n=6, ignore_eos=True, drug=drug)
        assert read_of(engine, monkeypatch, [*done.prompt_ids, *done.ids, 9])[1] == count


def test_what_was_sobered_up_is_used_again(reusing, monkeypatch):
    """Sobered up after every second token: the last one or two may be drugged."""
    engine, anew = reusing(rewind_every=2), reusing(prefix_reuse=False)
    done = engine.generate([5] * 20, n=9, ignore_eos=True, drug=DRUG, drug_seed=1)
    prompt = [*done.prompt_ids, *done.ids, 9]
    again, n = read_of(engine, monkeypatch, prompt)
    assert n <= 4 and again.logprobs == read_of(anew, monkeypatch, prompt)[0].logprobs


def test_protection_does_not_leak_into_the_next_request(reusing, monkeypatch):
    keeping, anew = reusing(), reusing(prefix_reuse=False)
    options = {"drug": f"{DRUG},prompt=last", "drug_seed": 1, "n": 9}
    keeping.generate([5] * 20, protect=range(128), protect_ids=range(96), verify=True, **options)
    done, _ = read_of(keeping, monkeypatch, [5] * 20, **options)
    fresh, _ = read_of(anew, monkeypatch, [5] * 20, **options)
    assert (done.logprobs, done.moved, done.verified) == (fresh.logprobs, fresh.moved, {})
    assert done.moved


def test_kept_sessions_of_the_caller_stay_the_callers(reusing, monkeypatch):
    engine = reusing()
    kept = engine.session()
    streamed(engine, kept, [5] * 20, n=4)
    assert read_of(engine, monkeypatch, [5] * 20)[1] == 20  # nobody else's
    before = list(kept.ids)
    engine.generate([5] * 20 + [6], n=4)
    assert kept.ids == before


def test_at_most_one_cache_is_kept(reusing, monkeypatch):
    engine = reusing()
    engine.generate(prompts=[[5 + i] * 9 for i in range(4)], n=2)
    assert len(engine._prefix._kept) == 1
    assert read_of(engine, monkeypatch, [8] * 9)[1] == 1  # the last
    assert read_of(engine, monkeypatch, [5] * 9)[1] == 9
    engine.close()
    assert len(engine._prefix._kept) == 0
    assert read_of(engine, monkeypatch, [5] * 9)[1] == 9


def test_a_batch_shares_with_one_of_it(reusing, monkeypatch):
    keeping, anew = reusing(), reusing(prefix_reuse=False)
    keeping.generate([5] * 20, n=2)
    options = {"prompts": [[5] * 20 + [6], [5] * 20 + [7]], "n": 5, "logprobs": 2}
    counts = fed(keeping, monkeypatch)
    assert [each.logprobs for each in keeping.generate(**options)] == [
        each.logprobs for each in anew.generate(**options)
    ]
    assert sum(counts) == 1 + 21 + 2 * 4


def test_a_closed_stream_leaves_a_sound_prefix(reusing, monkeypatch):
    keeping, anew = reusing(), reusing(prefix_reuse=False)
    with keeping.stream([5] * 20, n=50, drug=DRUG) as stream:
        next(stream)
        assert read_of(keeping, monkeypatch, [5] * 20)[1] == 20  # it is in use
        next(stream)
    done, n = read_of(keeping, monkeypatch, [5] * 20 + [6])
    assert n == 1 and done.logprobs == read_of(anew, monkeypatch, [5] * 20 + [6])[0].logprobs
    stream = keeping.stream([5] * 20 + [6])  # never begun
    stream.close()
    assert read_of(keeping, monkeypatch, [5] * 20 + [6])[1] == 1


def test_a_failed_generation_leaves_no_prefix(reusing, monkeypatch):
    engine = reusing()

    def fail(z, ids):
        raise RuntimeError("no more")

    engine.generate([5] * 20, n=2)
    with pytest.raises(RuntimeError):
        engine.generate([5] * 20, n=2, sampling=Sampling(processors=(fail,)))
    assert read_of(engine, monkeypatch, [5] * 20)[1] == 20


def test_prefixes_of_a_ring_that_has_wrapped(tmp_path, monkeypatch):
    folder, options = add_tokenizer(tiny.build("mistral-window", tmp_path)), {"chunk": 16, "rewind_every": 0}
    with (
        tinydrug.load(folder, ctx=512, **options) as keeping,
        tinydrug.load(folder, ctx=512, prefix_reuse=False, **options) as anew,
    ):
        text = [5, 6, 7] * 60
        # Of 186 positions the ring of 64 holds what the 150th sees, but not what the 21st does.
        for prompt, count in ((text, 180), (text + [8], 1), (text[:150], 1), (text[:20], 20), (text[:25], 5)):
            done, n = read_of(keeping, monkeypatch, prompt)
            assert done.logprobs == read_of(anew, monkeypatch, prompt)[0].logprobs
            assert n == count


def test_prefixes_in_several_threads(reusing):
    keeping, anew = reusing(), reusing(prefix_reuse=False)
    prompts = [[5] * 20 + [6 + i] * (1 + i) for i in range(4)]
    expected = [anew.generate(p, n=6, drug=DRUG, drug_seed=i).ids for i, p in enumerate(prompts)]
    found = [None] * 4

    def work(i):
        found[i] = [keeping.generate(prompts[i], n=6, drug=DRUG, drug_seed=i).ids for _ in range(8)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[ids] * 8 for ids in expected]


def test_adopted_rows_are_the_new_sequences_alone(engine):
    """What the old one is told later does not reach them; dirty rows are never given."""
    old, new = engine.session(), engine.session(DRUG, 1)
    old.feed([5] * 20)
    new.adopt(old, 12)
    assert new.ids == [5] * 12 and new.schedule == Schedule.parse(DRUG) and new.history == []
    fresh = engine.session(DRUG, 1)
    fresh.feed([5] * 12)
    np.testing.assert_array_equal(new.feed([6, 7, 8], "all", 3), fresh.feed([6, 7, 8], "all", 3))


# --- the command


@pytest.fixture
def command(tmp_path):
    """command(*words, status=0) -> (stdout, stderr) of the command in a folder of its own."""

    def run(*words, status=0, **variables):
        done = subprocess.run(
            [sys.executable, str(CHECKOUT / "cli.py"), *map(str, words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"TINYDRUG_HOME": str(tmp_path / "home")} | variables,
            timeout=300,
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr

    return run


FLAGS = f"-no-cnv -n 24 --drug {DRUG} --temp 0.9 -s 3 --top-k 30 --ignore-eos --cache-type f32".split()


def test_the_command_records_and_replays(command, folder, tmp_path):
    out, _ = command("-m", folder, "-p", PROMPT, *FLAGS, "--record", "record.json", "-q")
    assert Record.load(tmp_path / "record.json").text.rstrip("\n") == out.rstrip("\n") != ""
    for flags in (("-t", 1), ("-t", -1), ("-m", folder)):
        again, said = command("replay", "record.json", *flags)
        assert again == out and said.splitlines()[-1] == "identical: 24 tokens"
    assert command("replay", "record.json", "-q") == (out, "")


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """As `command`, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYDRUG_HOME", str(tmp_path / "home"))

    def run(*words, status=0):
        assert main(list(map(str, words))) == status, capsys.readouterr().err
        return capsys.readouterr()

    return run


def test_the_command_says_what_differs(here, folder, tmp_path):
    here("-m", folder, "-p", PROMPT, *FLAGS, "--record", "record.json")
    whole = json.loads((tmp_path / "record.json").read_text())
    path = tmp_path / "changed.json"

    def replay(status, *words, **fields):
        path.write_text(json.dumps(whole | fields))
        return here("replay", path, *words, status=status).err.splitlines()[-1]

    ids = whole["ids"]
    was, now = (ids[7] + 1) % 96, ids[7]
    expected = f"error: not the same: token 7 was {was}, now it is {now}"
    assert replay(1, ids=[*ids[:7], was, *ids[8:]]) == expected
    assert replay(1, n=20) == "error: not the same: it had 24 tokens, now it has 20"
    model = whole["model"]
    assert "cannot be the same: weights was 'abc'" in replay(1, model=model | {"weights": "abc"})
    assert "quant" in replay(2, model=model | {"quant": "q3"})
    assert replay(2, model=model | {"source": "elsewhere", "name": "nobody-has-this"}).startswith(
        "error: no model"
    )
    assert (
        replay(0, "-m", folder, model=model | {"source": "elsewhere", "name": "x"}) == "identical: 24 tokens"
    )
    assert replay(2, obstacle="code").startswith(f"error: {path}: it cannot be replayed: code")
    assert replay(2, kept=99).startswith(f"error: {path}: history: ")
    made_by = whole["made_by"] | {"numba": "0.1"}
    assert replay(0, made_by=made_by) == "identical: 24 tokens"


def test_bad_words(here, folder):
    for words, expected in (
        (("replay",), "RECORD"),
        (("replay", "missing.json"), "missing.json: "),
        (("replay", folder / "config.json"), "not a record"),
        (("replay", folder / "config.json", "-t", "x"), "--threads"),
        (("replay", folder), "gqa: "),
        (("-m", folder, "-p", "a", "--record", "missing/record.json"), "--record: missing/record.json: "),
        (("-m", folder, "-p", "a", "--record", "-"), "--record: give it a file of its own"),
        (("-m", folder, "-p", "a", "--record", "x", "-o", "x"), "--record: give it a file of its own"),
    ):
        out, said = here(*words, status=2)
        assert not out and len(said.splitlines()) == 1 and expected in said


def test_an_answer_of_a_chat_is_recorded_on_request(engine, tmp_path, capsys):
    from tinydrug.cli.chat import Chat
    from tinydrug.cli.talk import Talk

    args = parse(["-no-cnv", "-n", "6", "--drug", DRUG, "--ignore-eos", "-s", "3"])
    path = tmp_path / "answer.json"
    with Console(color="never") as console:
        chat = Chat(Talk(args, inputs.read(args), engine, console), console)
        chat._command(f"/record {path}")
        assert chat._turn("Tell me") and chat._turn("")
        chat._command("/record")
        chat._command(f"/record {path}")
    said = capsys.readouterr().err
    assert "error: /record: nothing is answered yet\n" in said
    assert "error: /record FILE: the name is missing\n" in said
    record = Record.load(path)
    assert record.history and len(record.prompt_ids) == 7 + 6  # the second went on where the first ended
    assert engine.replay(record).ids == record.ids


def test_a_chat_is_not_recorded_by_a_flag(here, folder, monkeypatch):
    monkeypatch.setattr(inputs, "is_interactive", lambda args: True)
    said = here("-m", folder, "--record", "x", status=2).err
    assert said == "error: --record is for one answer: in a chat, /record FILE keeps the last\n"


def test_the_command_replays_smollm2(command, smollm2, tmp_path):
    flags = ("-m", smollm2, "-p", "Tell me about the sea.", "-n", 40, "-s", 3)
    for drug in ("V:0.3,A:0.2", "sober"):
        out, _ = command(*flags, "--drug", drug, "--record", "record.json", "-t", 1)
        again, said = command("replay", "record.json", "-t", 2 if (os.cpu_count() or 1) > 1 else 1)
        assert again == out and "identical: " in said.splitlines()[-1]
