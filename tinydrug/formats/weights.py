"""From the tensors of a checkpoint to the rows of the weight table: what a model needs, checked, then packed
in panels."""

import hashlib
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from tinydrug.errors import BadModelFile, ConfigError
from tinydrug.formats.tensor import Tensor
from tinydrug.kernels.memory import aligned
from tinydrug.kernels.pack import FORMATS, PACKERS, SOURCE
from tinydrug.kernels.tables import PAD, PANEL, WEIGHT

QUANTS = {  # --quant: formats of (matrices, embedding and head); None: as the file has it
    "none": (None, None),
    "f32": ("f32", "f32"),
    "q8": ("q8_0", "q8_0"),
    "q4": ("q4_0", "q8_0"),  # on a small model a 4-bit head costs more quality than all it saves
}
_ELEMENT = {"f32": 4, "f16": 2, "bf16": 2}


def padded(size: int, to: int = PAD) -> int:
    return -(-size // to) * to


@dataclass(frozen=True)
class Need:
    """One matrix or vector of a model: which tensor it comes from, in which shape, and how it is laid out.

    Heads are padded: a head of width d becomes two halves of padded(d) / 2, so that rotary pairs lie at a
    fixed distance."""

    source: str  # tensor name
    shape: tuple[int, ...]  # of the tensor in the file
    role: str = "matrix"  # matrix (panels) | vector | table (plain float rows)
    bias: str | None = None  # tensor name
    transposed: bool = False  # the file has (in, out): GPT-2's Conv1D
    columns: tuple[int, int] | None = None  # of the output rows, which part (GPT-2's fused q, k, v)
    out_head: int | None = None  # output rows are heads of this width,
    in_head: int | None = None  # input columns are
    interleaved: bool = False  # output rows of a head hold rotary pairs side by side (GGUF), not in halves
    fine: bool = False  # embedding and head: may be quantised finer
    also: tuple[tuple[str, tuple[int, ...]], ...] = ()  # further tensors, by name and shape, for
    change: Callable | None = None  # (source, bias, *also), floats -> what to pack in place of the two

    @property
    def names(self) -> list[str]:
        """The tensors it is made of."""
        return [name for name in (self.source, self.bias, *(name for name, _ in self.also)) if name]


@dataclass(frozen=True)
class Weight:
    """A loaded weight: its row in the table, and what the program must know of it."""

    row: int
    format: str
    n: int  # padded output rows
    k: int  # padded input columns


def check(needs: Mapping[str, Need], tensors: Mapping[str, Tensor], path) -> None:
    """Every missing or mis-shaped tensor, named at once."""
    faults = []
    for need in needs.values():
        wanted = [(need.source, need.shape), *need.also]
        if need.bias:
            wanted.append(
                (need.bias, (need.shape[-1] if need.transposed or len(need.shape) == 1 else need.shape[0],))
            )
        for name, shape in wanted:
            if name not in tensors:
                faults.append(f"{name} is missing")
            elif tensors[name].shape != shape:
                hint = " (transposed?)" if tensors[name].shape == shape[::-1] else ""
                faults.append(f"{name} is {tensors[name].shape}, expected {shape}{hint}")
    if faults:
        faults = list(dict.fromkeys(faults))
        more = f" and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise BadModelFile(path, f"the weights do not fit the config: {'; '.join(faults[:20])}{more}")


class Weights:
    """The weight table of one model, and the memory its rows point into."""

    def __init__(self, needs: Mapping[str, Need], tensors: Mapping[str, Tensor], quant: str, threads: int,
                 progress: Callable[[float], None] | None = None):  # fmt: skip
        if quant not in QUANTS:
            raise ConfigError(f"--quant: {quant!r} is not one of {', '.join(QUANTS)}", "quant")
        self.table = WEIGHT.rows(len(needs))
        self.quant = quant
        self._memory: list[np.ndarray] = []
        self._by_name: dict[str, Weight] = {}
        self._threads = threads
        total, done = sum(tensors[need.source].data.nbytes for need in needs.values()) or 1, 0
        loaded: dict[Need, Weight] = {}  # a tied head is the embedding
        with ThreadPoolExecutor(threads) as pool:
            for row, (name, need) in enumerate(needs.items()):
                if need not in loaded:
                    loaded[need] = self._load(pool, row, need, tensors)
                self._by_name[name] = loaded[need]
                done += tensors[need.source].data.nbytes
                if progress:
                    progress(done / total)

    def __getitem__(self, name: str) -> Weight:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def nbytes(self) -> int:
        """Bytes of memory all weights take."""
        return sum(area.nbytes for area in self._memory)

    def floats(self, name: str) -> np.ndarray:
        """The rows of a table, (n, k) float32, padded."""
        address = int(self.table[self[name].row]["data"])
        return next(area for area in self._memory if area.ctypes.data == address)

    def nbytes_of(self, row: int) -> int:
        """Bytes of one weight's panels and scales."""
        addresses = {int(self.table[row]["data"]), int(self.table[row]["scales"])}
        return sum(area.nbytes for area in self._memory if area.ctypes.data in addresses)

    def fingerprint(self) -> str:
        """A hash of all weights as they lie in memory, in hexadecimal digits: 1 to 3 s a GB and thread."""
        layout = [
            (name, weight.row, weight.format, weight.n, weight.k) for name, weight in self._by_name.items()
        ]
        with ThreadPoolExecutor(self._threads) as pool:
            parts = pool.map(lambda area: hashlib.sha256(area).digest(), self._memory)
            return hashlib.sha256(repr(layout).encode() + b"".join(parts)).hexdigest()

    def _keep(self, area: np.ndarray) -> int:
        self._memory.append(area)
        return area.ctypes.data

    def _load(self, pool, row, need, tensors) -> Weight:
        tensor, bias = _read(need, tensors)
        if need.role == "matrix":
            weight = self._matrix(pool, row, need, tensor)
        elif need.role == "table":
            weight = self._table(row, need, tensor.float32())
        else:
            weight = self._table(row, need, tensor.float32()[None])
        if bias is not None:
            if need.role == "matrix":
                bias = np.append(bias, 0)[_row_map(need, len(bias))]  # index -1: padding
            area = aligned(weight.n if need.role == "matrix" else weight.k, np.float32)
            area[: len(bias)] = bias
            self.table[row]["bias"] = self._keep(area)
        tensors[need.source].release()
        return weight

    def _table(self, row, need, values) -> Weight:
        if need.out_head:
            values = np.pad(values, ((0, 0), (0, 1)))[:, _row_map(need, values.shape[1])]
        n, k = values.shape
        area = aligned((n, padded(k)), np.float32)
        area[:, :k] = values
        self.table[row]["n"], self.table[row]["k"] = n, padded(k)
        self.table[row]["data"] = self._keep(area)
        return Weight(row, "f32", n, padded(k))

    def _matrix(self, pool, row, need, tensor) -> Weight:
        columns = tensor.shape[0] if need.transposed else tensor.shape[1]
        group = need.in_head // 2 if need.in_head else columns
        padded_group = padded(need.in_head) // 2 if need.in_head else padded(columns)
        k = columns // group * padded_group
        format_, through_floats = _format(need, tensor, self.quant)
        kind, data = tensor.kind, tensor.data
        if through_floats:
            kind, data = "f32", np.ascontiguousarray(tensor.float32()).reshape(-1).view(np.uint8)
        elif data.ctypes.data % max(1, _ELEMENT.get(kind, 1)):
            data = data.copy()  # a safetensors file may put its data at any byte
        layout = FORMATS[format_]
        available = tensor.shape[1] if need.transposed else tensor.shape[0]
        rows = _row_map(need, available)
        n = padded(len(rows))  # whole panels, and a whole number of blocks for whoever reads the result
        rows = np.pad(rows, (0, n - len(rows)), constant_values=-1).astype(np.int32)
        panels, blocks = n // PANEL, k // PAD
        packed = aligned((panels, blocks, layout.panel_bytes), np.uint8)
        scales = aligned((panels, blocks, layout.scale_bytes), np.uint8)
        source = SOURCE.rows()
        row_bytes = data.nbytes // tensor.shape[0]
        element = _ELEMENT.get(kind, 0)
        source["data"] = data.ctypes.data
        source["row_stride"] = element if need.transposed else row_bytes
        source["column_stride"] = row_bytes if need.transposed else element
        source["rows"], source["k"], source["padded_k"] = rows.ctypes.data, columns, k
        source["group"], source["padded_group"] = group, padded_group if need.in_head else group
        source["data_out"], source["scales_out"] = packed.ctypes.data, scales.ctypes.data
        pack = PACKERS[kind, format_]
        pack.address  # noqa: B018 - compile here, once, not in every thread of the pool

        def work(lo, hi):
            scratch = aligned(64 + 4 * k, np.uint8)
            pack(source.ctypes.data, lo, hi, scratch.ctypes.data)

        step = max(1, math.ceil(panels / self._threads))
        list(pool.map(work, range(0, panels, step), [min(p + step, panels) for p in range(0, panels, step)]))
        entry = self.table[row]
        entry["n"], entry["k"] = n, k
        entry["data"], entry["scales"] = self._keep(packed), self._keep(scales)
        entry["gather"] = layout.gather.address if need.fine else 0
        return Weight(row, format_, n, k)


def _read(need: Need, tensors: Mapping[str, Tensor]) -> tuple[Tensor, np.ndarray | None]:
    """The tensor to pack and its bias, as the file has them or changed."""
    tensor, bias = tensors[need.source], tensors[need.bias].float32() if need.bias else None
    if need.change:
        further = (tensors[name].float32() for name, _ in need.also)
        values, bias = need.change(tensor.float32(), bias, *further)
        data = np.ascontiguousarray(values, np.float32)
        tensor = replace(tensor, shape=data.shape, kind="f32", data=data.reshape(-1).view(np.uint8))
    return tensor, bias


def _row_map(need: Need, available: int) -> np.ndarray:
    """The tensor row of each output row, -1 for padding: heads put in padded halves, parts cut out."""
    rows = np.arange(available)
    if need.columns is not None:
        rows = rows[slice(*need.columns)]
    if need.out_head:
        d, half = need.out_head, padded(need.out_head) // 2
        heads = rows.reshape(-1, d)
        pairs = (
            heads.reshape(-1, d // 2, 2).transpose(0, 2, 1)
            if need.interleaved
            else heads.reshape(-1, 2, d // 2)
        )
        out = np.full((len(heads), 2, half), -1)
        out[:, :, : d // 2] = pairs
        rows = out.reshape(-1)
    return rows


def _format(need: Need, tensor: Tensor, quant: str) -> tuple[str, bool]:
    """The format a matrix is packed in, and whether its values must go through floats first: a type without a
    packer of its own, or blocks that padding would tear apart. Then, unless a quantisation is asked for,
    it stays exact: f32."""
    wanted, kind = QUANTS[quant][need.fine], "f32" if need.change else tensor.kind
    format_ = wanted or (kind if kind in FORMATS else "f32")
    torn = kind not in _ELEMENT and need.in_head is not None and need.in_head % PAD != 0
    if (kind, format_) in PACKERS and not torn:
        return format_, False
    return wanted or "f32", True


def packed_bytes(need: Need, tensor: Tensor, quant: str) -> int:
    """Bytes of memory a tensor will take (padding of heads aside)."""
    if need.role != "matrix":
        return 4 * math.prod(need.shape)
    layout = FORMATS[_format(need, tensor, quant)[0]]
    n, k = need.shape[::-1] if need.transposed else need.shape
    if need.columns:
        n = need.columns[1] - need.columns[0]
    return padded(n) // PANEL * padded(k) // PAD * (layout.panel_bytes + layout.scale_bytes)
