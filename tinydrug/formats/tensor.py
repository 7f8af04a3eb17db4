"""A named tensor of a checkpoint: its bytes exactly as the file holds them, and their values on request."""

import math
import mmap
import os
import stat
from dataclasses import dataclass, field

import numpy as np

from tinydrug.errors import BadModelFile, UnsupportedModel


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of a file. `kind` names its element format and is a key of KINDS.

    `shape` is outermost first, as in HF: (out, in) for a linear map. `data` is (bytes,) uint8, read-only: a
    view of `mapping`, or of a private copy of the file when `mapping` is None.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    data: np.ndarray = field(repr=False)
    path: str
    mapping: mmap.mmap | None = field(default=None, repr=False)

    def float32(self) -> np.ndarray:
        """The values, (*shape) float32, exact for every kind but f64, which is rounded; f32 is not copied.

        UnsupportedModel if nothing here turns this kind into floats.
        """
        if not self.data.size:
            return np.zeros(self.shape, np.float32)
        # Infinite scales and f64 beyond float32 are the file's values, not a fault of this arithmetic.
        with np.errstate(invalid="ignore", over="ignore"):
            if self.kind in TO_FLOAT32:
                values = TO_FLOAT32[self.kind](self.data)
            else:
                values = _library_dequantize(self)
        return values.reshape(self.shape)

    def release(self) -> None:
        """Let the kernel drop the mapped pages that hold this tensor alone; reading it brings them back."""
        if self.mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = self.data.ctypes.data - np.frombuffer(self.mapping, np.uint8).ctypes.data
        start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (first + self.data.size) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            self.mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)


def read_bytes(path, mapped: bool = True) -> tuple[np.ndarray, mmap.mmap | None]:
    """A file's content, (bytes,) uint8, read-only: a view of the mapping that comes with it, or a copy.

    BadModelFile if it cannot be read, is no regular file, or is a Git LFS pointer.
    """
    mapping = None
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            if mapped and status.st_size:  # an empty file cannot be mapped
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                content = np.frombuffer(mapping, np.uint8)
            else:
                content = np.fromfile(file, np.uint8)
                content.setflags(write=False)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise BadModelFile(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if content[:23].tobytes() == b"version https://git-lfs":
        raise BadModelFile(path, "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")
    return content, mapping


def _open_nonblocking(path, flags):
    """A named pipe in place of a file must be refused, not waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def check_name(path, name: str) -> None:
    """BadModelFile unless the name of a tensor can stand in a one-line message."""
    if len(name) > 512 or not name.isprintable():
        raise BadModelFile(path, f"a tensor's name is over-long or not printable: {name[:32]!a}")


def byte_size(path, name: str, kind: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of this kind and shape takes; BadModelFile if there is no such tensor."""
    if len(shape) > 64:
        raise BadModelFile(path, f"{len(shape)} dimensions", name)
    count = 1
    for dim in shape:
        count *= max(dim, 1)
        if count >= 1 << 59:  # so that eight bytes an element still fit an index
            raise BadModelFile(path, "its shape overflows", name)
    elements, size = KINDS[kind]
    if 0 in shape:
        count = 0
    if count % elements:
        raise BadModelFile(path, f"{count} elements of {kind}, which comes in blocks of {elements}", name)
    return count // elements * size


Q8_0 = np.dtype([("d", "<f2"), ("q", "i1", 32)])
Q4_0 = np.dtype([("d", "<f2"), ("q", "u1", 16)])
Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])


def _f32(data: np.ndarray) -> np.ndarray:
    return np.require(data.view("<f4"), requirements="A")


def _bf16(data: np.ndarray) -> np.ndarray:
    return np.left_shift(data.view("<u2"), 16, dtype=np.uint32).view(np.float32)


def _q8_0(data: np.ndarray) -> np.ndarray:
    """Blocks of 32: d * q."""
    blocks = data.view(Q8_0)
    return np.multiply(blocks["q"], blocks["d"][:, None], dtype=np.float32)


def _q4_0(data: np.ndarray) -> np.ndarray:
    """Blocks of 32, low nibbles first: d * (q - 8)."""
    blocks = data.view(Q4_0)
    values = _nibbles(blocks["q"])  # (blocks, 32)
    values -= 8
    values *= blocks["d"][:, None]
    return values


def _q4_1(data: np.ndarray) -> np.ndarray:
    """Blocks of 32, low nibbles first: d * q + m."""
    blocks = data.view(Q4_1)
    values = _nibbles(blocks["q"])  # (blocks, 32)
    values *= blocks["d"][:, None]
    values += blocks["m"][:, None]
    return values


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """packed (blocks, 16) uint8 -> (blocks, 32) float32: the 16 low nibbles, then the 16 high ones."""
    values = np.empty((len(packed), 32), np.float32)
    values[:, :16] = packed & 15
    values[:, 16:] = packed >> 4
    return values


def _library_dequantize(tensor: Tensor) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = tensor.data.reshape(math.prod(tensor.shape[:-1]), -1)
    try:
        return dequantize(rows, GGMLQuantizationType[tensor.kind.upper()])
    except (KeyError, NotImplementedError):
        reason = (
            f"tensor {tensor.name} is {tensor.kind}, which cannot be turned into floats: convert it to bf16"
        )
        raise UnsupportedModel(f"{tensor.path}: {reason}") from None


TO_FLOAT32 = {  # kind -> function of data (bytes,) giving float32 of any shape
    "f32": _f32,
    "f16": lambda data: data.view("<f2").astype(np.float32),
    "bf16": _bf16,
    "f64": lambda data: data.view("<f8").astype(np.float32),
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
}

KINDS = {  # kind -> (elements a block, bytes a block)
    "f64": (1, 8),
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "i64": (1, 8),
    "i32": (1, 4),
    "i16": (1, 2),
    "i8": (1, 1),
    # safetensors only
    "u64": (1, 8),
    "u32": (1, 4),
    "u16": (1, 2),
    "u8": (1, 1),
    "bool": (1, 1),
    "c64": (1, 8),
    "f8_e4m3": (1, 1),
    "f8_e5m2": (1, 1),
    "f8_e8m0": (1, 1),
    "f8_e4m3fnuz": (1, 1),
    "f8_e5m2fnuz": (1, 1),
    "f6_e2m3": (4, 3),
    "f6_e3m2": (4, 3),
    "f4": (2, 1),
    # GGUF only
    "q8_0": (32, 34),
    "q8_1": (32, 36),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q2_0": (64, 18),
    "q1_0": (128, 18),
    "q8_k": (256, 292),
    "q6_k": (256, 210),
    "q5_k": (256, 176),
    "q4_k": (256, 144),
    "q3_k": (256, 110),
    "q2_k": (256, 84),
    "iq4_nl": (32, 18),
    "iq4_xs": (256, 136),
    "iq3_s": (256, 110),
    "iq3_xxs": (256, 98),
    "iq2_s": (256, 82),
    "iq2_xs": (256, 74),
    "iq2_xxs": (256, 66),
    "iq1_m": (256, 56),
    "iq1_s": (256, 50),
    "tq2_0": (256, 66),
    "tq1_0": (256, 54),
    "mxfp4": (32, 17),
    "nvfp4": (64, 36),
}
