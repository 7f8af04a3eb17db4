"""Damaged model files by the thousand: only the two typed errors escape, and memory stays small."""

import json
import math
import struct
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save
from test_gguf import ARRAY, STRING, gguf_bytes, text
from test_safetensors import file_bytes

from tinydrug.errors import BadModelFile, UnsupportedModel
from tinydrug.formats import gguf, safetensors
from tinydrug.formats.checkpoint import open_checkpoint

fuzz = settings(
    max_examples=250,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

SAFETENSORS = save(
    {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(3, np.float16)}, {"format": "np"}
)
GGUF = gguf_bytes(
    [
        ("general.architecture", STRING, text("llama")),
        ("llama.block_count", 4, struct.pack("<I", 2)),
        ("llama.rope.freq_base", 6, struct.pack("<f", 1e4)),
        ("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("µ") + text("")),
        ("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQ3i", 5, 3, 1, 2, 3)),
    ],
    [("q.weight", (32, 3), 2, 0), ("k.weight", (32, 2), 8, 64), ("norm.weight", (5,), 0, 160)],
    bytes(range(180)),
)
READERS = {"safetensors": (SAFETENSORS, safetensors.read), "gguf": (GGUF, lambda path: gguf.read(path)[1])}


@pytest.fixture
def attempt(tmp_path):
    """attempt(read, content): what `read` makes of a file, usable tensors, or None if it refuses."""
    numbers = iter(range(10**9))  # a new name each time: the last file may still be mapped

    def attempt(read, content: bytes, name: str = "model"):
        path = tmp_path / f"{next(numbers)}.{name}"
        path.write_bytes(content)
        try:
            with little_memory(len(content)):
                tensors = read(path)
        except (BadModelFile, UnsupportedModel) as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable() and len(str(error)) < 800
            return None
        for tensor in tensors.values():
            assert tensor.data.size <= len(content) and not tensor.data.flags.writeable
            try:
                values = tensor.float32()
            except UnsupportedModel:
                continue
            assert values.shape == tensor.shape and values.dtype == np.float32
        return tensors

    return attempt


@contextmanager
def little_memory(n_bytes: int):
    """Python objects outweigh the bytes they come from, by a constant: no claim in a file is believed."""
    tracemalloc.start()
    try:
        yield
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 100_000 + 100 * n_bytes


@pytest.mark.parametrize("whole, read", READERS.values(), ids=READERS)
def test_every_truncation_is_noticed(attempt, whole, read):
    assert attempt(read, whole) is not None
    for size in range(len(whole)):
        assert attempt(read, whole[:size]) is None, size


@pytest.mark.parametrize("whole, read", READERS.values(), ids=READERS)
def test_every_byte_can_be_wrong(attempt, whole, read):
    """Each byte of the header in turn: all its bits, its highest, its lowest."""
    for position in range(len(whole)):
        for flip in (0xFF, 0x80, 0x01):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            attempt(read, bytes(damaged))


def damages(whole: bytes):
    """Files that differ from `whole` by a few overwritten, inserted or removed runs of bytes."""
    position = st.integers(0, len(whole))
    run = st.binary(max_size=12) | st.sampled_from([2**63, 2**64 - 1, 2**32, 0]).map(struct.Struct("<Q").pack)

    def apply(edits) -> bytes:
        content = whole
        for start, removed, inserted in edits:
            content = content[:start] + inserted + content[start + removed :]
        return content

    return st.lists(st.tuples(position, st.sampled_from([0, 1, 4, 8]), run), min_size=1, max_size=4).map(
        apply
    )


@fuzz
@given(content=damages(SAFETENSORS))
def test_damaged_safetensors(attempt, content):
    attempt(safetensors.read, content)


@fuzz
@given(content=damages(GGUF))
def test_damaged_gguf(attempt, content):
    attempt(READERS["gguf"][1], content)


@fuzz
@given(
    content=st.binary(max_size=200), magic=st.sampled_from([b"", b"GGUF\3\0\0\0", b"GGUF\2\0\0\0" + bytes(7)])
)
def test_noise(attempt, content, magic):
    attempt(safetensors.read, magic + content)
    attempt(READERS["gguf"][1], magic + content)


sizes = st.integers(-1, 40) | st.sampled_from([2**31, 2**63, 2**64, 10**30])
json_values = st.recursive(
    st.none() | st.booleans() | sizes | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "F4", "F6_E2M3", "I64", "f32", "F31"]) | json_values,
        "shape": st.lists(sizes, max_size=3) | json_values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
    },
    optional={"more": json_values},
)


@fuzz
@given(
    header=st.dictionaries(
        st.text(max_size=3) | st.just("__metadata__"), near_entries | json_values, max_size=3
    ),
    n_bytes=st.integers(0, 40),
)
def test_random_json_headers(attempt, header, n_bytes):
    """And what we accept, the package accepts, with the same bytes."""
    content = file_bytes(header, bytes(range(n_bytes)))
    tensors = attempt(safetensors.read, content)
    if tensors is not None:
        official = {name: bytes(found["data"]) for name, found in deserialize(content)}
        assert {name: tensor.data.tobytes() for name, tensor in tensors.items()} == official


@fuzz
@given(data=st.data())
def test_sound_safetensors_are_all_accepted(attempt, data):
    """Any tensors laid one behind the other in any order of names: never a false alarm."""
    dtypes = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "U8": 1, "F8_E4M3": 1, "BOOL": 1}
    names = data.draw(st.lists(st.text("abc.0", min_size=1, max_size=5), unique=True, max_size=5))
    header, end = {}, 0
    for name in names:
        dtype, shape = (
            data.draw(st.sampled_from(sorted(dtypes))),
            data.draw(st.lists(st.integers(0, 3), max_size=3)),
        )
        begin, end = end, end + dtypes[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    content = file_bytes(dict(sorted(header.items())), bytes(end))
    assert list(attempt(safetensors.read, content)) == sorted(header)
    try:
        deserialize(content)
    except SafetensorError as error:  # a guard on this test: its files are sound
        raise AssertionError("the package refuses this file") from error


numbers = st.sampled_from(sorted(gguf.NUMBERS)).flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.binary(min_size=8, max_size=8).map(lambda b: b[: struct.calcsize(gguf.NUMBERS[kind])]),
    )
)
strings = st.text(max_size=5).map(text) | st.binary(max_size=5).map(text)
counts = st.integers(0, 4) | st.sampled_from([2**32, 2**60, 2**64 - 1])
arrays = st.builds(
    lambda kind, count, content: (ARRAY, struct.pack("<IQ", kind, count) + content),
    st.integers(0, 14),
    counts,
    st.binary(max_size=24) | strings,
)
config_keys = st.sampled_from(
    [
        *("general.architecture", "general.alignment", "split.count", "llama.embedding_length"),
        *("llama.attention.head_count", "llama.attention.head_count_kv", "llama.feed_forward_length"),
        *("llama.block_count", "llama.context_length", "llama.vocab_size", "llama.rope.freq_base"),
        *("llama.attention.layer_norm_rms_epsilon", "llama.rope.scaling.type", "llama.rope.scaling.factor"),
        *("tokenizer.ggml.bos_token_id", "tokenizer.ggml.tokens"),
    ]
)
keys = st.tuples(
    config_keys | st.text(max_size=3),
    numbers | arrays | strings.map(lambda content: (STRING, content)),
).map(lambda pair: (pair[0], *pair[1]))
tables = st.tuples(
    st.sampled_from(["token_embd.weight", "rope_freqs.weight", "output.weight"]) | st.text(max_size=3),
    st.lists(counts, max_size=5),
    st.integers(0, 43),
    st.sampled_from([0, 32, 64, 4, 2**63, 2**64 - 32]),
)


@fuzz
@given(
    keys=st.lists(keys, max_size=6),
    tensors=st.lists(tables, max_size=3),
    n_bytes=st.integers(0, 200),
    extra=st.sampled_from([0, 0, 0, 1, 2**64 - 10]),
)
def test_random_gguf(attempt, keys, tensors, n_bytes, extra):
    content = gguf_bytes(keys, tensors, bytes(n_bytes), n_keys=len(keys) + extra)
    attempt(READERS["gguf"][1], content)


LLAMA = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.attention.head_count": 8,
    "llama.feed_forward_length": 8,
    "llama.block_count": 8,
    "llama.context_length": 8,
    "llama.vocab_size": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
metadata_values = (
    st.none() | st.booleans() | sizes | st.floats() | st.text(max_size=6) | st.lists(sizes, max_size=3)
)


@fuzz
@given(changes=st.dictionaries(config_keys, metadata_values, max_size=3))
def test_config_of_random_metadata(changes):
    try:
        config = gguf.hf_config("m.gguf", LLAMA | changes, {})
    except (BadModelFile, UnsupportedModel) as error:
        assert str(error).startswith("m.gguf: ") and str(error).isprintable()
    else:
        assert all(
            config[name] > 0 for name in ("hidden_size", "num_attention_heads", "head_dim", "vocab_size")
        )
        json.dumps(config, allow_nan=False)


@fuzz
@given(
    name=st.sampled_from(["config.json", "generation_config.json", "model.safetensors.index.json"]),
    content=st.binary(max_size=30)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.text(max_size=3), st.text(max_size=3) | json_values, max_size=2).map(
        lambda weight_map: json.dumps({"weight_map": weight_map}).encode()
    ),
)
def test_random_json_files(tmp_path, name, content):
    files = {"config.json": b"{}", "generation_config.json": b"{}", "model.safetensors": SAFETENSORS} | {
        name: content
    }
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    for file, written in files.items():
        (tmp_path / file).write_bytes(written)
    try:
        open_checkpoint(tmp_path)
    except BadModelFile as error:
        assert str(error).startswith(str(tmp_path)) and str(error).isprintable() and len(str(error)) < 800


BOMBS = {  # files of a few bytes that claim to hold very much
    "safetensors header of 100 MB": (safetensors.read, file_bytes(b"{", length=100_000_000)),
    "safetensors tensor of 2**58 elements": (
        safetensors.read,
        file_bytes({"a": {"dtype": "U8", "shape": [2**58], "data_offsets": [0, 2**58]}}),
    ),
    "a million small dimensions": (
        safetensors.read,
        file_bytes({"a": {"dtype": "U8", "shape": [2] * 1_000_000, "data_offsets": [0, 0]}}),
    ),
    **{
        f"GGUF {name}": (READERS["gguf"][1], content)
        for name, content in {
            "keys": gguf_bytes(n_keys=2**64 - 1),
            "tensors": gguf_bytes(n_tensors=2**64 - 1),
            "string": gguf_bytes([("k", STRING, struct.pack("<Q", 2**40))]),
            "strings": gguf_bytes([("k", ARRAY, struct.pack("<IQ", STRING, 2**40))]),
            "flags": gguf_bytes([("k", ARRAY, struct.pack("<IQ", 7, 2**40))]),
            "doubles": gguf_bytes([("k", ARRAY, struct.pack("<IQ", 12, 2**61))]),
            "sizes": gguf_bytes(tensors=[("a", (2**40, 2**18), 0, 0)]),
            "scalar arrays": gguf_bytes([("k", ARRAY, struct.pack("<IQ", ARRAY, 2**40))]),
        }.items()
    },
}


@pytest.mark.parametrize("read, content", BOMBS.values(), ids=BOMBS)
def test_claims_allocate_nothing(attempt, read, content):
    assert attempt(read, content) is None
