"""The state of a sequence elsewhere: forked, retraced from its history, saved to a file and loaded again."""

import errno
import json
import os
import resource
import shutil

import numpy as np
import pytest
import tiny
from engines import edited, runtime, session
from hypothesis import given
from hypothesis import strategies as st

from tinydrug.engine import history, snapshot
from tinydrug.engine.history import Noise, Write
from tinydrug.engine.session import Session
from tinydrug.errors import BadModelFile, ConfigError, TinydrugError
from tinydrug.formats import safetensors
from tinydrug.kernels.memory import LINE
from tinydrug.noise import Schedule

DRUG = "H:0.2,pK:0.4,K:0.5,V:0.5,A:0.3,drift:-0.2,diffusion:0.1@1,sink=2"
NAMES = ["llama-gqa", "mistral-window", "gpt2"]


def ids(n: int, name: str = "snapshot") -> list[int]:
    return (3 + tiny.counter_hash(name, n) % np.uint64(tiny.VOCAB - 4)).astype(int).tolist()


@pytest.fixture(scope="module")
def run(runtimes):
    """run(name, **options) -> a runtime, built once for these options; chunks of 16 tokens."""

    def make(name="llama-gqa", **options):
        return runtimes(name, **({"n_ctx": 64 if name == "gpt2" else 256, "chunk": 16} | options))

    return make


def interrupted(after: int):
    """An interrupt for sober_up that lets so many chunks be done."""
    asked = iter([False] * after)
    return lambda: next(asked, True)


def nothing(sequence):
    pass


def read(sequence):
    sequence.feed(ids(33))


def drugged(sequence):
    sequence.feed(ids(20))
    sequence.feed(ids(9, "drugged"), "all")


def half_sober(sequence):
    drugged(sequence)
    sequence.feed(ids(6, "more"))
    sequence.sober_up(interrupted(1), chunk=4)
    sequence.dose(Schedule.parse("V:0.9~gauss+linear:40,prompt=last"), 9)
    sequence.feed(ids(7, "last"), "last")
    sequence.feed(ids(3, "then"), "all")


def gone_back(sequence):
    half_sober(sequence)
    sequence.rewind(12)


def guarded(sequence):
    sequence.protect(positions=[5, 22], ids=ids(9, "drugged")[2:4])
    drugged(sequence)


def wrapped(sequence):
    """Twice around a ring of 64 slots, where there is one."""
    for at in range(0, 40 if sequence.runtime.n_ctx < 100 else 140, 10):
        sequence.feed(ids(10, f"round {at}"), "all" if at == 30 else "none")
    sequence.rewind(5)


STATES = [nothing, read, drugged, half_sober, gone_back, guarded, wrapped]
everywhere = pytest.mark.parametrize("name", NAMES)
in_every_state = pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)


def made(model, state) -> Session:
    sequence = session(model, DRUG, 2**64 - 5)
    state(sequence)
    return sequence


def visible(sequence) -> dict:
    """All that a caller can see of a sequence but its cache."""
    names = ("ids", "pos", "spans", "dirty", "clean", "history", "schedule", "noise_seed", "rewind_every")
    return {name: getattr(sequence, name) for name in names} | {"moved": sequence.moved.tolist()}


def continued(sequence) -> list[np.ndarray]:
    """What a sequence gives from now on: under noise, sober, after going back, and sobered up."""
    out = [sequence.feed(ids(5, "next"), "all", 5), sequence.feed(ids(4, "after"), outputs=4)]
    sequence.rewind(6)
    out.append(sequence.feed(ids(3, "again"), "all", 3))
    sequence.sober_up()
    out.append(sequence.feed(ids(3, "sober"), outputs=3))
    return out


def assert_the_same(one: Session, other: Session) -> None:
    assert visible(one) == visible(other)
    for a, b in zip(continued(one), continued(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert visible(one) == visible(other)


# --- fork


@everywhere
@in_every_state
def test_a_fork_continues_as_one_that_read_everything_itself(name, state, run):
    original, alone = made(run(name), state), made(run(name), state)
    fork = original.fork()
    if state is not nothing:
        original.rewind(1)
    original.feed(ids(9, "elsewhere"), "all")  # must not show in the fork
    assert_the_same(fork, alone)


def test_a_fork_does_not_disturb_the_original(run):
    original, alone = made(run(), drugged), made(run(), drugged)
    for i in range(3):
        fork = original.fork()
        fork.feed(ids(20, f"fork {i}"), "all")
        fork.sober_up()
        fork.protect([0, 1, 2])
        fork.dose(Schedule.parse("A:1"), i)
    assert_the_same(original, alone)


def arrays(value) -> list[np.ndarray]:
    """Every array that an object holds, however deep."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, (list, tuple)):
        return [array for each in value for array in arrays(each)]
    held = (
        vars(value).values()
        if hasattr(value, "__dict__")
        else value.values()
        if isinstance(value, dict)
        else ()
    )
    return [
        array for each in held if not hasattr(each, "step") for array in arrays(each)
    ]  # not the runtime's


def test_a_fork_shares_nothing_that_can_be_written(run):
    original = made(run(), half_sober)
    original.verify(True)
    fork = original.fork()
    assert fork.runtime is original.runtime
    assert len(arrays(fork)) == len(arrays(original)) >= 6
    for one in arrays(original):
        assert not any(np.shares_memory(one, other) for other in arrays(fork))
    for name in ("ids", "spans", "history"):
        assert getattr(fork, name) == getattr(original, name) and getattr(fork, name) is not getattr(
            original, name
        )
    assert fork.cache.keys.ctypes.data % LINE == fork.cache.values.ctypes.data % LINE == 0


@pytest.mark.parametrize("rows, blocks", [(0, 0), (1, 1), (16, 1), (17, 2), (100, 7)])
def test_a_fork_copies_what_is_in_use_and_no_more(rows, blocks, run):
    original = session(run())
    if rows:
        original.feed(ids(rows))
    fork = original.fork()
    assert fork.cache.keys.any((0, 1, 3, 4)).sum() == fork.cache.by_block().any((0, 1, 3, 4)).sum() == blocks


# --- history


def test_a_history_is_what_was_written(run):
    sequence = made(run(), half_sober)
    one, other = (write.noise for write in (sequence.history[0], sequence.history[-1]))
    assert [(write.first, write.last, write.noise) for write in sequence.history] == [
        (20, 29, one),
        (29, 35, None),
        (20, 24, None),
        (35, 41, None),
        (
            41,
            45,
            other,
        ),  # the last token of a prompt, and three generated ones: born where the sober ones end
    ]
    assert (one.schedule, one.seed, one.born) == (Schedule.parse(DRUG), 2**64 - 5, 20)
    assert (other.seed, other.born) == (9, 41)
    assert (sequence.clean, sequence.spans) == (24, [(24, 29), (41, 45)])
    sequence.sober_up()
    assert sequence.history == [] and sequence.clean == sequence.pos == 45


@everywhere
@in_every_state
def test_a_history_retraces_every_bit(name, state, run):
    original = made(run(name), state)
    again = session(run(name, threads=1, chunk=7))
    again.rewind_every = original.rewind_every
    again.retrace(
        original.ids, [Write.from_dict(json.loads(json.dumps(w.to_dict()))) for w in original.history]
    )
    again.put_noise(original.noise)
    again.moved[:] = original.moved
    assert_the_same(original, again)


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("feed"), st.integers(1, 9), st.sampled_from(["none", "none", "last", "all", "all"])
        ),
        st.tuples(st.just("rewind"), st.integers(0, 12), st.none()),
        st.tuples(st.just("sober_up"), st.integers(0, 3), st.integers(1, 5)),
        st.tuples(
            st.just("dose"), st.sampled_from(["V:0.8", "A:0.5,pK:0.3,sink=0", "sober"]), st.integers(0, 2)
        ),
        st.tuples(st.just("protect"), st.integers(0, 30), st.none()),
        st.tuples(st.just("shift"), st.integers(0, 4), st.none()),
    ),
    max_size=14,
)


@given(steps=STEPS)
def test_any_history_is_sound_and_retraces_the_cache(steps, run):
    model = run("llama-mqa", n_ctx=160, threads=1)
    original = session(model, DRUG, 3)
    for i, (what, a, b) in enumerate(steps):
        if what == "feed":
            original.feed(ids(a, f"step {i}"), b)
        elif what == "rewind":
            original.rewind(min(a, original.pos))
        elif what == "sober_up":
            original.sober_up(interrupted(a), b)
        elif what == "dose":
            original.dose(Schedule.parse(a), b)
        elif what == "protect":
            original.protect([a, a + 2], ids(30)[a : a + 1])
        elif a < original.pos:
            original.shift(a)
    history.check(original.history, original.pos)
    assert bool(original.history) == (original.clean < original.pos)
    again, fork = session(model), original.fork()
    again.retrace(original.ids, original.history)
    for other in (again, fork):
        assert (other.ids, other.spans, other.clean, other.history) == (
            original.ids,
            original.spans,
            original.clean,
            original.history,
        )
        np.testing.assert_array_equal(*(held(each) for each in (other, original)))
    original.sober_up()
    sober = session(model)
    sober.retrace(original.ids, [])
    np.testing.assert_array_equal(*(held(each) for each in (sober, original)))


def held(sequence) -> np.ndarray:
    """Keys and values of its rows; the ring must not have wrapped."""
    keys, values, T = sequence.cache.keys, sequence.cache.values, sequence.pos
    L, G, blocks, d, lanes = keys.shape
    return np.stack([keys.swapaxes(3, 4).reshape(L, G, blocks * lanes, d)[:, :, :T], values[:, :, :T]])


NOISE = Noise(Schedule.parse("V:0.1"), 1)


@pytest.mark.parametrize(
    "writes, rows",
    [
        ([(5, 9, None)], 9),  # what is first written sober was never drugged
        ([(5, 5, NOISE)], 5),
        ([(5, 9, NOISE), (10, 12, NOISE)], 12),  # a hole
        ([(5, 9, NOISE), (7, 12, None)], 12),  # neither again nor after
        ([(5, 9, NOISE), (5, 7, NOISE)], 9),  # nobody writes rows anew under noise
        ([(5, 9, NOISE)], 8),
        ([(5, 9, NOISE)], 10),
    ],
)
def test_an_impossible_history_is_refused(writes, rows):
    with pytest.raises(ValueError):
        history.check([Write(*write) for write in writes], rows)


# --- files


def around(sequence, tmp_path) -> Session:
    sequence.save(tmp_path / "session.safetensors")
    return Session.load(sequence.runtime, tmp_path / "session.safetensors")


@everywhere
@in_every_state
@pytest.mark.parametrize("cell", ["f16", "f32"])
def test_a_loaded_session_continues_bit_for_bit(name, state, cell, run, tmp_path):
    original = made(run(name, cell=cell), state)
    assert_the_same(around(original, tmp_path), original)


def test_it_continues_on_other_threads_and_in_other_chunks(run, tmp_path):
    original = made(run(), half_sober)
    original.save(tmp_path / "a")
    assert_the_same(Session.load(run(threads=1, chunk=100), tmp_path / "a"), original)


def test_a_loaded_ring_refuses_what_the_original_would(run, tmp_path):
    original = made(run("mistral-window"), wrapped)
    loaded = around(original, tmp_path)
    assert original.cache.slots == 64 and original.pos == 135
    for sequence in (original, loaded):
        with pytest.raises(ValueError, match="no longer hold"):
            sequence.rewind(45)
        sequence.rewind(44)
    np.testing.assert_array_equal(*(each.feed(ids(9), "all", 9) for each in (original, loaded)))


def test_what_was_forgotten_is_not_in_the_file(run, tmp_path):
    forgetful, innocent = (made(run(), read) for _ in range(2))
    forgetful.feed(ids(60, "secret"))
    forgetful.rewind(60)
    forgetful.save(tmp_path / "forgetful")
    innocent.save(tmp_path / "innocent")
    one, other = (safetensors.read(tmp_path / name) for name in ("forgetful", "innocent"))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name].data, other[name].data)


def test_a_file_is_as_large_as_what_it_holds(run, tmp_path):
    sizes = []
    for rows in (16, 32, 160):
        sequence = session(run())
        sequence.feed(ids(rows))
        sequence.save(tmp_path / "a")
        sizes.append(os.path.getsize(tmp_path / "a") - 4 * rows)
    L, G, d = 3, 2, 32
    assert abs(sizes[1] - sizes[0] - 2 * L * G * 16 * d * 4) < 100
    assert abs(sizes[2] - sizes[0] - 2 * L * G * 144 * d * 4) < 100


def test_the_file_is_a_safetensors_file(run, tmp_path):
    from safetensors import safe_open

    sequence = made(run(), drugged)
    sequence.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert sorted(file.keys()) == ["ids", "keys", "values"]
        assert file.get_tensor("ids").tolist() == sequence.ids
        assert file.get_tensor("keys").shape == (3, 2, 2, 32, 16)
        assert json.loads(file.metadata()["identity"])["quant"] == "none"
        assert json.loads(file.metadata()["state"])["noise"]["seed"] == 2**64 - 5


# --- files that are refused


@pytest.fixture
def saved(run, tmp_path):
    """A saved session that is small, and the runtime it belongs to."""
    model = run("llama-mqa")
    sequence = session(model, DRUG, 1)
    sequence.feed(ids(5))
    sequence.feed(ids(4, "drugged"), "all")
    path = tmp_path / "session.safetensors"
    sequence.save(path)
    return path, model


def refusal(model, path, kind=TinydrugError) -> str:
    with pytest.raises(kind) as error:
        Session.load(model, path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and error.value.exit_status == 2
    return message


def test_a_file_cut_anywhere_is_refused(saved):
    path, model = saved
    whole = path.read_bytes()
    cuts = {*range(0, 64), *range(64, len(whole), 97), *range(len(whole) - 40, len(whole))}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        refusal(model, path, BadModelFile)
    path.write_bytes(whole + b"\0")
    refusal(model, path, BadModelFile)
    path.write_bytes(whole)
    Session.load(model, path)


def test_a_file_changed_anywhere_is_refused(saved):
    path, model = saved
    whole = path.read_bytes()
    for at in {*range(0, 600), *range(600, len(whole), 211), len(whole) - 1}:
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        refusal(model, path)


def test_what_is_no_session_is_refused(run, tiny_model, tmp_path):
    model, path = run("llama-mqa"), tmp_path / "file"
    assert "not a session" in refusal(model, tiny_model("llama-mqa") / "model.safetensors", BadModelFile)
    refusal(model, tmp_path, BadModelFile)
    assert os.strerror(errno.ENOENT) in refusal(model, path, BadModelFile)
    for text in (b"", b"{}", b"\0" * 100, json.dumps({"format": "tinydrug session 1"}).encode()):
        path.write_bytes(text)
        refusal(model, path, BadModelFile)


@pytest.mark.parametrize(
    "options, field, words",
    [
        ({"quant": "q8"}, "quant", "quant was 'none', here it is 'q8'"),
        ({"cell": "f16"}, "cache", "cache was 'f32', here it is 'f16'"),
        ({"n_ctx": 200}, "n_ctx", "n_ctx was 256, here it is 200"),
        ({"tokenizer": lambda: "other"}, "tokenizer", "tokenizer was '', here it is 'other'"),
    ],
)
def test_a_session_of_another_engine_is_refused_by_name(options, field, words, saved, tiny_model, run):
    path, _ = saved
    tokenizer = options.pop("tokenizer", None)
    model = run("llama-mqa", **options)
    if tokenizer:
        model = runtime(tiny_model("llama-mqa"), n_ctx=256, chunk=16)
        model._tokenizer = tokenizer
    with pytest.raises(ConfigError) as error:
        Session.load(model, path)
    assert str(error.value) == f"{path}: saved with another model: {words}" and error.value.field == field


def test_a_ring_of_another_size_is_refused(run, tmp_path):
    made(run("mistral-window"), read).save(tmp_path / "a")
    message = refusal(run("mistral-window", chunk=100), tmp_path / "a", ConfigError)
    assert message.endswith("slots was 64, here it is 128")


def test_a_session_of_other_weights_or_config_is_refused_by_name(saved, tiny_model, tmp_path):
    path, _ = saved

    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 7] += 1
        return tensors

    for folder, what in (
        (edited(tiny_model("llama-mqa"), tmp_path / "weights", change), "weights was '"),
        (
            edited(tiny_model("llama-mqa"), tmp_path / "config", rms_norm_eps=1e-4),
            "config.norm_eps was 1e-05, here",
        ),
    ):
        model = runtime(folder, n_ctx=256, chunk=16)
        assert f"another model: {what}" in refusal(model, path, ConfigError)
        model.close()


def test_the_same_model_elsewhere_is_the_same(saved, tiny_model, tmp_path):
    path, _ = saved
    shutil.copytree(tiny_model("llama-mqa"), tmp_path / "copy")
    model = runtime(tmp_path / "copy", n_ctx=256, chunk=3, threads=1)
    assert Session.load(model, path).pos == 9
    model.close()


def test_a_session_of_another_version_is_refused(saved, monkeypatch):
    path, model = saved
    monkeypatch.setattr("tinydrug.__version__", "9.9")
    assert refusal(model, path, ConfigError).endswith("saved by tinydrug 0.1.0, this is 9.9")


def forged(path, change, tensors=lambda tensors: tensors) -> None:
    """Change the state of a saved session, and give it the digest of what it is then."""
    from safetensors.numpy import load_file, save_file

    texts = safetensors.read_metadata(path)
    state = json.loads(texts["state"])
    changed = change(state)
    texts["state"] = json.dumps(state if changed is None else changed)
    found = tensors(load_file(path))
    texts["digest"] = snapshot._digest(texts, found)
    save_file(found, path, texts)


def put(name, value):
    return lambda state: state.__setitem__(name, value)


def in_noise(name, value):
    return lambda state: state["noise"].__setitem__(name, value)


SENSELESS = {
    "no state": lambda state: [],
    "nothing": lambda state: {},
    "written too little": put("written", 8),
    "written too much": put("written", 257),
    "written half": put("written", 9.0),
    "true": put("written", True),
    "clean beyond the end": put("clean", 10),
    "clean before the start": put("clean", -1),
    "clean, with a history": put("clean", 9),
    "spans beyond the end": put("spans", [[5, 10]]),
    "spans before what is clean": put("spans", [[4, 9]]),
    "spans upside down": put("spans", [[9, 5]]),
    "spans that overlap": put("spans", [[5, 8], [7, 9]]),
    "spans of three": put("spans", [[5, 8, 9]]),
    "spans of nothing": put("spans", None),
    "history of less": put("history", []),
    "history of something": put("history", [{"first": 5, "last": 9}]),
    "history of text": put("history", ["x"]),
    "a site too few": put("moved", {}),
    "a negative count": lambda state: state["moved"].__setitem__("V", -1),
    "a count too large": lambda state: state["moved"].__setitem__("V", 2**63),
    "no noise": put("noise", None),
    "an unknown law": in_noise("schedule", {"dose": [{"site": "V", "theta": 1, "law": "nobody's"}]}),
    "layers it does not have": in_noise("schedule", {"dose": [{"site": "V", "theta": 1, "layers": "7"}]}),
    "a seed too large": in_noise("seed", 2**64),
    "a negative seed": in_noise("seed", -1),
    "born too late": in_noise("born", 257),
    "protecting text": in_noise("protect", "all"),
    "protecting fractions": in_noise("protect_ids", [1.5]),
    "a rewind of text": put("rewind_every", "often"),
}


@pytest.mark.parametrize("what", SENSELESS)
def test_a_state_that_makes_no_sense_is_refused_even_with_its_digest(what, saved):
    path, model = saved
    forged(path, SENSELESS[what])
    refusal(model, path, BadModelFile)


TENSORS = {
    "fewer ids": lambda t: t | {"ids": t["ids"][:3]},
    "more ids": lambda t: t | {"ids": np.zeros(300, np.int32)},
    "ids in a square": lambda t: t | {"ids": t["ids"].reshape(3, 3)},
    "ids of 64 bits": lambda t: t | {"ids": t["ids"].astype(np.int64)},
    "an id beyond the vocabulary": lambda t: t | {"ids": t["ids"] + 96},
    "a negative id": lambda t: t | {"ids": t["ids"] - 96},
    "keys of f16": lambda t: t | {"keys": t["keys"].astype(np.float16)},
    "keys of another head": lambda t: t | {"keys": t["keys"][..., :8, :].copy()},
    "fewer keys": lambda t: t | {"keys": t["keys"][:, :, :0].copy()},
    "more values": lambda t: t | {"values": np.concatenate([t["values"]] * 2, 2)},
    "no values": lambda t: {name: t[name] for name in ("ids", "keys")},
    "something else": lambda t: t | {"weights": np.zeros(1)},
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_fit_are_refused(what, saved):
    path, model = saved
    forged(path, lambda state: None, TENSORS[what])
    refusal(model, path, BadModelFile)


@pytest.mark.parametrize("text", ["", "7", "[]", "[" * 100_000, "nonsense"], ids=range(5))
@pytest.mark.parametrize("name", ["identity", "state"])
def test_metadata_that_are_not_json_are_refused(name, text, saved):
    from safetensors.numpy import load_file, save_file

    path, model = saved
    texts, found = safetensors.read_metadata(path) | {name: text}, load_file(path)
    texts["digest"] = snapshot._digest(texts, found)
    save_file(found, path, texts)
    refusal(model, path, BadModelFile)


# --- written whole or not at all


def test_saving_replaces_the_file_and_leaves_nothing_else(run, tmp_path):
    path = tmp_path / "a"
    for state in (read, drugged):
        made(run(), state).save(path)
        assert os.listdir(tmp_path) == ["a"]
    assert Session.load(run(), path).pos == 29
    (tmp_path / "link").symlink_to("a")
    made(run(), read).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and Session.load(run(), path).pos == 33


def test_a_full_disk_is_told_and_the_old_file_stays(saved, run):
    path, model = saved
    whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ConfigError, match="cannot be written: .*(File too large|os error 27)") as error:
            made(run(), wrapped).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert path.read_bytes() == whole and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("where", ["missing/a", ".", "a\0b"])
def test_where_nothing_can_be_written(where, run, tmp_path):
    with pytest.raises(ConfigError, match="cannot be written") as error:
        made(run(), read).save(f"{tmp_path}/{where}")
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == []
