"""Packed weights: a model's panels as they lie in memory, in one safetensors file that the next start maps.

    weights/NAME-q4/
      packed.safetensors     every area of the weight table, the first on a page, and "checkpoint", see below
      tokenizer.json, ...    the files of the tokenizer, unless a GGUF file brought it
      SOURCE                 where they are from, for people

The metadata are format, layout, quantisation, a fingerprint of the source's files, a digest of every tensor,
and a digest of all these. "checkpoint" is JSON: configs, a GGUF file's metadata, the source's tensors by kind
and shape, the format of every weight: so the source may go. Every byte is checked whenever the weights are
loaded, at the speed of memory. A folder appears whole or not at all.
"""

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING

import numpy as np

from tinydrug.errors import BadModelFile, ConfigError
from tinydrug.formats import safetensors
from tinydrug.formats.tensor import KINDS, Tensor, byte_size, check_name
from tinydrug.kernels.checksum import digest
from tinydrug.kernels.memory import LINE, PAGE, arena
from tinydrug.kernels.pack import FORMATS
from tinydrug.kernels.tables import PAD, PANEL

if TYPE_CHECKING:
    from tinydrug.formats.checkpoint import Checkpoint
    from tinydrug.formats.weights import Weights

FILE = "packed.safetensors"
FORMAT = "tinydrug packed weights"
LAYOUT = f"panels {PANEL} x {PAD}, 4"  # the last number grows when a tensor's bytes, or their meaning, change
TEXTS = ("format", "layout", "quant", "source", "digests")
CHECKPOINT = "checkpoint"
OTHER = "it does not have the digest that it was written with"
AGAIN = "run `tinydrug quantize` again"
NOTE = "SOURCE"  # its first line says where the weights are from
ROOM = 64 << 20  # bytes of a disk that stay free, for tokenizers and others
READERS = 16  # threads that bring areas in: a disk is fast only with many requests
PARTIAL = ".packing-"  # how a folder's name begins while it is written
WEIGHTS = (".safetensors", ".gguf")
CONFIGS = ("config.json", "generation_config.json", "model.safetensors.index.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates",
)

Layout = Mapping[str, tuple[type, tuple[int, ...]]]  # area of the weight table -> element type and shape


@dataclass(frozen=True, eq=False)
class Packed:
    """An opened file of packed weights, of which all but the weights' own bytes is known to be sound.

    `source` is the `fingerprint` of the files it was made of, `formats` has every weight that is a row of the
    table, `digests` and `tensors` every area.
    """

    path: str
    quant: str
    source: str
    formats: dict[str, str] = field(repr=False)
    digests: dict[str, str] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)
    mmap: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all areas."""
        return sum(tensor.data.size for tensor in self.tensors.values())

    @property
    def bytes_by_format(self) -> dict[str, int]:
        """Format -> bytes of its weights, the largest first."""
        totals = Counter()
        for name, tensor in self.tensors.items():
            totals[self.formats.get(name.rpartition(".")[0], tensor.kind)] += tensor.data.size
        return dict(totals.most_common())

    def format(self, name: str, least: int) -> str:
        """How a weight is packed. BadModelFile if it is not there, or has not `least` bytes."""
        data = self.tensors.get(f"{name}.data")
        if name not in self.formats or data is None or data.data.size < least:
            raise self._bad(f"it does not hold {name} as its config describes it")
        return self.formats[name]

    def areas(self, layout: Layout, progress: Callable[[float], None] | None = None) -> dict[str, np.ndarray]:
        """The areas as views of the mapping (mmap=False: of a copy), every byte of them checked.

        BadModelFile if they are not of this layout, or not as they were written."""
        if differ := sorted(layout.keys() ^ self.tensors.keys()):
            raise self._bad(f"its areas are not those of its config: {', '.join(differ[:5])}")
        for name, (dtype, shape) in layout.items():
            tensor, kind = self.tensors[name], _kind(dtype)
            if (tensor.kind, tensor.shape) != (kind, shape):
                raise self._bad(f"it is {tensor.kind} {tensor.shape}, expected {kind} {shape}", name)
            if tensor.data.ctypes.data % LINE:
                raise self._bad(f"it does not begin a cache line: {AGAIN}", name)
        if self.mmap:
            _advise(next(iter(self.tensors.values())).mapping)
            areas = {
                name: self.tensors[name].data.view(dtype).reshape(shape)
                for name, (dtype, shape) in layout.items()
            }
        else:
            areas = arena(layout)

        def bring(name: str) -> str:
            if not self.mmap:
                np.copyto(areas[name].reshape(-1).view(np.uint8), self.tensors[name].data)
                self.tensors[name].release()
            return digest(areas[name])

        done = 0
        with ThreadPoolExecutor(READERS) as pool:
            for name, found in zip(areas, pool.map(bring, areas), strict=True):
                if found != self.digests[name]:
                    raise self._bad(f"damaged: {OTHER}; {AGAIN}", name)
                done += areas[name].nbytes
                if progress:
                    progress(done / self.nbytes)
        return areas

    def _bad(self, reason: str, tensor: str = "") -> BadModelFile:
        return BadModelFile(self.path, reason, tensor)


def fingerprint(path: str | os.PathLike) -> str:
    """Of the files that the model at `path` consists of, by name, size and time; nothing is read."""
    path = Path(path)
    files = [path]
    if path.suffix != ".gguf":
        folder = path if path.is_dir() else path.parent
        files = [folder / name for name in (*CONFIGS, *TOKENIZER)]
        files += [file for file in folder.iterdir() if file.suffix in WEIGHTS]
    about = [(file.name, file.stat()) for file in sorted(files) if file.is_file()]
    facts = [(name, status.st_size, int(status.st_mtime)) for name, status in about]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


# --- reading ------------------------------------------------------------------------------------------------
def read(file: Path, mapped: bool = True) -> tuple[Packed, dict]:
    """The packed weights in `file`, and the fields of the `Checkpoint` they stand for.

    BadModelFile for anything that this version did not write, or that has changed since.
    """
    path = str(file)
    texts, tensors = safetensors.read_metadata(path), safetensors.read(path)
    if texts.get("format") != FORMAT:
        raise BadModelFile(path, f"not packed weights: {AGAIN}")
    if texts.get("layout") != LAYOUT:
        layout = short(texts.get("layout"))
        raise BadModelFile(path, f"packed in the layout {layout}, this version has {LAYOUT!r}: {AGAIN}")
    if texts.get("digest") != _digest(texts):
        raise BadModelFile(path, f"its header is damaged: {OTHER}; {AGAIN}")
    try:
        digests = _object(texts["digests"], str)
        about = tensors.pop(CHECKPOINT, None)
        if about is None or about.kind != "u8" or digests.keys() != {CHECKPOINT, *tensors}:
            raise ValueError("its tensors are not those of its digests")
        if about.data.size % LINE or digest(about.data) != digests.pop(CHECKPOINT):
            raise ValueError(f"its {CHECKPOINT} is damaged: {OTHER}")
        fields = _object(about.data.tobytes(), object)
        formats = _object(fields["formats"], str)
        if unknown := sorted(set(formats.values()) - FORMATS.keys()):
            raise ValueError(f"it has formats that are not known: {', '.join(map(short, unknown[:5]))}")
        checkpoint = {
            "config": _object(fields["config"], object),
            "generation_config": _object(fields["generation_config"], object),
            "metadata": fields["metadata"] and _object(fields["metadata"], object),
            "tensors": {
                name: _described(path, name, *what) for name, what in _object(fields["tensors"], list).items()
            },
        }
        packed = Packed(path, texts["quant"], texts["source"], formats, digests, tensors, mapped)
    except BadModelFile:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadModelFile(path, f"not as it was written: {error}; {AGAIN}") from None
    return packed, checkpoint


def _object(value, kind: type) -> dict:
    """A JSON object, or its text, whose values are of this kind; ValueError for anything else."""
    value = json.loads(value) if isinstance(value, str | bytes) else value
    if not isinstance(value, dict) or not all(isinstance(each, kind) for each in value.values()):
        raise ValueError(f"{short(value)} is not an object of {kind.__name__}")
    return value


def _described(path: str, name: str, kind: str, shape: list) -> Tensor:
    """A tensor of the source, of which only kind and shape are left."""
    check_name(path, name)
    if kind not in KINDS or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"tensor {name} was {short(kind)} {short(shape)}")
    byte_size(path, name, kind, tuple(shape))
    return Tensor(name, tuple(shape), kind, np.empty(0, np.uint8), path)


def _advise(mapping: mmap.mmap) -> None:
    """Ask for huge pages, which some file systems have."""
    with suppress(OSError, AttributeError):
        mapping.madvise(mmap.MADV_HUGEPAGE)


def _digest(texts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([texts.get(name) for name in TEXTS]).encode()).hexdigest()


def _kind(dtype: type) -> str:
    return {np.uint8: "u8", np.float32: "f32"}[dtype]


# --- writing ------------------------------------------------------------------------------------------------
def check_target(folder: str | os.PathLike, nbytes: int) -> None:
    """ConfigError unless so many bytes of packed weights can become `folder`, as far as one can tell."""
    folder = Path(os.path.realpath(folder))
    try:
        held = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
        free = shutil.disk_usage(next(parent for parent in folder.parents if parent.exists())).free
    except OSError as error:
        raise _unwritten(folder, error) from None
    if held and (FILE not in held or not held <= {FILE, *TOKENIZER, NOTE}):
        raise ConfigError(f"--output: {folder} holds other things: name another folder", "output")
    if nbytes + ROOM > free:
        raise ConfigError(
            f"--output: {folder} takes {nbytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} left: make "
            "room, or name a folder on another",
            "output",
        )


def save(
    folder: str | os.PathLike,
    checkpoint: "Checkpoint",
    weights: "Weights",
    note: str,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Make `folder` hold the packed weights of a checkpoint, its tokenizer, and a note on where it is from.

    One that is there already is replaced if it holds the like and nothing else. ConfigError if it holds more,
    or the disk does not take it; then nothing has changed.
    """
    folder = Path(os.path.realpath(folder))
    header = _header(checkpoint, weights)
    check_target(folder, len(header) + weights.nbytes)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _scratch(folder.parent) as scratch:
            new, old = scratch / "new", scratch / "old"
            new.mkdir()
            for name in TOKENIZER if checkpoint.folder else ():
                _copy(checkpoint.folder / name, new / name)
            (new / NOTE).write_text(note, "utf-8")
            _write(new / FILE, header, weights, progress)
            try:
                if folder.exists():
                    os.rename(folder, old)
                os.rename(new, folder)
            finally:
                if old.exists() and not folder.exists():
                    os.rename(old, folder)
    except OSError as error:
        raise _unwritten(folder, error) from None


def _unwritten(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--output: {folder}: cannot be written: {error.strerror or error}", "output")


def _header(checkpoint: "Checkpoint", weights: "Weights") -> bytes:
    """The file up to the first area: length, JSON and the "checkpoint", in whole pages."""
    about = {
        "config": checkpoint.config,
        "generation_config": checkpoint.generation_config,
        "metadata": checkpoint.metadata,
        "tensors": {name: [tensor.kind, tensor.shape] for name, tensor in checkpoint.tensors.items()},
        "formats": weights.formats,
    }
    content = _whole_pages(json.dumps(about).encode())
    texts = {
        "format": FORMAT,
        "layout": LAYOUT,
        "quant": weights.quant,
        "source": fingerprint(checkpoint.path),
        "digests": json.dumps({CHECKPOINT: digest(np.frombuffer(content, np.uint8)), **weights.digests}),
    }
    header = {"__metadata__": texts | {"digest": _digest(texts)}}
    header[CHECKPOINT] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
    end = len(content)
    for name, area in weights.areas.items():
        start, end = end, end + area.nbytes
        dtype = _kind(area.dtype.type).upper()
        header[name] = {"dtype": dtype, "shape": area.shape, "data_offsets": [start, end]}
    text = _whole_pages(bytes(8) + json.dumps(header).encode())[8:]
    return len(text).to_bytes(8, "little") + text + content


def _whole_pages(text: bytes) -> bytes:
    return text + b" " * (-len(text) % PAGE)


def _write(file: Path, header: bytes, weights: "Weights", progress) -> None:
    done = 0
    with open(file, "xb") as out:
        out.write(header)
        for area in weights.areas.values():
            out.write(area.data)
            done += area.nbytes
            if progress:
                progress(done / weights.nbytes)
        out.flush()
        os.fsync(out.fileno())  # the folder's name must not reach the disk before the content


def _copy(source: Path, target: Path) -> None:
    """A file, or the files of a folder, if there are any."""
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        shutil.copyfile(source, target)


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A folder beside the one to be, which goes away however this ends; those of killed processes go, too."""
    for left in parent.glob(f"{PARTIAL}*"):
        with suppress(OSError), _held(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=parent, ignore_cleanup_errors=True) as scratch:
        with _held(scratch, fcntl.LOCK_SH):
            yield Path(scratch)


@contextmanager
def _held(folder: str | os.PathLike, how: int) -> Iterator[None]:
    """The folder locked, until this ends or the process does. OSError if another one has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)
