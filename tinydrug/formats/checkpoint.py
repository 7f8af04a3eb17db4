"""A checkpoint: the configuration and tensors of a model folder, a .safetensors file or a .gguf file; or what
is left of one whose weights were packed."""

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short

from tinydrug.errors import BadModelFile, ModelNotFound, UnsupportedModel
from tinydrug.formats import gguf, safetensors
from tinydrug.formats.packed import FILE as PACKED
from tinydrug.formats.packed import Packed
from tinydrug.formats.packed import read as read_packed
from tinydrug.formats.tensor import Tensor, check_name, read_bytes

SHARD_NAME = re.compile(r"[^/\\:\x00-\x1f]+\.safetensors")
PICKLES = (".bin", ".pt", ".pth")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What was found at `path`, as given.

    `folder` is where tokenizer files lie, None if a GGUF file brings its own. `config` is what config.json
    says, or would say of a GGUF file. `metadata` is the GGUF file's, None for safetensors. With `packed`, the
    tensors are the source's, of which only kinds and shapes are left.
    """

    path: Path
    folder: Path | None
    config: dict
    generation_config: dict
    tensors: dict[str, Tensor] = field(repr=False)
    metadata: dict | None = field(default=None, repr=False)
    packed: Packed | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, or of the packed weights."""
        if self.packed:
            return self.packed.nbytes
        return sum(tensor.data.size for tensor in self.tensors.values())

    @property
    def n_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """Kind -> bytes of its tensors, or format -> bytes of packed weights, the largest first."""
        if self.packed:
            return self.packed.bytes_by_format
        totals = Counter()
        for tensor in self.tensors.values():
            totals[tensor.kind] += tensor.data.size
        return dict(totals.most_common())


def open_checkpoint(path, mmap: bool = True) -> Checkpoint:
    """Read headers and configuration; no tensor's bytes are touched (mmap=False: all are copied).

    A folder holds packed.safetensors, or config.json with model.safetensors.index.json or model.safetensors,
    or one .gguf file.
    Links are followed wherever they point: a snapshot in the Hugging Face cache is links into ../../blobs.

    ModelNotFound, BadModelFile, or UnsupportedModel (pickles, GGUF architectures this engine does not run).
    """
    path = Path(path)
    if os.path.isdir(path):
        return _open_folder(path, mmap)
    if not os.path.exists(path):
        raise ModelNotFound(f"{path}: no such file or folder", name=str(path), searched=(str(path),))
    if path.suffix == ".gguf":
        return _open_gguf(path, path, mmap)
    if path.name == PACKED:
        return _open_packed(path, path, mmap)
    if path.suffix == ".safetensors":
        return _open_safetensors(path, path, mmap)
    if path.suffix in PICKLES:
        raise _refused_pickle(path)
    raise BadModelFile(path, "neither a model folder nor a .safetensors or .gguf file")


def _open_folder(folder: Path, mmap: bool) -> Checkpoint:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise BadModelFile(folder, f"cannot be read: {error.strerror}") from None
    if PACKED in names:
        return _open_packed(folder, folder / PACKED, mmap)
    ggufs = [name for name in names if name.endswith(".gguf")]
    weights = [name for name in ("model.safetensors.index.json", "model.safetensors") if name in names]
    if weights and ("config.json" in names or not ggufs):
        return _open_safetensors(folder, folder / weights[0], mmap)
    if len(ggufs) == 1:
        return _open_gguf(folder, folder / ggufs[0], mmap)
    if ggufs:
        raise BadModelFile(folder, f"holds {len(ggufs)} GGUF files, name one of them: {', '.join(ggufs)}")
    if any(name.endswith(PICKLES) for name in names):
        raise _refused_pickle(folder)
    reason = "expected config.json with model.safetensors or model.safetensors.index.json, or one .gguf file"
    raise BadModelFile(folder, f"not a model: {reason}")


def _open_safetensors(path: Path, file: Path, mmap: bool) -> Checkpoint:
    """`file` is a .safetensors file or the index of its shards; the rest lies beside it."""
    folder = file.parent
    config = _read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    generation_config = _read_json(generation) if os.path.exists(generation) else {}
    tensors = _read_shards(file, mmap) if file.suffix == ".json" else safetensors.read(file, mmap)
    return Checkpoint(path, folder, config, generation_config, tensors)


def _open_gguf(path: Path, file: Path, mmap: bool) -> Checkpoint:
    metadata, tensors = gguf.read(file, mmap)
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModel(
            f"{file}: one part of a split GGUF: join the parts with llama-gguf-split --merge"
        )
    folder = _tokenizer_folder(file, metadata)
    return Checkpoint(path, folder, gguf.hf_config(file, metadata, tensors), {}, tensors, metadata)


def _open_packed(path: Path, file: Path, mmap: bool) -> Checkpoint:
    packed, fields = read_packed(file, mmap)
    folder = _tokenizer_folder(file, fields["metadata"] or {})
    return Checkpoint(path, folder, packed=packed, **fields)


def _tokenizer_folder(file: Path, metadata: dict) -> Path | None:
    """Where to look for a tokenizer: not beside a GGUF file that brings its own."""
    return None if "tokenizer.ggml.tokens" in metadata else file.parent


def _read_shards(index: Path, mmap: bool) -> dict[str, Tensor]:
    """The tensors that an index maps to shards; files and tensors it does not mention are left alone."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadModelFile(index, "no weight_map from tensors to shards")
    for name, shard in weight_map.items():
        check_name(index, name)
        if not isinstance(shard, str) or not shard.isprintable() or not SHARD_NAME.fullmatch(shard):
            raise BadModelFile(
                index, f"shard {short(shard)} is not a bare file name ending in .safetensors", name
            )
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not os.path.isfile(index.parent / shard)]:
        reason = (
            f"{len(missing)} of {len(shards)} shards are missing, download incomplete? {', '.join(missing)}"
        )
        raise BadModelFile(index, reason)
    found = {shard: safetensors.read(index.parent / shard, mmap) for shard in shards}
    if absent := sorted(name for name, shard in weight_map.items() if name not in found[shard]):
        listed = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise BadModelFile(index, f"{len(absent)} tensors are not in the shard it maps them to: {listed}")
    return {name: found[shard][name] for name, shard in weight_map.items()}


def _read_json(path: Path) -> dict:
    content, _ = read_bytes(path, mapped=False)
    try:
        value = json.loads(content.tobytes().decode())
    except RecursionError:
        raise BadModelFile(path, "nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON
        raise BadModelFile(path, f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadModelFile(path, f"holds a JSON {type(value).__name__}, not an object")
    return value


def _refused_pickle(path: Path) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path}: pickle checkpoints are not loaded, they can run code: convert it to safetensors "
        "(transformers' save_pretrained does), or take a revision of the model that has model.safetensors"
    )
