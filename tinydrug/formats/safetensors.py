"""safetensors files: an 8-byte length, a JSON header, then the tensors' bytes without a gap."""

import json
from reprlib import repr as short

from tinydrug.errors import BadModelFile
from tinydrug.formats.tensor import Tensor, byte_size, check_name, read_bytes

MAX_HEADER = 100_000_000  # bytes; the format's own limit


def read(path, mmap: bool = True) -> dict[str, Tensor]:
    """The tensors of a file by name, in its order, as views of one mapping (mmap=False: of one copy).

    BadModelFile for anything that is not a sound safetensors file. Element types that the engine cannot
    compute with (float8, ...) are read like all others: they are refused where they are used.
    """
    path = str(path)
    content, mapping = read_bytes(path, mapped=mmap)
    header, start = _header(path, content)
    _metadata(path, header)
    spans = {name: _span(path, name, entry) for name, entry in header.items()}

    end = 0
    for name, (_, _, begin, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != end:
            fault = (
                "overlaps the tensor before it" if begin < end else f"leaves a hole of {begin - end} bytes"
            )
            raise BadModelFile(path, f"it begins at byte {begin} of the data and {fault}", name)
        end = stop
    expected, actual = start + end, content.size
    if actual < expected:
        raise BadModelFile(path, f"expected {expected} bytes, the file has {actual}: download incomplete?")
    if actual > expected:
        raise BadModelFile(path, f"{actual - expected} bytes after the last tensor, which ends at {expected}")
    return {
        name: Tensor(name, shape, kind, content[start + begin : start + stop], path, mapping)
        for name, (kind, shape, begin, stop) in spans.items()
    }


def read_metadata(path) -> dict[str, str]:
    """The texts that a file carries beside its tensors. BadModelFile as for `read`."""
    path = str(path)
    return _metadata(path, _header(path, read_bytes(path)[0])[0])


def _metadata(path, header: dict) -> dict[str, str]:
    """Taken out of the header; the rest are tensors."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BadModelFile(path, "its __metadata__ is not an object of strings")
    return metadata


def _header(path, content) -> tuple[dict, int]:
    """The header's JSON object, and the offset of the data behind it."""
    if content.size < 8:
        raise BadModelFile(
            path, f"{content.size} bytes are too few for a safetensors file: download incomplete?"
        )
    length = int.from_bytes(content[:8].tobytes(), "little")
    if length > MAX_HEADER:
        raise BadModelFile(path, f"not a safetensors file: its header would have {length} bytes")
    start = 8 + length
    if start > content.size:
        reason = f"its header ends at byte {start}, the file has {content.size} bytes: download incomplete?"
        raise BadModelFile(path, reason)
    text = content[8:start].tobytes()
    if not text.startswith(b"{"):
        raise BadModelFile(path, "not a safetensors file: its header does not begin with '{'")
    try:
        return json.loads(text.decode(), object_pairs_hook=_without_duplicates), start
    except RecursionError:
        raise BadModelFile(path, "its header is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, a name twice
        raise BadModelFile(path, f"its header is not valid JSON: {error}") from None


def _without_duplicates(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _span(path, name: str, entry) -> tuple[str, tuple[int, ...], int, int]:
    """(kind, shape, begin, end) of one header entry, its offsets counted from the end of the header."""
    check_name(path, name)
    if not isinstance(entry, dict):
        raise BadModelFile(path, f"its header entry is {short(entry)}, not an object", name)
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if kind is None:
        raise BadModelFile(path, f"dtype {short(dtype)} is not one of the format", name)
    if not _are_sizes(shape):
        raise BadModelFile(path, f"shape {short(shape)} is not a list of sizes", name)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadModelFile(path, f"data_offsets {short(offsets)} are not [begin, end]", name)
    expected = byte_size(path, name, kind, tuple(shape))
    begin, end = offsets
    if end - begin != expected:
        reason = (
            f"shape {short(shape)} of {dtype} takes {expected} bytes, its data_offsets span {end - begin}"
        )
        raise BadModelFile(path, reason, name)
    return kind, tuple(shape), begin, end


def _are_sizes(values) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


DTYPES = {  # the format's name -> kind
    kind.upper(): kind
    for kind in (
        "f64 f32 f16 bf16 i64 i32 i16 i8 u64 u32 u16 u8 bool c64 "
        "f8_e4m3 f8_e5m2 f8_e8m0 f8_e4m3fnuz f8_e5m2fnuz f6_e2m3 f6_e3m2 f4"
    ).split()
}
