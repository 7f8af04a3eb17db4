"""safetensors files: ours against the official package, both ways, and every kind of damage."""

import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save, save_file

from tinydrug.errors import BadModelFile, UnsupportedModel
from tinydrug.formats import safetensors
from tinydrug.formats.tensor import KINDS

DTYPES = "f8 f4 f2 i8 i4 i2 i1 u8 u4 u2 u1 ?".split()


def file_bytes(header, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, a dict or the raw bytes, whatever sense it makes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def write(tmp_path):
    def write(content: bytes) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("mmap", [True, False])
def test_reads_what_the_package_writes(tmp_path, mmap):
    generator = np.random.default_rng(0)
    arrays = {f"t.{code}": generator.integers(0, 2, (3, 5)).astype(code) for code in DTYPES}
    arrays |= {"scalar": np.array(7, np.float32), "empty": np.zeros((0, 4), np.float16)}
    save_file(arrays, tmp_path / "all.safetensors", metadata={"format": "np"})
    tensors = safetensors.read(tmp_path / "all.safetensors", mmap)
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        tensor = tensors[name]
        assert tensor.name == name and tensor.shape == array.shape
        assert tensor.data.tobytes() == array.tobytes()
        assert not tensor.data.flags.writeable and tensor.data.dtype == np.uint8
        assert (tensor.mapping is not None) == mmap
        if tensor.kind in ("f64", "f32", "f16"):
            np.testing.assert_array_equal(tensor.float32(), array.astype(np.float32))


def test_one_mapping_and_no_copy(tmp_path):
    save_file({"a": np.arange(6, dtype=np.float32), "b": np.ones(3, np.float32)}, tmp_path / "m.safetensors")
    a, b = safetensors.read(tmp_path / "m.safetensors").values()
    assert a.mapping is b.mapping
    assert np.shares_memory(a.float32(), a.data) and np.shares_memory(
        a.data, np.frombuffer(a.mapping, np.uint8)
    )


def test_unaligned_float32_is_copied(write):
    header = file_bytes({"pad": entry("U8", [1], [0, 1]), "x": entry("F32", [2], [1, 9])}).ljust(256)
    content = struct.pack("<Q", len(header) - 8) + header[8:] + b"\0" + np.float32([1.5, -2]).tobytes()
    tensor = safetensors.read(write(content))["x"]
    assert tensor.data.ctypes.data % 4
    assert tensor.float32().flags.aligned and tensor.float32().tolist() == [1.5, -2]


def test_every_bfloat16_and_float16_is_exact(write):
    bits = np.arange(1 << 16, dtype=np.uint16)
    span = [0, 1 << 17]
    bf16 = safetensors.read(write(file_bytes({"x": entry("BF16", [1 << 16], span)}, bits.tobytes())))["x"]
    np.testing.assert_array_equal(bf16.float32().view(np.uint32) >> 16, bits)
    assert not (bf16.float32().view(np.uint32) & 0xFFFF).any()
    f16 = safetensors.read(write(file_bytes({"x": entry("F16", [1 << 16], span)}, bits.tobytes())))["x"]
    halves = struct.unpack(f"<{1 << 16}e", bits.tobytes())
    np.testing.assert_array_equal(f16.float32(), np.array(halves, np.float32))


def test_float64_rounds_and_overflows_quietly(write):
    values = np.array([0.1, 1e300, np.nan])
    tensor = safetensors.read(write(file_bytes({"x": entry("F64", [3], [0, 24])}, values.tobytes())))["x"]
    np.testing.assert_array_equal(tensor.float32(), np.float32([0.1, np.inf, np.nan]))


@pytest.mark.parametrize("dtype", sorted(safetensors.DTYPES))
def test_every_dtype_has_the_size_the_package_gives_it(write, dtype):
    """Read by both; the kinds no arithmetic here knows are refused when used, by the tensor's name."""
    elements, size = KINDS[safetensors.DTYPES[dtype]]
    content = file_bytes({"odd.weight": entry(dtype, [2, elements], [0, 2 * size])}, bytes(2 * size))
    tensor = safetensors.read(write(content))["odd.weight"]
    name, official = deserialize(content)[0]
    assert (name, official["dtype"], official["shape"]) == ("odd.weight", dtype, [2, elements])
    assert tensor.data.tobytes() == bytes(official["data"])
    if tensor.kind in ("f64", "f32", "f16", "bf16"):
        assert not tensor.float32().any()
    else:
        with pytest.raises(UnsupportedModel, match=f"tensor odd.weight is {tensor.kind}"):
            tensor.float32()


GOOD = {
    "no tensors": file_bytes({}),
    "metadata only": file_bytes({"__metadata__": {"format": "pt"}}),
    "padded header": file_bytes(json.dumps({"a": entry()}).encode() + b"    ", bytes(8)),
    "order of the data is not the header's": file_bytes(
        {"b": entry(offsets=(8, 16)), "a": entry(offsets=(0, 8))}, bytes(16)
    ),
    "unknown fields": file_bytes({"a": entry() | {"note": 1}}, bytes(8)),
    "empty tensors between others": file_bytes(
        {"a": entry(), "e": entry(shape=[0, 3], offsets=(8, 8)), "b": entry(offsets=(8, 16))}, bytes(16)
    ),
}


@pytest.mark.parametrize("content", GOOD.values(), ids=GOOD)
def test_accepts_what_the_package_accepts(write, content):
    tensors = safetensors.read(write(content))
    official = dict(deserialize(content))
    assert {name: tensor.data.tobytes() for name, tensor in tensors.items()} == {
        name: bytes(found["data"]) for name, found in official.items()
    }
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        name: found["shape"] for name, found in official.items()
    }


WHOLE = save({"a": np.arange(8, dtype=np.float32), "b": np.ones((2, 2), np.float16)})

BAD = {  # what is wrong -> (file, pattern of the message)
    "empty": (b"", "0 bytes are too few"),
    "seven bytes": (bytes(7), "7 bytes are too few"),
    "header beyond 100 MB": (file_bytes(b"{}", length=100_000_001), "header would have 100000001 bytes"),
    "header length 2**64-1": (file_bytes(b"{}", length=2**64 - 1), "not a safetensors file"),
    "header beyond the file": (file_bytes(b"{}", length=3), r"ends at byte 11, the file has 10 .*download"),
    "no header": (file_bytes(b""), "does not begin with '{'"),
    "leading space": (file_bytes(b" {}"), "does not begin with '{'"),
    "a list": (file_bytes(b"[]"), "does not begin with '{'"),
    "not JSON": (file_bytes(b"{tensors}"), "not valid JSON"),
    "two objects": (file_bytes(b"{}{}"), "not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff":0}'), "not valid JSON"),
    "a number of 5,000 digits": (file_bytes(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "nested too deeply": (file_bytes(b'{"a":' * 100_000), "nested too deeply"),
    "a name twice": (
        file_bytes(b'{"a":%(a)s,"a":%(a)s}' % {b"a": json.dumps(entry()).encode()}, bytes(8)),
        "a name stands twice",
    ),
    "a field twice": (file_bytes(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "a name stands twice"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "metadata of numbers": (
        file_bytes({"__metadata__": {"a": 1}}),
        "__metadata__ is not an object of strings",
    ),
    "metadata a list": (file_bytes({"__metadata__": []}), "__metadata__ is not an object of strings"),
    "a name with a newline": (file_bytes({"a\nb": entry()}, bytes(8)), r"not printable: 'a\\nb'"),
    "half a surrogate": (file_bytes(b'{"\\ud800":{}}'), "not printable"),
    "a name of 1,000 letters": (file_bytes({"a" * 1000: entry()}, bytes(8)), "over-long"),
    "an entry that is a number": (file_bytes({"a": 1}), "tensor a: its header entry is 1, not an object"),
    "an entry without fields": (file_bytes({"a": {}}), "dtype None is not"),
    "unknown dtype": (file_bytes({"a": entry("F33")}, bytes(8)), "tensor a: dtype 'F33' is not"),
    "dtype a list": (file_bytes({"a": entry(["F32"])}, bytes(8)), "is not one of the format"),
    "shape a number": (file_bytes({"a": entry() | {"shape": 2}}, bytes(8)), "shape 2 is not a list of sizes"),
    "shape a string": (file_bytes({"a": entry() | {"shape": "2"}}, bytes(8)), "not a list of sizes"),
    "negative size": (file_bytes({"a": entry(shape=[-1, -2])}, bytes(8)), "not a list of sizes"),
    "size true": (file_bytes({"a": entry(shape=[True, 2])}, bytes(8)), "not a list of sizes"),
    "size 2.0": (file_bytes({"a": entry(shape=[2.0])}, bytes(8)), "not a list of sizes"),
    "size NaN": (file_bytes({"a": entry(shape=[float("nan")])}, bytes(8)), "not a list of sizes"),
    "too many bytes for the shape": (
        file_bytes({"a": entry(shape=[1])}, bytes(8)),
        "takes 4 bytes, .* span 8",
    ),
    "shape overflows": (file_bytes({"a": entry(shape=[2**62, 4])}, bytes(8)), "shape overflows"),
    "shape overflows beside a zero": (
        file_bytes({"a": entry(shape=[0, 2**63], offsets=(0, 0))}),
        "shape overflows",
    ),
    "a thousand dimensions": (file_bytes({"a": entry(shape=[1] * 1000 + [2])}, bytes(8)), "1001 dimensions"),
    "half a byte of F4": (file_bytes({"a": entry("F4", [3], [0, 2])}, bytes(2)), "blocks of 2"),
    "one offset": (file_bytes({"a": entry(offsets=[8])}, bytes(8)), r"not \[begin, end\]"),
    "reversed offsets": (file_bytes({"a": entry(offsets=[8, 0])}, bytes(8)), r"not \[begin, end\]"),
    "negative offset": (file_bytes({"a": entry(offsets=[-8, 0])}, bytes(8)), r"not \[begin, end\]"),
    "offset true": (file_bytes({"a": entry("U8", [1], [0, True])}, bytes(1)), r"not \[begin, end\]"),
    "a hole": (
        file_bytes({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
        "tensor b: it begins at byte 12 .* leaves a hole of 4",
    ),
    "a hole before the first": (file_bytes({"a": entry(offsets=(4, 12))}, bytes(12)), "leaves a hole of 4"),
    "an overlap": (
        file_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        "tensor b: .* overlaps the tensor before it",
    ),
    "offsets far beyond": (
        file_bytes({"a": entry(shape=[2**50], offsets=(0, 2**52))}, bytes(8)),
        r"expected \d+ bytes, the file has \d+: download incomplete\?",
    ),
    "truncated": (
        WHOLE[:-1],
        rf"expected {len(WHOLE)} bytes, the file has {len(WHOLE) - 1}: download incomplete",
    ),
    "trailing bytes": (WHOLE + b"123", "3 bytes after the last tensor"),
}
STRICTER = {  # where the package is laxer than the format's own text, than an array or a message can be
    *("leading space", "a name twice", "a name with a newline", "a name of 1,000 letters"),
    *("shape overflows beside a zero", "a thousand dimensions"),
}


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_refuses(write, content, message, mmap):
    path = write(content)
    with pytest.raises(BadModelFile, match=message) as caught:
        safetensors.read(path, mmap)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and text.isprintable() and len(text) < 400
    assert caught.value.path == str(path)


@pytest.mark.parametrize("case", BAD)
def test_the_package_refuses_it_too(case):
    if case in STRICTER:
        deserialize(BAD[case][0])
    else:
        with pytest.raises(SafetensorError):
            deserialize(BAD[case][0])


def test_refuses_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("pipe", "not a regular file"),
        ("folder", "directory"),
        ("none", "No such"),
        ("a\0", "null"),
    ]:
        with pytest.raises(BadModelFile, match=rf"cannot be read: .*{message}"):
            safetensors.read(f"{tmp_path}/{name}")


def resident(path) -> int:
    """Bytes of a file's mapping that are resident in this process."""
    _, _, about_the_mapping = Path("/proc/self/smaps").read_text().partition(f"{path}\n")
    return int(re.search(r"^Rss: +(\d+) kB", about_the_mapping, re.MULTILINE)[1]) * 1024


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="resident pages are read from Linux's /proc"
)
def test_release_drops_the_pages_and_keeps_the_values(tmp_path):
    path, n = tmp_path / "large.safetensors", 1 << 20
    save_file({"a": np.full(n, 3, np.float32), "b": np.full(n, 4, np.float32)}, path)
    a, b = safetensors.read(path).values()
    total = a.float32().sum() + b.float32().sum()
    assert resident(path) >= 8 * n
    a.release()
    assert resident(path) <= 4 * n + (1 << 18)
    b.release()
    assert resident(path) <= 1 << 18
    assert a.float32().sum() + b.float32().sum() == total == 7 * n


def test_release_of_a_copy_or_a_small_tensor_does_nothing(tmp_path):
    path = tmp_path / "small.safetensors"
    save_file({"a": np.ones(4, np.float32)}, path)
    for mmap in (True, False):
        tensor = safetensors.read(path, mmap)["a"]
        tensor.release()
        assert tensor.float32().tolist() == [1, 1, 1, 1]


def test_stories260k(stories260k):
    path = stories260k / "model.safetensors"
    tensors = safetensors.read(path)
    official = dict(deserialize(path.read_bytes()))
    assert set(tensors) == set(official)
    for name, tensor in tensors.items():
        assert list(tensor.shape) == official[name]["shape"]
        assert tensor.data.tobytes() == bytes(official[name]["data"])
