"""Packed weights: the model's own bits, every damage refused, written whole or not at all, found again."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import tiny
from engines import add_tokenizer, logits, runtime
from safetensors.numpy import load_file
from test_dd_gpt2 import LAYOUTS, checkpoint  # noqa: F401 - a fixture
from test_kernels import tensor
from test_models import write_gguf

import tinydrug
from tinydrug.cli import main
from tinydrug.errors import BadModelFile, ConfigError, ModelNotFound, TinydrugError
from tinydrug.formats import packed
from tinydrug.formats.checkpoint import Checkpoint, open_checkpoint
from tinydrug.formats.tensor import KINDS, Tensor, byte_size
from tinydrug.formats.weights import Need, Weights
from tinydrug.kernels import checksum
from tinydrug.kernels.memory import LINE, PAGE, aligned, arena
from tinydrug.kernels.pack import FORMATS
from tinydrug.loading import quantize
from tinydrug.models.features import Features

CHECKOUT = Path(__file__).resolve().parent.parent
FILE = packed.FILE
IDS = tiny.ids("llama-mha")[:24].tolist()
DRUG = "H:0.2,V:0.3,A:0.4"


@pytest.fixture
def pack(tmp_path):
    """pack(path of a model, quant) -> the folder of its packed weights, and the runtime it was made of."""
    opened = []

    def make(path, quant="none", **options):
        model = runtime(path, quant=quant, **options)
        opened.append(model)
        folder = tmp_path / f"{quant}-packed"
        packed.save(folder, open_checkpoint(path), model.weights, f"from {path}\n")
        return folder, model

    yield make
    for model in opened:
        model.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer and a chat template."""
    folder = tiny.build("llama-bias", tmp_path_factory.mktemp("source") / "tiny-bias")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    return add_tokenizer(folder, "{% for m in messages %}{{ m.content }}{% endfor %}")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The folder where packed weights are kept."""
    monkeypatch.setenv("TINYDRUG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@contextmanager
def running(path, **options):
    model = runtime(path, **options)
    yield model
    model.close()


# --- the same bits


def same(folder: Path, model, quant: str = "none", drug: str = DRUG, **options) -> None:
    """The packed weights are the model's in every respect."""
    ids = [i % model.config.vocab_size for i in IDS]
    clean, drugged = logits(model, ids), logits(model, ids, drug, seed=3)
    with running(folder, quant=quant, **options) as other:
        assert list(other.weights.areas) == list(model.weights.areas)
        for name, area in other.weights.areas.items():
            assert area.ctypes.data % LINE == 0 and area.dtype == model.weights.areas[name].dtype
            np.testing.assert_array_equal(area, model.weights.areas[name])
        for name in ("n", "k"):
            np.testing.assert_array_equal(other.weights.table[name], model.weights.table[name])
        for name in ("scales", "bias", "gather"):
            assert ((other.weights.table[name] == 0) == (model.weights.table[name] == 0)).all()
        assert (other.weights.nbytes, other.bytes_per_token) == (model.weights.nbytes, model.bytes_per_token)
        assert other.identity == model.identity
        np.testing.assert_array_equal(logits(other, ids), clean)
        np.testing.assert_array_equal(logits(other, ids, drug, seed=3), drugged)


@pytest.mark.parametrize(
    "name, quant",
    [
        ("llama-mha", "none"),  # f32
        ("llama-mqa", "none"),  # f16
        ("mistral-full", "none"),  # bf16
        ("llama-sharded", "q4"),
        ("llama-gqa", "q8"),  # a tied head
        ("llama-gqa", "none"),
        ("llama-head12", "q4"),  # padded heads, a tied head
        ("llama-bias", "q4"),
        ("llama-bias", "f32"),
        ("mistral-window", "q8"),
        ("gpt2", "none"),  # biases, one matrix for q, k and v, a table of positions
        ("gpt2", "q8"),
        ("gpt2-prefix", "q4"),
    ],
)
def test_every_architecture_and_quantisation(name, quant, pack, tiny_model):
    same(*pack(tiny_model(name), quant), quant)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dd_gpt2(layout, pack, checkpoint):  # noqa: F811
    folder, model = pack(checkpoint(*LAYOUTS[layout]), "q8")
    same(folder, model, "q8")
    terms = "drift:0.3,diffusion:0.1"
    with running(folder) as other:
        np.testing.assert_array_equal(logits(other, IDS, terms), logits(model, IDS, terms))


def test_srf(pack, tiny_model):
    features = Features(40, seed=3)
    folder, model = pack(tiny_model("llama-gqa"), "q8", features=features)
    same(folder, model, "q8", "H:0.2,A:0.4", features=features)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_gguf(kind, pack, tmp_path, monkeypatch):
    """Its rotary rows lie differently, and its metadata say what a config.json would; here, factors, too."""
    monkeypatch.setitem(tiny.SPECS, "twin", tiny._llama(32, 2, 1, head_dim=16, tie_word_embeddings=True))
    weights = load_file(tiny.build("twin", tmp_path / "twin") / "model.safetensors")
    factors = {"rope_freqs.weight": np.linspace(1, 7.3, 8, dtype=np.float32)}
    write_gguf(tmp_path / "m.gguf", tiny.SPECS["twin"], weights, kind, "llama", factors)
    folder, model = pack(tmp_path / "m.gguf")
    same(folder, model)
    assert open_checkpoint(folder).metadata == open_checkpoint(tmp_path / "m.gguf").metadata


ROWS, COLUMNS = 80, 512


def stored(kind: str) -> Tensor:
    """A tensor of this kind: numbers, or blocks of any bits. Of a format that no file has: of floats."""
    if kind in KINDS and FORMATS[kind].group:
        nbytes = byte_size("", "w", kind, (ROWS, COLUMNS))
        blocks = tiny.counter_hash("stored", -(-nbytes // 8)).astype("<u8").view(np.uint8)[:nbytes]
        return Tensor("w", (ROWS, COLUMNS), kind, blocks, "test")
    return tensor("w", tiny.uniform("stored", (ROWS, COLUMNS)), kind if kind in KINDS else "f32")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name, tmp_path):
    """Panels of any format come back as they were; all are whole lines, or the next would not be aligned."""
    tensors, needs = {"w": stored(name)}, {"w": Need("w", (ROWS, COLUMNS), fine=name in KINDS)}
    before = Weights(needs, tensors, "none" if name in KINDS else name[:2], 2)
    assert before["w"].format == name and all(area.nbytes % LINE == 0 for area in before.areas.values())
    packed.save(tmp_path / "w", Checkpoint(tmp_path, None, {}, {}, tensors), before, "")
    opened, fields = packed.read(tmp_path / "w" / FILE)
    after = Weights(needs, fields["tensors"], "none", 2, packed=opened)
    assert after["w"] == before["w"] and after.fingerprint() == before.fingerprint()
    for area in before.areas:
        np.testing.assert_array_equal(after.areas[area], before.areas[area])


PINNED = {  # format, --quant: what a tensor becomes; if one changes, raise the number in packed.LAYOUT
    "f32 q8": "5227cb03a3d593ed",
    "f32 q4": "59457dd72827a062",
    "f32": "ae8ff05ec5bb1f21",
    "f16": "4939102067f1a4df",
    "bf16": "4d5010f46253b2f6",
    "q8_0": "27b1e1f162d3bb20",
    "q4_0": "333e946363b238fe",
    "iq4_nl": "c56333b0aec8342f",
    "q5_0": "8ecd00b658ca5c6b",
    "q4_1": "a71943ce6bdc252a",
    "q5_1": "16a52337cbd70123",
    "q4_k": "6288f8a9a26d7171",
    "q5_k": "8672f494d273dc96",
    "q6_k": "eb6692b16d7b1949",
}


@pytest.mark.parametrize("name", PINNED)
def test_a_format_that_packs_otherwise_needs_another_layout(name):
    kind, _, quant = name.partition(" ")
    found = Weights({"w": Need("w", (ROWS, COLUMNS))}, {"w": stored(kind)}, quant or "none", 1)
    assert found.fingerprint()[:16] == PINNED[name]
    assert quant or found["w"].format == kind
    assert packed.LAYOUT == "panels 16 x 32, 4"


def test_what_a_checkpoint_says_of_itself(pack, source):
    folder, model = pack(source, "q4")
    was, now = open_checkpoint(source), open_checkpoint(folder)
    assert (now.config, now.generation_config, now.metadata) == (was.config, was.generation_config, None)
    assert (now.n_parameters, now.folder, now.path) == (was.n_parameters, folder, folder)
    assert now.nbytes == model.weights.nbytes == sum(now.bytes_by_kind.values())
    assert set(now.bytes_by_kind) == {"q4_128", "q8_256", "f32"}
    assert open_checkpoint(folder / FILE).packed.formats == now.packed.formats == model.weights.formats
    about = tinydrug.inspect(folder)
    assert about.weight_bytes == {"none": now.nbytes, "q4": now.nbytes} and about.file_bytes == now.nbytes
    direct = tinydrug.inspect(source)
    assert (about.parameters, about.config) == (direct.parameters, direct.config)
    assert direct.weight_bytes["q4"] == now.nbytes


def test_the_file_is_one_that_the_safetensors_package_reads(pack, tiny_model):
    folder, model = pack(tiny_model("gpt2"), "q8")
    arrays = load_file(folder / FILE)
    json.loads(arrays.pop("checkpoint").tobytes())
    for name, area in model.weights.areas.items():
        np.testing.assert_array_equal(arrays[name], area)
    assert arrays.keys() == model.weights.areas.keys()


# --- checksums and memory


def stirred(data: bytes) -> str:
    """The checksum by its definition."""
    lines = np.frombuffer(data, "<u4").reshape(-1, 16)
    states = np.repeat(np.arange(1, 5, dtype=np.uint32)[:, None], 16, axis=1)
    for i, line in enumerate(lines):
        state = i % 4 if i < len(lines) // 4 * 4 else 0
        product = (states[state] ^ line) * np.uint32(0x7FEB352D)
        states[state] = product ^ (product >> np.uint32(15))
    return hashlib.sha256(states.astype("<u4").tobytes()).hexdigest()


@pytest.mark.parametrize("lines", [0, 1, 3, 4, 5, 8, 39])
def test_checksum(lines):
    area = aligned(LINE * lines, np.uint8)
    area[:] = np.random.default_rng(lines).integers(0, 256, len(area))
    seen = {checksum.digest(area)}
    assert seen == {stirred(area.tobytes())}
    for bit in range(0, 8 * len(area), 31):  # every bit flipped is noticed, and differs from every other
        area[bit // 8] ^= 1 << bit % 8
        seen.add(checksum.digest(area))
        area[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 1 + len(range(0, 8 * len(area), 31))
    if lines > 1:
        seen.add(checksum.digest(np.ascontiguousarray(area.reshape(lines, LINE)[::-1]).reshape(-1)))
        assert len(seen) == 2 + len(range(0, 8 * len(area), 31)), "lines in another order"


def test_an_arena_is_one_piece_of_whole_lines():
    shapes = {
        "a": (np.uint8, (3, 5)),
        "b": (np.float32, (7,)),
        "c": (np.uint8, (0, 4)),
        "d": (np.float32, (2, 32)),
    }
    made = arena(shapes)
    starts = [made[name].ctypes.data for name in "abd"]
    assert [start - starts[0] for start in starts] == [0, 64, 128] and starts[0] % LINE == 0
    for name, (dtype, shape) in shapes.items():
        assert (made[name].dtype, made[name].shape, made[name].any()) == (dtype, shape, False)
        made[name][:] = 1
    assert made["a"].sum() == 15 and made["b"].sum() == 7


# --- damage


def load(folder: Path) -> None:
    """Open packed weights and bring every area in."""
    with running(folder):
        pass


def refused(folder: Path, reason: str = "") -> str:
    """Loading is refused in one line that names the file, for this reason -> the line."""
    with pytest.raises(BadModelFile) as caught:
        load(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / FILE}: ") and message.isprintable() and len(message) < 800
    assert reason in message
    return message


@pytest.fixture
def tiny_packed(pack, tiny_model) -> Path:
    return pack(tiny_model("llama-gqa"), "q4")[0]


def test_every_kind_of_damage_is_noticed(tiny_packed):
    """A bit flipped in any part of the file: length, header, description, and every area at both ends."""
    file = tiny_packed / FILE
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    spans = [entry["data_offsets"] for name, entry in json.loads(whole[8:start]).items() if name[0] != "_"]
    positions = {*range(8), *range(8, start, 61), *range(start, len(whole), 4099)}
    positions |= {start + at for first, last in spans for at in (first, last - 1)}
    for position in sorted(positions):
        for flip in (0x80, 0x01):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            file.write_bytes(damaged)
            message = refused(tiny_packed)
            if position >= start:
                assert "run `tinydrug quantize` again" in message
    file.write_bytes(whole)
    load(tiny_packed)


def test_every_cut_is_noticed(tiny_packed):
    file = tiny_packed / FILE
    whole = file.read_bytes()
    for size in (*range(0, 200, 7), *range(200, len(whole), 1009), len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(tiny_packed)
    for more in (b"\0", whole):
        file.write_bytes(whole + more)
        refused(tiny_packed)


def rewritten(file: Path, change) -> None:
    """change(texts, about, areas) by someone who knows the format; areas: name -> [dtype, shape, bytes]."""
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    texts = header.pop("__metadata__")
    areas = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        areas[name] = [entry["dtype"], entry["shape"], whole[start + first : start + last]]
    about = json.loads(areas.pop("checkpoint")[2])
    change(texts, about, areas)
    content = json.dumps(about).encode()
    content += b" " * (-len(content) % PAGE)
    areas = {"checkpoint": ["U8", [len(content)], content], **areas}
    texts["digests"] = json.dumps({name: stirred(data) for name, (_, _, data) in areas.items()})
    signed = [texts.get(name) for name in ("format", "layout", "quant", "source", "digests")]
    texts["digest"] = hashlib.sha256(json.dumps(signed).encode()).hexdigest()
    header, end = {"__metadata__": texts}, 0
    for name, (dtype, shape, data) in areas.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in areas.values()))


def test_rewritten_as_it_was(tiny_packed):
    before = (tiny_packed / FILE).read_bytes()
    rewritten(tiny_packed / FILE, lambda *_: None)
    assert (tiny_packed / FILE).read_bytes() == before


def put(at: int, *path, value):
    """A change of (texts, about, areas)[at] at this path; value None takes it out."""

    def change(*parts):
        *inner, last = path
        place = parts[at]
        for key in inner:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return change


def narrower(texts, about, areas):
    areas["0.q_proj.data"][1:] = [2, 2, 256], areas["0.q_proj.data"][2][: 2 * 2 * 256]


def renamed(texts, about, areas):
    areas["stranger.data"] = areas.pop("norm.data")


def as_floats(texts, about, areas):
    dtype, shape, data = areas["0.q_proj.data"]
    areas["0.q_proj.data"] = ["F32", [len(data) // 4], data]


UNSOUND = {  # a change of a sound file, signed anew -> what is said of it
    "another program's": (put(0, "format", value="pt"), "not packed weights: run `tinydrug quantize` again"),
    "another layout": (
        put(0, "layout", value="panels 16 x 32, 0"),
        "the layout 'panels 16 x 32, 0', this version has 'panels 16 x 32, 4': run `tinydrug quantize` again",
    ),
    "no layout": (put(0, "layout", value=None), "packed in the layout None, this version has"),
    "no quantisation": (put(0, "quant", value=None), "not as it was written"),
    "no source": (put(0, "source", value=None), "not as it was written"),
    "an unknown format": (put(1, "formats", "0.q_proj", value="q9_9"), "formats that are not known: 'q9_9'"),
    "formats of another shape": (put(1, "formats", value=["q4_0"]), "is not an object of str"),
    "another format": (
        put(1, "formats", "0.q_proj", value="q8_0"),
        "tensor 0.q_proj.data: it is u8 (12, 2, 256), expected u8 (12, 2, 512)",
    ),
    "a weight without a format": (
        put(1, "formats", "0.q_proj", value=None),
        "does not hold 0.q_proj as its config describes it",
    ),
    "no config": (put(1, "config", value=None), "not as it was written"),
    "a config that is none": (put(1, "config", value=[]), "is not an object of object"),
    "a bigger config": (put(1, "config", "hidden_size", value=96), "do not fit the config"),
    "no metadata": (put(1, "metadata", value=None), "not as it was written: 'metadata'"),
    "metadata that are none": (put(1, "metadata", value="x"), "not as it was written"),
    "a tensor of no kind": (put(1, "tensors", "lm_head", value=["f33", [1]]), "tensor lm_head was 'f33' [1]"),
    "a tensor of no size": (
        put(1, "tensors", "lm_head", value=["f32", [-1]]),
        "tensor lm_head was 'f32' [-1]",
    ),
    "a tensor of all sizes": (put(1, "tensors", "lm_head", value=["f32", [1 << 62]]), "its shape overflows"),
    "a tensor described otherwise": (put(1, "tensors", "lm_head", value=[1]), "not as it was written"),
    "a tensor without a name": (put(1, "tensors", "\n", value=["f32", [1]]), "not printable"),
    "a missing area": (
        put(2, "0.q_proj.scales", value=None),
        "its areas are not those of its config: 0.q_proj.scales",
    ),
    "a strange area": (
        put(2, "x", value=["U8", [64], bytes(64)]),
        "its areas are not those of its config: x",
    ),
    "a renamed area": (renamed, "does not hold norm as its config"),
    "a narrower area": (narrower, "tensor 0.q_proj.data: it is u8 (2, 2, 256), expected u8 (12, 2, 256)"),
    "an area of floats": (as_floats, "tensor 0.q_proj.data: it is f32"),
}


@pytest.mark.parametrize("change, reason", UNSOUND.values(), ids=UNSOUND)
def test_files_that_are_signed_but_unsound(change, reason, tiny_packed):
    """No claim of a file is believed, whoever signed it: kernels trust what was checked here."""
    rewritten(tiny_packed / FILE, change)
    with pytest.raises(TinydrugError) as caught:
        load(tiny_packed)
    assert reason in str(caught.value) and str(caught.value).isprintable()


NONSENSE = (None, True, -1, 0, 3.5, 10**30, "x", [], [1], {}, {"x": "x"})
SIZES = (  # of a config: they say what the areas must be
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "attention_bias",
)


def test_nonsense_anywhere_in_the_description(tiny_packed):
    """Whatever stands in place of a value: the model runs, or one of our errors says why it does not."""
    before = (tiny_packed / FILE).read_bytes()
    paths = [("config",), ("generation_config",), ("metadata",), ("tensors",), ("formats",)]
    paths += [("config", name) for name in SIZES]
    paths += [("tensors", name) for name in ("lm_head.weight", "model.norm.weight")]
    paths += [("tensors", "model.norm.weight", at) for at in (0, 1)] + [("formats", "norm")]
    for path in paths:
        for value in NONSENSE:

            def change(texts, about, areas, path=path, value=value):
                *inner, last = path
                place = about
                for key in inner:
                    place = place[key] if key in place else place.setdefault(key, ["f32", [48]])
                place[last] = value

            (tiny_packed / FILE).write_bytes(before)
            rewritten(tiny_packed / FILE, change)
            with suppress(TinydrugError):
                load(tiny_packed)


def test_a_shifted_file_is_refused(tiny_packed):
    """Well formed, digests right, but no area begins a cache line."""
    file = tiny_packed / FILE
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    file.write_bytes(
        (length + 4).to_bytes(8, "little") + whole[8 : 8 + length] + b"    " + whole[8 + length :]
    )
    refused(tiny_packed, "it does not begin a cache line")


def test_a_drift_of_strange_size_is_refused(pack, checkpoint):  # noqa: F811
    """Its rows were computed from tensors that are gone: only by computing is it known how many they are."""
    folder, _ = pack(checkpoint(*LAYOUTS["gate"]))
    before = (folder / FILE).read_bytes()
    for width, reason in ((64, "it is f32 (1, 64), expected f32 (3, 128)"), (16, "does not hold 0.drift")):

        def change(texts, about, areas, width=width):
            areas["0.drift.data"][1:] = [1, width], areas["0.drift.data"][2][: 4 * width]

        (folder / FILE).write_bytes(before)
        rewritten(folder / FILE, change)
        refused(folder, reason)


def test_a_changed_byte_of_a_running_model_does_not_matter_to_the_next(tiny_packed):
    """Whoever replaces a file by renaming, as tinydrug does, disturbs no one who has it mapped."""
    with running(tiny_packed) as model:
        before = logits(model, IDS)
        shutil.copytree(tiny_packed, other := tiny_packed.with_name("other"))
        (other / FILE).write_bytes(bytes(os.path.getsize(tiny_packed / FILE)))
        os.replace(other / FILE, tiny_packed / FILE)
        np.testing.assert_array_equal(logits(model, IDS), before)
    refused(tiny_packed)


# --- written whole or not at all


def listing(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def opened(source):
    """A checkpoint and its weights, to save."""
    with running(source, quant="q8") as model:
        yield open_checkpoint(source), model.weights


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)], ids=repr
)
@pytest.mark.parametrize("when", ["writing", "syncing", "copying", "naming"])
def test_an_interrupted_write_changes_nothing(when, error, there, opened, tmp_path, monkeypatch):
    target = tmp_path / "packed"
    if there:
        packed.save(target, *opened, "the one before\n")
    before = listing(tmp_path)
    calls = []

    def fail(*_):
        calls.append(1)
        raise error

    progress = fail if when == "writing" else None
    if when == "syncing":
        monkeypatch.setattr(os, "fsync", fail)
    if when == "copying":
        monkeypatch.setattr(shutil, "copyfile", fail)
    if when == "naming":
        rename = os.rename
        monkeypatch.setattr(os, "rename", lambda a, b: fail() if a.name == "new" else rename(a, b))
    with pytest.raises(ConfigError if isinstance(error, OSError) else type(error)) as caught:
        packed.save(target, *opened, "from x\n", progress)
    assert calls and listing(tmp_path) == before and len(os.listdir(tmp_path)) == there
    if isinstance(error, OSError):
        assert str(caught.value) == f"--output: {target}: cannot be written: No space left on device"


def test_a_killed_process_leaves_nothing_for_long(opened, tmp_path):
    """What nobody holds is removed by the next; what another process still writes is not."""
    code = (
        "import os, sys; from pathlib import Path; from tinydrug.formats import packed\n"
        "with packed._scratch(Path(sys.argv[1])) as scratch:\n"
        "    (scratch / 'half').write_bytes(bytes(100)); print(scratch, flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=CHECKOUT, **pipes) as writer:
        scratch = Path(writer.stdout.readline().strip())
        packed.save(tmp_path / "one", *opened, "")
        assert (scratch / "half").exists()
        writer.kill()
    assert scratch.exists()
    packed.save(tmp_path / "two", *opened, "")
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_what_a_folder_holds(opened, source, tmp_path):
    """The tokenizer's files come along, links followed; a second time, all is replaced."""
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    packed.save(tmp_path / "deep" / "er", *opened, "from here\n")
    names = {
        FILE,
        "SOURCE",
        "tokenizer.json",
        "tokenizer_config.json",
        "additional_chat_templates/tool.jinja",
    }
    assert listing(tmp_path / "deep" / "er").keys() == names
    (tmp_path / "deep" / "er" / "tokenizer.json").write_text("{}")
    shutil.rmtree(source / "additional_chat_templates")
    packed.save(tmp_path / "deep" / "er", *opened, "from there\n")
    held = listing(tmp_path / "deep" / "er")
    assert (
        held.keys() == names - {"additional_chat_templates/tool.jinja"} and held["SOURCE"] == b"from there\n"
    )
    assert held["tokenizer.json"] == (source / "tokenizer.json").read_bytes()


REFUSED = {  # what is where the folder should be -> why it is refused
    "a file": (lambda path: path.write_text("mine"), "cannot be written: Not a directory"),
    "a model": (lambda path: (path.mkdir(), (path / "model.safetensors").touch()), "holds other things"),
    "more": (
        lambda path: (path.mkdir(), (path / FILE).touch(), (path / "notes.txt").touch()),
        "holds other things",
    ),
}


@pytest.mark.parametrize("prepare, reason", REFUSED.values(), ids=REFUSED)
def test_nothing_else_is_overwritten(prepare, reason, opened, tmp_path):
    prepare(tmp_path / "packed")
    before = listing(tmp_path)
    with pytest.raises(ConfigError) as caught:
        packed.save(tmp_path / "packed", *opened, "")
    assert reason in str(caught.value) and str(tmp_path / "packed") in str(caught.value)
    assert listing(tmp_path) == before


def test_a_full_disk_is_seen_before(opened, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=packed.ROOM + opened[1].nbytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(ConfigError, match="packed takes 0.0 GB and its disk has 0.1 left: make room"):
        packed.save(tmp_path / "packed", *opened, "")
    assert not os.listdir(tmp_path)


# --- found by itself


def test_kept_on_request_and_found_the_next_time(source, home, caplog):
    caplog.set_level("INFO", "tinydrug")
    with tinydrug.load(source, quant="q4", keep_packed=True) as engine:
        assert "the packed weights are kept in" in caplog.text
        expected, ids = engine.forward(IDS), engine.encode("Tell")
        record = engine.generate("Tell me", n=5, drug=DRUG, drug_seed=2).record
        assert (home / "tiny-bias-q4" / "SOURCE").read_text() == f"packed as q4 from {engine.source}\n"
    caplog.clear()
    kept = home / "tiny-bias-q4"
    for model, quant in (
        (source, "q4"),
        (kept, "none"),
        (kept, "q4"),
        ("tiny-bias-q4", "q4"),
        (kept / FILE, "none"),
    ):
        for mmap in (True, False):
            with tinydrug.load(model, quant=quant, mmap=mmap) as engine:
                weights = engine.runtime.weights
                assert weights.areas["embed.data"].flags.writeable != mmap, "mapped"
                np.testing.assert_array_equal(engine.forward(IDS), expected)
                assert (
                    engine.encode("Tell") == ids and engine.tokenizer.chat_template and weights.quant == "q4"
                )
                assert engine.tokenizer.eos_ids == {2, 7}
                again = engine.replay(record)
                assert (again.ids, again.record.model["weights"]) == (record.ids, record.model["weights"])
    assert caplog.text.count("weights from ") == 2  # where it was not named
    with tinydrug.load(source, quant="q8") as engine:
        assert engine.runtime.weights.areas["embed.data"].flags.writeable


def stale_file(source, kept):
    (source / "model.safetensors").touch()
    os.utime(source / "model.safetensors", (1, 1))


def other_tokenizer(source, kept):
    (source / "tokenizer.json").write_text((source / "tokenizer.json").read_text() + "\n")


def other_layout(source, kept):
    rewritten(kept / FILE, put(0, "layout", value="0"))


def cut(source, kept):
    os.truncate(kept / FILE, 1000)


def other_quant(source, kept):
    shutil.rmtree(kept)
    quantize(source, quant="q8", output=kept)


STALE = {
    stale_file: "it was packed from other files",
    other_tokenizer: "it was packed from other files",
    other_layout: "packed in the layout '0'",
    cut: "download incomplete?",
    other_quant: "it was packed from other files",
}


@pytest.mark.parametrize("change", STALE, ids=lambda change: change.__name__)
def test_what_no_longer_fits_is_told_and_packed_anew(change, source, home, tmp_path, caplog):
    mine = shutil.copytree(source, tmp_path / "mine")
    kept = quantize(mine, quant="q4")
    assert kept == home / "mine-q4"
    change(mine, kept)
    with tinydrug.load(mine, quant="q4") as engine:
        expected = engine.forward(IDS)
        assert STALE[change] in caplog.text and "not used" in caplog.text
        assert engine.runtime.weights.areas["embed.data"].flags.writeable
    tinydrug.load(mine, quant="q4", keep_packed=True).close()
    caplog.clear()
    with tinydrug.load(mine, quant="q4") as engine:
        assert not caplog.text and not engine.runtime.weights.areas["embed.data"].flags.writeable
        np.testing.assert_array_equal(engine.forward(IDS), expected)


def test_a_damaged_weight_is_refused_wherever_it_is_found(source, home):
    kept = quantize(source)
    content = bytearray((kept / FILE).read_bytes())
    content[-1] ^= 1
    (kept / FILE).write_bytes(content)
    for model, quant in ((source, "q4"), (kept, "none")):
        with pytest.raises(BadModelFile, match=r"tensor lm_head.scales: damaged: .* again"):
            tinydrug.load(model, quant=quant)


def test_the_source_may_go(source, home, tmp_path):
    """The packed weights are taken before anything is searched for elsewhere."""
    mine = shutil.copytree(source, home / "mine")
    kept = quantize("mine", quant="q8")
    with tinydrug.load("mine", quant="q8") as engine:
        expected, name = engine.forward(IDS), engine.name
    shutil.rmtree(mine)
    with tinydrug.load("mine", quant="q8", offline=True) as engine:
        np.testing.assert_array_equal(engine.forward(IDS), expected)
        assert (engine.name, name) == ("mine-q8", "mine")
    with pytest.raises(ModelNotFound):
        tinydrug.load("mine", quant="q4", offline=True)
    assert kept.is_dir()


def test_a_disk_that_does_not_take_them_stops_nothing(source, home, caplog):
    home.write_text("a file where the folder should be")
    with tinydrug.load(source, quant="q8", keep_packed=True) as engine:
        assert "the packed weights are not kept: --output: " in caplog.text
        assert engine.forward(IDS).shape == (len(IDS), tiny.VOCAB)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"quant": "q8"}, "was packed with --quant q4, not q8: leave it out"),
        (
            {"check_tensors": True},
            "--check-tensors: .* holds packed weights: check the model they were packed from",
        ),
    ],
)
def test_what_packed_weights_cannot_do(options, words, source, home):
    with pytest.raises(ConfigError, match=words):
        tinydrug.load(quantize(source), **options)


def test_quantize_refuses_what_load_would(source, home, tmp_path):
    with pytest.raises(ConfigError, match="are packed already: name what they were packed from"):
        quantize(quantize(source))
    with pytest.raises(ConfigError, match="--quant: 'q5' is not one of"):
        quantize(source, quant="q5")
    with pytest.raises(ModelNotFound):
        quantize("nowhere", offline=True)
    bare = shutil.copytree(source, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(BadModelFile, match="no tokenizer"):
        quantize(bare)
    nan = shutil.copytree(source, tmp_path / "nan")
    content = bytearray((nan / "model.safetensors").read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    (nan / "model.safetensors").write_bytes(content)
    with pytest.raises(BadModelFile, match="NaN or infinite"):
        quantize(nan, check_tensors=True)
    assert os.listdir(home) == ["tiny-bias-q4"]


def test_names_become_folders(home):
    from tinydrug.hub.kept import place_of

    assert place_of("mistral-7b", "q4") == home / "mistral-7b-q4"
    assert place_of("org/name@main", "none") == home / "org--name--main-packed"
    assert place_of("../a b", "q8") == home / "..--a--b-q8"


# --- the command


@pytest.fixture
def command(home):
    def run(*words, status: int = 0) -> tuple[str, str]:
        command = [sys.executable, str(CHECKOUT / "cli.py"), *map(os.fspath, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
        return done.stdout, done.stderr

    return run


def test_command(command, source, home, tmp_path):
    flags = ("-p", "Tell", "-no-cnv", "-n", "9", "--ignore-eos", "-s", "1", "--drug", "V:0.3", "-q")
    direct = command("-m", source, "--quant", "q4", *flags)
    out, said = command("quantize", source, "--quant", "q4", "-t", "1")
    assert (out, said) == (f"{home / 'tiny-bias-q4'}\n", "")
    assert command("-m", source, "--quant", "q4", *flags) == direct
    assert command("-m", "tiny-bias-q4", *flags) == direct
    out, _ = command("quantize", source, "-o", tmp_path / "mine", "-q")
    assert out == f"{tmp_path / 'mine'}\n" and command("-m", tmp_path / "mine", *flags) == direct
    _, said = command("-m", source, "--quant", "q8", "--keep-packed", "-p", "Tell", "-n", "1")
    assert f"the packed weights are kept in {home / 'tiny-bias-q8'}" in said
    out, _ = command("models")
    row = next(line for line in out.splitlines() if line.startswith("tiny-bias-q4"))
    assert "on disk" in row and row.endswith(f"packed as q4 from {source}")


@pytest.mark.parametrize(
    "words, message",
    [
        (("quantize",), "the following arguments are required: MODEL (see tinydrug quantize --help)"),
        (("quantize", "{source}", "--quant", "q7"), "--quant: invalid choice: 'q7'"),
        (("quantize", "{source}", "-o", "{source}"), "holds other things: name another folder"),
        (("quantize", "{source}/nothing"), "no model"),
        (("quantize", "{source}", "--quants", "q4"), "unrecognized arguments: --quants"),
    ],
)
def test_bad_commands(words, message, source, home, capsys):
    assert main([word.format(source=source) for word in words]) == 2
    out, said = capsys.readouterr()
    assert not out and said.startswith("error: ") and len(said.splitlines()) == 1 and message in said
