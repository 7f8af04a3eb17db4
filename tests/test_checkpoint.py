"""open_checkpoint: every layout a model comes in, and every folder that is not quite one."""

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import save, save_file
from test_gguf import ARRAY, STRING, U32, gguf_bytes, text

from tinydrug.errors import BadModelFile, ModelNotFound, UnsupportedModel
from tinydrug.formats.checkpoint import open_checkpoint

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIG = {"config.json": b'{"model_type": "llama"}'}
A, B = save({"a": np.float32([1, 2])}), save({"b": np.float16([[3], [4]]), "spare": np.zeros(1, np.float32)})


def gguf_model(*keys, architecture: str = "gpt2") -> bytes:
    """The smallest GGUF file that has a config."""
    sizes = ("embedding_length", "attention.head_count", "block_count", "context_length", "vocab_size")
    return gguf_bytes(
        [
            ("general.architecture", STRING, text(architecture)),
            *((f"gpt2.{name}", U32, struct.pack("<I", 8)) for name in sizes),
            ("gpt2.attention.layer_norm_epsilon", 6, struct.pack("<f", 1e-5)),
            *keys,
        ],
        [("token_embd.weight", (32, 8), 8, 0)],
        bytes(8 * 34),
    )


TOKENS = ("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 0))


def index(**weight_map) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


@pytest.fixture
def folder(tmp_path):
    def folder(files: dict[str, bytes]):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        return tmp_path

    return folder


def test_single_file(folder):
    path = folder(CONFIG | {SINGLE: A, "generation_config.json": b'{"eos_token_id": [2, 7]}'})
    for given in (path, str(path), path / SINGLE):
        checkpoint = open_checkpoint(given)
        assert str(checkpoint.path) == str(given) and checkpoint.folder == path
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.generation_config == {"eos_token_id": [2, 7]}
        assert checkpoint.metadata is None
        assert checkpoint.tensors["a"].float32().tolist() == [1, 2]


@pytest.mark.parametrize("mmap", [True, False])
def test_shards(folder, mmap):
    """The index wins over a single file; what it does not mention is left alone, damaged or not."""
    files = {
        INDEX: index(a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors"),
        "model-00001-of-00002.safetensors": A,
        "model-00002-of-00002.safetensors": B,
        SINGLE: b"damaged",
        "consolidated.safetensors": b"damaged",
        "pytorch_model.bin": b"never looked at",
    }
    checkpoint = open_checkpoint(folder(CONFIG | files), mmap)
    assert {name: tensor.float32().tolist() for name, tensor in checkpoint.tensors.items()} == {
        "a": [1, 2],
        "b": [[3], [4]],
    }
    assert [os.path.basename(tensor.path)[:11] for tensor in checkpoint.tensors.values()] == [
        "model-00001",
        "model-00002",
    ]
    assert (checkpoint.tensors["a"].mapping is not None) == mmap
    assert checkpoint.generation_config == {}


def test_snapshot_of_the_hugging_face_cache(tmp_path):
    """All files are links into ../../blobs, out of the folder that was asked for."""
    snapshot, blobs = tmp_path / "snapshots" / "0123abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    files = CONFIG | {
        INDEX: index(a="1.safetensors", b="2.safetensors"),
        "1.safetensors": A,
        "2.safetensors": B,
    }
    for number, (name, content) in enumerate(files.items()):
        (blobs / f"{number}").write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert list(open_checkpoint(snapshot).tensors) == ["a", "b"]
    (blobs / "3").unlink()
    with pytest.raises(BadModelFile, match="1 of 2 shards are missing, download incomplete. 2.safetensors"):
        open_checkpoint(snapshot)


def test_gguf_file_and_folder_of_one(folder):
    path = folder({"m.gguf": gguf_model(TOKENS), "README.md": b""})
    for given in (path, path / "m.gguf"):
        checkpoint = open_checkpoint(given)
        assert checkpoint.path == given
        assert checkpoint.folder is None  # its own tokenizer, not whatever lies beside it
        assert checkpoint.config["model_type"] == "gpt2"
        assert checkpoint.metadata["gpt2.context_length"] == 8
        assert checkpoint.generation_config == {}


def test_packed_weights_stand_for_the_folder(folder):
    """Whatever lies beside them; what they are is for test_packed.py."""
    path = folder({"packed.safetensors": A, **CONFIG, SINGLE: A, "m.gguf": gguf_model()})
    for given in (path, path / "packed.safetensors"):
        with pytest.raises(BadModelFile, match="packed.safetensors: not packed weights: run `tinydrug quan"):
            open_checkpoint(given)
    assert open_checkpoint(path / SINGLE).packed is None


def test_gguf_without_a_tokenizer_has_it_beside(folder):
    path = folder({"m.gguf": gguf_model()})
    assert open_checkpoint(path / "m.gguf").folder == path


def test_gguf_beside_other_weights(folder):
    """With a config.json the safetensors are the model; without one they cannot be."""
    path = folder({"m.gguf": gguf_model(), SINGLE: A})
    assert open_checkpoint(path).metadata is not None
    folder(CONFIG)
    assert open_checkpoint(path).metadata is None
    (path / SINGLE).unlink()
    assert open_checkpoint(path).metadata is not None


def test_sizes_without_touching_data(folder):
    path = folder(
        CONFIG | {INDEX: index(a="1.safetensors", b="2.safetensors"), "1.safetensors": A, "2.safetensors": B}
    )
    checkpoint = open_checkpoint(path)
    assert (checkpoint.nbytes, checkpoint.n_parameters) == (12, 4)
    assert checkpoint.bytes_by_kind == {"f32": 8, "f16": 4}
    (path / "m.gguf").write_bytes(gguf_model())
    checkpoint = open_checkpoint(path / "m.gguf")
    assert (checkpoint.nbytes, checkpoint.n_parameters) == (8 * 34, 8 * 32)
    assert checkpoint.bytes_by_kind == {"q8_0": 8 * 34}


SHARD = "1.safetensors"
REFUSED = {  # folder -> (error, pattern)
    "nothing": (
        {},
        BadModelFile,
        "not a model: expected config.json with model.safetensors or .* .gguf file",
    ),
    "config alone": (CONFIG, BadModelFile, "not a model: expected"),
    "Mistral's own layout": (CONFIG | {"consolidated.safetensors": A}, BadModelFile, "not a model: expected"),
    "no config": ({SINGLE: A}, BadModelFile, "config.json: cannot be read: No such file"),
    "pickle": (CONFIG | {"pytorch_model.bin": b""}, UnsupportedModel, "pickle checkpoints are not loaded"),
    "Meta's pickle": ({"consolidated.00.pth": b""}, UnsupportedModel, "convert it to safetensors"),
    "pt": ({"model.pt": b""}, UnsupportedModel, "pickle"),
    "two GGUF files": (
        {"a.gguf": gguf_model(), "b.gguf": gguf_model()},
        BadModelFile,
        "holds 2 GGUF files, name one of them: a.gguf, b.gguf",
    ),
    "damaged GGUF": ({"a.gguf": b"GGUF"}, BadModelFile, "a.gguf: ends inside its header"),
    "GGUF of another architecture": (
        {"a.gguf": gguf_model(architecture="rwkv")},
        UnsupportedModel,
        "a.gguf: GGUF architecture 'rwkv' is none of the supported: gpt2, llama",
    ),
    "part of a split GGUF": (
        {"a.gguf": gguf_model(("split.count", 2, b"\3\0"))},
        UnsupportedModel,
        "a.gguf: one part of a split GGUF: join the parts",
    ),
    "damaged safetensors": (
        CONFIG | {SINGLE: A[:-1]},
        BadModelFile,
        "model.safetensors: expected .* download",
    ),
    "config not JSON": ({"config.json": b"{", SINGLE: A}, BadModelFile, "config.json: not valid JSON"),
    "config not UTF-8": (
        {"config.json": b'{"a":"\xff"}', SINGLE: A},
        BadModelFile,
        "config.json: not valid JSON",
    ),
    "config a list": ({"config.json": b"[]", SINGLE: A}, BadModelFile, "holds a JSON list, not an object"),
    "config null": (
        {"config.json": b"null", SINGLE: A},
        BadModelFile,
        "holds a JSON NoneType, not an object",
    ),
    "config empty": ({"config.json": b"", SINGLE: A}, BadModelFile, "config.json: not valid JSON"),
    "config too deep": ({"config.json": b"[" * 100_000, SINGLE: A}, BadModelFile, "nested too deeply"),
    "config a Git LFS pointer": (
        {"config.json": b"version https://git-lfs.github.com/spec/v1\n", SINGLE: A},
        BadModelFile,
        "config.json: a Git LFS pointer",
    ),
    "generation config not JSON": (
        CONFIG | {SINGLE: A, "generation_config.json": b"x"},
        BadModelFile,
        "generation_config.json: not valid JSON",
    ),
    "index not JSON": (CONFIG | {INDEX: b"x"}, BadModelFile, "index.json: not valid JSON"),
    "index a list": (CONFIG | {INDEX: b"[1]"}, BadModelFile, "index.json: holds a JSON list"),
    "index without a map": (CONFIG | {INDEX: b"{}"}, BadModelFile, "no weight_map"),
    "index with a list": (CONFIG | {INDEX: b'{"weight_map": ["a"]}'}, BadModelFile, "no weight_map"),
    "index with nothing": (CONFIG | {INDEX: index()}, BadModelFile, "no weight_map"),
    "shard a number": (
        CONFIG | {INDEX: index(a=1)},
        BadModelFile,
        "tensor a: shard 1 is not a bare file name",
    ),
    "a tensor name with a newline": (
        CONFIG | {INDEX: index(**{"a\n": SHARD})},
        BadModelFile,
        "not printable",
    ),
    "all missing shards at once": (
        CONFIG | {INDEX: index(a=SHARD, b="2.safetensors", c="3.safetensors"), "2.safetensors": B},
        BadModelFile,
        "2 of 3 shards are missing, download incomplete. 1.safetensors, 3.safetensors$",
    ),
    "a shard with an over-long name": (
        CONFIG | {INDEX: index(a="s" * 300 + ".safetensors")},
        BadModelFile,
        "1 of 1 shards are missing",
    ),
    "a tensor in another shard": (
        CONFIG | {INDEX: index(a="2.safetensors", b="2.safetensors"), SHARD: A, "2.safetensors": B},
        BadModelFile,
        "1 tensors are not in the shard it maps them to: a$",
    ),
    "many tensors not in their shard": (
        CONFIG | {INDEX: index(**{f"t{i}": SHARD for i in range(9)}), SHARD: A},
        BadModelFile,
        r"9 tensors are not in the shard it maps them to: t0, t1, t2, t3, t4, \.\.\.$",
    ),
    "a damaged shard": (
        CONFIG | {INDEX: index(a=SHARD), SHARD: A + b"x"},
        BadModelFile,
        "1.safetensors: 1 bytes after",
    ),
}


@pytest.mark.parametrize("files, error, message", REFUSED.values(), ids=REFUSED)
def test_refuses(folder, files, error, message):
    path = folder(files)
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(path)
    line = str(caught.value)
    assert line.startswith(str(path)) and line.isprintable() and len(line) < 600


@pytest.mark.parametrize(
    "shard",
    [
        *(
            "../outside.safetensors",
            "/tmp/outside.safetensors",
            "sub/1.safetensors",
            "..\\outside.safetensors",
        ),
        *(
            "C:outside.safetensors",
            "..",
            ".",
            "",
            ".safetensors",
            "1.safetensors/",
            "1.safetensors\n",
            "1.bin",
        ),
        *("a\0.safetensors", "a\x7f.safetensors", "\ud800.safetensors", "1.SAFETENSORS"),
    ],
)
def test_a_shard_is_a_bare_file_name(folder, shard):
    """Even where the named file exists and is sound: nothing outside of the folder is ever opened."""
    inner = folder({"outside.safetensors": A}) / "model"
    inner.mkdir()
    for name, content in (CONFIG | {INDEX: index(a=shard), SHARD: A}).items():
        (inner / name).write_bytes(content)
    with pytest.raises(
        BadModelFile, match="index.json: tensor a: shard .* is not a bare file name"
    ) as caught:
        open_checkpoint(inner)
    assert str(caught.value).isprintable()


def test_paths_that_are_no_model(folder):
    path = folder({"model.bin": b"", "model.onnx": b"", "weights.safetensors": A})
    for name in ("none", "none.gguf", "a\0b"):
        with pytest.raises(ModelNotFound, match="no such file or folder") as caught:
            open_checkpoint(path / name)
        assert caught.value.searched == (str(path / name),)
    (path / "dangling.gguf").symlink_to("nowhere")
    with pytest.raises(ModelNotFound):
        open_checkpoint(path / "dangling.gguf")
    with pytest.raises(UnsupportedModel, match="model.bin: pickle checkpoints are not loaded"):
        open_checkpoint(path / "model.bin")
    with pytest.raises(BadModelFile, match="model.onnx: neither a model folder nor"):
        open_checkpoint(path / "model.onnx")
    with pytest.raises(BadModelFile, match="config.json: cannot be read: No such file"):
        open_checkpoint(path / "weights.safetensors")


def test_folders_in_place_of_files(tmp_path):
    for name in ("config.json", "m.gguf", SINGLE):
        (tmp_path / name).mkdir()
    with pytest.raises(BadModelFile, match="config.json: cannot be read: Is a directory"):
        open_checkpoint(tmp_path)
    with pytest.raises(BadModelFile, match="not a model: expected"):
        open_checkpoint(tmp_path / "m.gguf")


def test_stories260k(stories260k):
    checkpoint = open_checkpoint(stories260k)
    assert checkpoint.folder == stories260k and checkpoint.config["model_type"] == "llama"
    assert checkpoint.generation_config["eos_token_id"] == 2
    assert checkpoint.tensors["model.embed_tokens.weight"].shape == (512, 64)
    assert checkpoint.bytes_by_kind == {"f32": 4 * checkpoint.n_parameters}


def test_a_real_writer_and_open_agree(tmp_path):
    arrays = {f"layer.{i}": np.full((i + 1, 2), i, np.float32) for i in range(4)}
    save_file(arrays, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}")
    for name, tensor in open_checkpoint(tmp_path).tensors.items():
        np.testing.assert_array_equal(tensor.float32(), arrays[name])


def test_smollm2(smollm2):
    checkpoint = open_checkpoint(smollm2)
    assert checkpoint.folder is None and checkpoint.metadata["tokenizer.ggml.pre"] == "smollm"
    assert checkpoint.n_parameters == 134_515_008
    assert checkpoint.bytes_by_kind == {"q4_1": 66_355_200, "q8_0": 30_081_024, "f32": 140_544}
