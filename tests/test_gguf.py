"""GGUF files: ours against the official package, which writes, reads and dequantises; and damaged files."""

import struct
import time
from pathlib import Path

import gguf as library
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFEndian, GGUFReader, GGUFValueType, GGUFWriter, RopeScalingType

from tinydrug.errors import BadModelFile, UnsupportedModel
from tinydrug.formats import gguf
from tinydrug.formats.tensor import KINDS, Tensor

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10  # the format's numbers of value types
QUANTISED = [kind for kind in gguf.TYPES.values() if KINDS[kind][0] > 1]
NOT_IN_THE_LIBRARY = {"q8_1", "q8_k", "q1_0", "q2_0"}  # it has no dequantiser for these


def text(value) -> bytes:
    content = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(content)) + content


def gguf_bytes(keys=(), tensors=(), data: bytes = b"", version=3, n_keys=None, n_tensors=None, alignment=32):
    """A file of keys (name, type, value bytes) and tensors (name, GGUF dims, type, offset), sense or not."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts)
    for name, value_type, value in keys:
        head += text(name) + struct.pack("<I", value_type) + value
    for name, dims, ggml_type, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_type, offset)
    return head + bytes(-len(head) % alignment) + data


def save(path, architecture: str, fill) -> Path:
    """A file written by the library: `fill(writer)` adds the metadata and tensors."""
    writer = GGUFWriter(path, architecture)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def write(tmp_path):
    def write(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write


def test_type_table_is_the_librarys():
    """Numbers, names and block sizes; q8_1 alone differs, 36 bytes in ggml's own C."""
    for number, kind in gguf.TYPES.items():
        if kind not in ("q2_0", "q8_1"):
            assert GgmlType(number).name.lower() == kind
            assert library.GGML_QUANT_SIZES[GgmlType(number)] == KINDS[kind]
    assert {ggml_type.name.lower() for ggml_type in GgmlType} <= set(gguf.TYPES.values())


def random_blocks(kind: str, rows: int, blocks: int) -> np.ndarray:
    """(rows, blocks * bytes) of random bytes: every scale, code and special value turns up."""
    return np.random.default_rng(7).integers(0, 256, (rows, blocks * KINDS[kind][1]), dtype=np.uint8)


@pytest.mark.parametrize("kind", sorted(set(QUANTISED) - NOT_IN_THE_LIBRARY))
def test_every_quantised_kind_dequantises_as_the_library_does(tmp_path, kind):
    """The same bits, from a file that the library wrote, where the library's own reader finds the tensor."""
    elements, size = KINDS[kind]
    blocks = random_blocks(kind, rows=6, blocks=20)
    tiny = np.random.default_rng(1).standard_normal((4, 2 * elements)).astype(np.float32)
    ggml_type = GgmlType[kind.upper()]
    try:
        quantised = library.quants.quantize(tiny, ggml_type)
    except NotImplementedError:  # the library cannot quantise to most of the kinds that it can read
        quantised = random_blocks(kind, rows=4, blocks=2)

    def fill(writer):
        writer.add_tensor("odd", np.ones(3, np.float32))
        writer.add_tensor("blocks", blocks, raw_dtype=ggml_type)
        writer.add_tensor("quantised", quantised, raw_dtype=ggml_type)

    path = save(tmp_path / "kinds.gguf", "llama", fill)
    _, tensors = gguf.read(path)
    official = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, columns in (("blocks", 20 * elements), ("quantised", 2 * elements)):
        tensor = tensors[name]
        assert tensor.kind == kind and tensor.shape == (len(official[name].data), columns)
        assert tensor.data.tobytes() == official[name].data.tobytes()
        with np.errstate(all="ignore"):
            expected = library.quants.dequantize(official[name].data, ggml_type)
        values = tensor.float32()
        assert values.dtype == np.float32 and values.shape == expected.shape
        np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))
        number = ~np.isnan(values)
        np.testing.assert_array_equal(values.view(np.uint32)[number], expected.view(np.uint32)[number])


def test_block_layouts_by_hand():
    """One block each, in plain Python from ggml's dequantize_row: low nibbles are the first half."""
    low_first = list(range(16)) + list(range(15, -1, -1))
    nibbles = bytes(low + 16 * high for low, high in zip(low_first[:16], low_first[16:], strict=True))
    d, m = struct.pack("<e", -0.375), struct.pack("<e", 1.1)
    codes = struct.pack("<32b", *range(-128, 128, 8))
    m32 = struct.unpack("<e", m)[0]
    for kind, block, expected in [
        ("q8_0", d + codes, [-0.375 * q for q in range(-128, 128, 8)]),
        ("q4_0", d + nibbles, [-0.375 * (q - 8) for q in low_first]),
        ("q4_1", d + m + nibbles, [np.float32(-0.375 * q + m32) for q in low_first]),
    ]:
        tensor = Tensor("t", (1, 32), kind, np.frombuffer(block, np.uint8), "p")
        np.testing.assert_array_equal(tensor.float32(), np.float32([expected]))


@pytest.mark.parametrize("kind", sorted(NOT_IN_THE_LIBRARY) + ["i8", "i16", "i32", "i64"])
def test_kinds_that_nothing_turns_into_floats_are_refused_by_name(write, kind):
    elements, size = KINDS[kind]
    number = {name: number for number, name in gguf.TYPES.items()}[kind]
    _, tensors = gguf.read(
        write(gguf_bytes(tensors=[("odd.weight", (elements,), number, 0)], data=bytes(size)))
    )
    with pytest.raises(UnsupportedModel, match=f"model.gguf: tensor odd.weight is {kind}"):
        tensors["odd.weight"].float32()


@pytest.mark.parametrize("mmap", [True, False])
def test_plain_kinds_shapes_and_views(tmp_path, mmap):
    """Dimensions come reversed; all tensors view one mapping."""
    arrays = {
        "f32": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "f16": np.arange(6, dtype=np.float16).reshape(3, 2),
        "f64": np.arange(3, dtype=np.float64),
        "i32": np.arange(5, dtype=np.int32),
    }

    def fill(writer):
        for name, array in arrays.items():
            writer.add_tensor(name, array)
        bf16 = library.quants.quantize(np.float32([[1, -2.5, 65281]]), GgmlType.BF16)
        writer.add_tensor("bf16", bf16, raw_dtype=GgmlType.BF16)

    _, tensors = gguf.read(save(tmp_path / "plain.gguf", "llama", fill), mmap)
    assert {name: tensor.kind for name, tensor in tensors.items()} == {
        name: name for name in [*arrays, "bf16"]
    }
    for name, array in arrays.items():
        assert tensors[name].shape == array.shape and tensors[name].data.tobytes() == array.tobytes()
        assert not tensors[name].data.flags.writeable
    for name in ("f32", "f16", "f64"):
        np.testing.assert_array_equal(tensors[name].float32(), arrays[name].astype(np.float32))
    assert tensors["bf16"].float32().tolist() == [[1.0, -2.5, 65280.0]]  # 65280 has eight significant bits
    assert len({id(tensor.mapping) for tensor in tensors.values()}) == 1
    assert (tensors["f32"].mapping is not None) == mmap


def test_metadata_of_every_type(tmp_path):
    scalars = {
        GGUFValueType.UINT8: 255,
        GGUFValueType.INT8: -128,
        GGUFValueType.UINT16: 65535,
        GGUFValueType.INT16: -32768,
        GGUFValueType.UINT32: 2**32 - 1,
        GGUFValueType.INT32: -(2**31),
        GGUFValueType.UINT64: 2**64 - 1,
        GGUFValueType.INT64: -(2**63),
        GGUFValueType.FLOAT32: 0.15625,
        GGUFValueType.FLOAT64: 0.1,
        GGUFValueType.BOOL: True,
        GGUFValueType.STRING: "µ 漢字",
    }

    def fill(writer):
        for kind, value in scalars.items():
            writer.add_key_value(f"one.{kind.name}", value, kind)
            writer.add_key_value(f"many.{kind.name}", [value] * 3, GGUFValueType.ARRAY, kind)

    path = save(tmp_path / "keys.gguf", "llama", fill)
    metadata, tensors = gguf.read(path)
    assert tensors == {}
    for kind, value in scalars.items():
        one, many = metadata[f"one.{kind.name}"], metadata[f"many.{kind.name}"]
        assert one == value and type(one) is type(value)
        assert many == [value] * 3 and type(many) is list and type(many[0]) is type(value)
    official = {key: field.contents() for key, field in GGUFReader(path).fields.items() if "." in key}
    official = {key: value for key, value in official.items() if not key.startswith("GGUF.")}
    assert metadata == official


def test_version_2_is_the_same_and_alignment_is_obeyed(write):
    values = np.float32([1, 2]).tobytes()
    aligned = ("general.alignment", U32, struct.pack("<I", 256))
    for content in (
        gguf_bytes(tensors=[("a", (2,), 0, 0)], data=values),
        gguf_bytes(tensors=[("a", (2,), 0, 0)], data=values, version=2),
        gguf_bytes([aligned], [("a", (2,), 0, 0)], values, alignment=256),
        gguf_bytes([aligned], [("b", (1,), 0, 0), ("a", (2,), 0, 256)], bytes(256) + values, alignment=256),
    ):
        _, tensors = gguf.read(write(content))
        assert tensors["a"].float32().tolist() == [1, 2]
    assert gguf.read(write(gguf_bytes(alignment=1))) == ({}, {})  # without tensors nothing need be padded


def test_big_endian_is_refused(tmp_path):
    writer = GGUFWriter(tmp_path / "big.gguf", "llama", endianess=GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="big.gguf: big-endian GGUF"):
        gguf.read(tmp_path / "big.gguf")


def key(value_type: int, value: bytes = b"", name: str = "k") -> bytes:
    return gguf_bytes([(name, value_type, value)])


def array(value_type: int, count: int, content: bytes = b"") -> bytes:
    return key(ARRAY, struct.pack("<IQ", value_type, count) + content)


def one_tensor(dims=(2,), ggml_type=0, offset=0, data=bytes(8), name="a") -> bytes:
    return gguf_bytes(tensors=[(name, dims, ggml_type, offset)], data=data)


BAD = {  # what is wrong -> (file, pattern of the message)
    "empty": (b"", "does not begin with 'GGUF'"),
    "another file": (b"GGML" + bytes(100), "does not begin with 'GGUF'"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "magic only": (b"GGUF", "ends inside its header, at byte 4: download incomplete"),
    "counts missing": (b"GGUF\3\0\0\0" + bytes(8), "ends inside its header"),
    "more keys than there are": (gguf_bytes(n_keys=2**64 - 1, alignment=1), "ends inside its header"),
    "more tensors than there are": (gguf_bytes(n_tensors=2**64 - 1, alignment=1), "ends inside its header"),
    "key longer than the file": (
        gguf_bytes(n_keys=1, data=struct.pack("<Q", 2**63), alignment=1),
        "ends inside its header",
    ),
    "a key twice": (gguf_bytes([("k", U8, b"\1"), ("k", U8, b"\2")]), "metadata key 'k' stands twice"),
    "a key that is not UTF-8": (gguf_bytes([(b"\xff", U8, b"\1")]), "the string at byte 32 is not UTF-8"),
    "value of unknown type": (key(13), "metadata key 'k' has the unknown type 13"),
    "value cut short": (gguf_bytes([("k", U64, b"")], alignment=1), "ends inside its header"),
    "string longer than the file": (key(STRING, struct.pack("<Q", 2**40)), "ends inside its header"),
    "string that is not UTF-8": (key(STRING, text(b"a\xc3")), "not UTF-8"),
    "array of 2**60 numbers": (array(U8, 2**60), "ends inside its header"),
    "array of 2**64-1 numbers": (array(U64, 2**64 - 1), "ends inside its header"),
    "array of 2**64-1 strings": (array(STRING, 2**64 - 1), "ends inside its header"),
    "array of unknown type": (array(99, 0), "unknown type 99"),
    "alignment 0": (key(U32, bytes(4), "general.alignment"), "alignment is 0, not a power of two"),
    "alignment 24": (key(U32, b"\x18\0\0\0", "general.alignment"), "alignment is 24, not"),
    "alignment true": (key(BOOL, b"\1", "general.alignment"), "alignment is True, not"),
    "alignment a string": (key(STRING, text("32"), "general.alignment"), "alignment is '32', not"),
    "tensor name twice": (
        gguf_bytes(tensors=[("a", (2,), 0, 0), ("a", (2,), 0, 32)], data=bytes(64)),
        "tensor a: its name stands twice",
    ),
    "tensor name with a bell": (one_tensor(name="a\a"), "not printable"),
    "tensor name of 1,000 letters": (one_tensor(name="a" * 1000), "over-long"),
    "five dimensions": (one_tensor(dims=(2, 1, 1, 1, 1)), "tensor a: 5 dimensions"),
    "2**32-1 dimensions": (
        gguf_bytes(n_tensors=1, data=text("a") + struct.pack("<I", 2**32 - 1), alignment=1),
        "tensor a: 4294967295 dimensions",
    ),
    "sizes whose product overflows": (one_tensor(dims=(2**32, 2**32)), "tensor a: its shape overflows"),
    "a size of 2**64-1": (one_tensor(dims=(2**64 - 1,)), "tensor a: its shape overflows"),
    "an overflow beside a zero": (one_tensor(dims=(0, 2**63)), "tensor a: its shape overflows"),
    "a row of half a block": (one_tensor((16, 2), 2, data=bytes(64)), "rows of 16 elements .* of q4_0"),
    "a scalar of blocks": (one_tensor((), 2), "1 elements of q4_0, which comes in blocks of 32"),
    "offset not aligned": (one_tensor(offset=4, data=bytes(12)), "offset 4 is not aligned to 32"),
    "offset beyond the file": (
        one_tensor(offset=2**40),
        r"expected \d+ bytes, the file has \d+: download incomp",
    ),
    "offset near 2**64": (one_tensor(offset=2**64 - 32), r"expected \d+ bytes, the file has"),
    "data cut short": (
        one_tensor(data=bytes(7)),
        "expected 72 bytes, the file has 71: download incomplete",
    ),
    "no data": (one_tensor(data=b"")[:-20], "download incomplete"),
    "an overlap": (
        gguf_bytes(tensors=[("a", (16,), 0, 0), ("b", (2,), 0, 32)], data=bytes(128)),
        "tensor b: it overlaps tensor a",
    ),
}


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_refuses(write, content, message, mmap):
    path = write(content)
    with pytest.raises(BadModelFile, match=message) as caught:
        gguf.read(path, mmap)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and line.isprintable() and len(line) < 400


UNSUPPORTED = {
    "version 1": (gguf_bytes(version=1), "GGUF version 1 is not 2 or 3"),
    "version 4": (gguf_bytes(version=4), "GGUF version 4 is not 2 or 3"),
    "version 0": (gguf_bytes(version=0), "GGUF version 0 is not 2 or 3"),
    "an array of arrays": (array(ARRAY, 1), "metadata key 'k' is an array of arrays"),
    "a retired type": (
        one_tensor((32,), 4, data=bytes(64)),
        "tensor a has the unknown or retired GGUF type 4",
    ),
    "a type of the future": (one_tensor((32,), 99, data=bytes(64)), "GGUF type 99"),
}


@pytest.mark.parametrize("content, message", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_sound_but_not_known_here(write, content, message):
    with pytest.raises(UnsupportedModel, match=message):
        gguf.read(write(content))


def test_a_large_vocabulary_is_read_in_no_time(write):
    """Far below 0.15 s of this process, so that opening the default model is not felt."""
    tokens = b"".join(text(f"token{i}") for i in range(49_152))
    merges = b"".join(text(f"tok en{i}") for i in range(48_900))
    path = write(
        gguf_bytes(
            [
                ("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 49_152) + tokens),
                ("tokenizer.ggml.merges", ARRAY, struct.pack("<IQ", STRING, 48_900) + merges),
                ("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ", F32, 49_152) + bytes(4 * 49_152)),
            ]
        )
    )
    seconds = []
    for _ in range(3):
        start = time.process_time()
        metadata, _ = gguf.read(path)
        seconds.append(time.process_time() - start)
    assert metadata["tokenizer.ggml.tokens"][-1] == "token49151"
    assert metadata["tokenizer.ggml.merges"][-1] == "tok en48899"
    assert len(metadata["tokenizer.ggml.scores"]) == 49_152
    assert min(seconds) < 0.15


# hf_config: the names of the keys come from the library's writer, so that no one hand spells both sides.


def llama_fields(writer):
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(172)
    writer.add_block_count(5)
    writer.add_head_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(512)
    writer.add_vocab_size(96)


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "vocab_size": 96,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}


def rope(rope_type: str, **parameters) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0} | parameters}


def one(method: str, *arguments):
    return lambda writer: getattr(writer, method)(*arguments)


def tensor(name: str, shape=(1,), value=1.0):
    return lambda writer: writer.add_tensor(name, np.full(shape, value, np.float32))


def scaling(kind, factor: float, *more):
    def fill(writer):
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(factor)
        for method, value in more:
            getattr(writer, f"add_rope_scaling_{method}")(value)

    return fill


YARN = RopeScalingType.YARN
CONFIGS = {  # what is added to llama_fields -> what changes in LLAMA
    "nothing": (lambda writer: None, {}),
    "grouped queries": (one("add_head_count_kv", 4), {"num_key_value_heads": 4}),
    "heads a list": (one("add_head_count_kv", [2] * 5), {"num_key_value_heads": 2}),
    "head_dim": (
        lambda writer: (
            writer.add_key_length(16),
            writer.add_value_length(16),
            writer.add_rope_dimension_count(16),
        ),
        {"head_dim": 16},
    ),
    "untied": (tensor("output.weight", (96, 64)), {"tie_word_embeddings": False}),
    "biases": (
        lambda writer: (tensor("blk.0.attn_q.bias")(writer), tensor("blk.0.ffn_gate.bias")(writer)),
        {"attention_bias": True, "mlp_bias": True},
    ),
    "special tokens": (
        lambda writer: (writer.add_bos_token_id(0), writer.add_eos_token_id(7)),
        {"bos_token_id": 0, "eos_token_id": 7},
    ),
    "sliding window": (
        one("add_sliding_window", 4096),
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096},
    ),
    "sliding window off": (one("add_sliding_window", 0), {}),
    "rope_theta": (
        one("add_rope_freq_base", 500000.0),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "scaling none": (one("add_rope_scaling_type", RopeScalingType.NONE), {}),
    "linear": (scaling(RopeScalingType.LINEAR, 4.0), rope("linear", factor=4.0)),
    "linear by 1": (scaling(RopeScalingType.LINEAR, 1.0), {}),
    "linear, the old key": (one("add_float32", "llama.rope.scale_linear", 2.0), rope("linear", factor=2.0)),
    "yarn": (
        scaling(YARN, 16.0, ("orig_ctx_len", 128)),
        rope("yarn", factor=16.0, original_max_position_embeddings=128),
    ),
    "yarn in full": (
        scaling(
            *(YARN, 16.0, ("orig_ctx_len", 128), ("yarn_attn_factor", 1.2), ("yarn_beta_fast", 16.0)),
            *(("yarn_beta_slow", 2.0), ("yarn_ext_factor", 1.0), ("yarn_log_mul", 0.5)),
        ),
        rope(
            "yarn",
            factor=16.0,
            original_max_position_embeddings=128,
            attention_factor=1.2,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=1.0,
            mscale_all_dim=0.5,
        ),
    ),
    "longrope": (scaling(RopeScalingType.LONGROPE, 4.0), rope("longrope", factor=4.0)),
    "llama 3's factors": (tensor("rope_freqs.weight", (4,), 8.0), rope("factors", factors=[8.0] * 4)),
}


@pytest.mark.parametrize("fill, changes", CONFIGS.values(), ids=CONFIGS)
def test_llama_config(tmp_path, fill, changes):
    path = save(tmp_path / "m.gguf", "llama", lambda writer: (llama_fields(writer), fill(writer)))
    assert gguf.hf_config(path, *gguf.read(path)) == LLAMA | changes


def test_vocabulary_size_from_the_embeddings(tmp_path):
    def fill(writer):
        llama_fields(writer)
        del writer.kv_data[0]["llama.vocab_size"]
        writer.add_tensor("token_embd.weight", np.zeros((40, 64), np.float16))

    path = save(tmp_path / "m.gguf", "llama", fill)
    assert gguf.hf_config(path, *gguf.read(path))["vocab_size"] == 40


def test_gpt2_config(tmp_path):
    def fill(writer):
        writer.add_block_count(12)
        writer.add_context_length(1024)
        writer.add_embedding_length(768)
        writer.add_feed_forward_length(3072)
        writer.add_head_count(12)
        writer.add_layer_norm_eps(1e-5)
        writer.add_bos_token_id(50256)
        writer.add_eos_token_id(50256)
        writer.add_tensor("token_embd.weight", np.zeros((96, 4), np.float32))

    path = save(tmp_path / "m.gguf", "gpt2", fill)
    assert gguf.hf_config(path, *gguf.read(path)) == {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 768,
        "n_inner": 3072,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "vocab_size": 96,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }


REFUSED_CONFIGS = {  # what is added to llama_fields -> (error, pattern)
    "experts": (one("add_expert_count", 8), UnsupportedModel, "llama.expert_count is 8; only 0 is supported"),
    "value heads of another width": (
        one("add_value_length", 4),
        UnsupportedModel,
        "value_length is 4; only 8",
    ),
    "partial rotation": (
        one("add_rope_dimension_count", 4),
        UnsupportedModel,
        "dimension_count is 4; only 8",
    ),
    "heads differ by layer": (
        one("add_head_count_kv", [2, 4]),
        UnsupportedModel,
        "differs from layer to layer",
    ),
    "yarn extrapolation": (
        scaling(YARN, 4.0, ("yarn_ext_factor", 0.5)),
        UnsupportedModel,
        "yarn_ext_factor is 0.5; only 1",
    ),
    "attention factor": (one("add_rope_scaling_attn_factors", 2.0), UnsupportedModel, "attn_factor is 2.0"),
    "factors and scaling": (
        lambda writer: (tensor("rope_freqs.weight", (4,))(writer), scaling(YARN, 4.0)(writer)),
        UnsupportedModel,
        "rope scaling 'yarn' together with tensor rope_freqs.weight",
    ),
    "factors of zero": (
        tensor("rope_freqs.weight", (4,), 0.0),
        BadModelFile,
        "rope_freqs.weight: not 4 positive",
    ),
    "factors NaN": (
        tensor("rope_freqs.weight", (4,), np.nan),
        BadModelFile,
        "rope_freqs.weight: not 4 positive",
    ),
    "too many factors": (
        tensor("rope_freqs.weight", (5,)),
        BadModelFile,
        "rope_freqs.weight: not 4 positive",
    ),
    "no heads": (
        one("add_head_count_kv", 0),
        BadModelFile,
        "head_count_kv is 0, not a whole number of at least 1",
    ),
    "heads a string": (
        one("add_string", "llama.attention.head_count_kv", "8"),
        BadModelFile,
        "is '8', not a whole",
    ),
    "theta NaN": (one("add_rope_freq_base", np.nan), BadModelFile, "freq_base is nan, not a finite number"),
    "theta infinite": (
        one("add_float64", "llama.rope.freq_base", 1e300),
        BadModelFile,
        "not a finite number",
    ),
    "theta a flag": (
        one("add_bool", "llama.rope.freq_base", True),
        BadModelFile,
        "is True, not a finite number",
    ),
    "scaling a number": (one("add_uint32", "llama.rope.scaling.type", 3), BadModelFile, "is 3, not a string"),
    "negative token id": (
        one("add_int32", "tokenizer.ggml.eos_token_id", -1),
        BadModelFile,
        "eos_token_id is -1",
    ),
}


@pytest.mark.parametrize("fill, error, message", REFUSED_CONFIGS.values(), ids=REFUSED_CONFIGS)
def test_config_refuses(tmp_path, fill, error, message):
    path = save(tmp_path / "m.gguf", "llama", lambda writer: (llama_fields(writer), fill(writer)))
    with pytest.raises(error, match=rf"m\.gguf: .*{message}"):
        gguf.hf_config(path, *gguf.read(path))


@pytest.mark.parametrize("missing", ["embedding_length", "block_count", "attention.layer_norm_rms_epsilon"])
def test_config_names_the_missing_key(missing):
    metadata = {"general.architecture": "llama"} | {
        f"llama.{name}": 8
        for name in (
            *(
                "embedding_length",
                "attention.head_count",
                "feed_forward_length",
                "block_count",
                "context_length",
            ),
            *("vocab_size", "attention.layer_norm_rms_epsilon"),
        )
    }
    del metadata[f"llama.{missing}"]
    with pytest.raises(BadModelFile, match=f"m.gguf: its metadata lacks llama.{missing}$"):
        gguf.hf_config("m.gguf", metadata, {})


@pytest.mark.parametrize("architecture", ["qwen2", None, ["llama"], 3])
def test_unknown_architecture_lists_the_known_ones(architecture):
    with pytest.raises(UnsupportedModel, match="m.gguf: GGUF architecture .* supported: gpt2, llama"):
        gguf.hf_config("m.gguf", {"general.architecture": architecture}, {})


def test_smollm2(smollm2):
    """The default model: metadata and tensors as the library reads them, the config its makers published."""
    metadata, tensors = gguf.read(smollm2)
    reader = GGUFReader(smollm2)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            assert metadata[name] == field.contents()
    assert [tensor.name for tensor in reader.tensors] == list(tensors)
    for official in reader.tensors:
        found = tensors[official.name]
        assert found.shape == tuple(int(size) for size in official.shape[::-1])
        assert found.kind == official.tensor_type.name.lower()
        np.testing.assert_array_equal(found.data, official.data.view(np.uint8).ravel())
    for name in ("blk.0.attn_k.weight", "blk.29.ffn_down.weight", "output_norm.weight"):
        official = next(tensor for tensor in reader.tensors if tensor.name == name)
        expected = library.quants.dequantize(official.data, official.tensor_type)
        np.testing.assert_array_equal(tensors[name].float32().view(np.uint32), expected.view(np.uint32))
    assert gguf.hf_config(smollm2, metadata, tensors) == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
