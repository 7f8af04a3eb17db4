"""From the tensors of a checkpoint to the rows of the weight table: what a model needs, checked, then packed
in panels."""

import hashlib
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tinydrug.errors import BadModelFile, ConfigError
from tinydrug.formats.packed import Layout, Packed
from tinydrug.formats.tensor import Tensor
from tinydrug.kernels.checksum import digest
from tinydrug.kernels.memory import LINE, aligned, arena, nbytes
from tinydrug.kernels.pack import FORMATS, PACKERS, SOURCE, scratch_bytes
from tinydrug.kernels.tables import PAD, PANEL, WEIGHT

QUANTS = {  # --quant: formats of (matrices, embedding and head); None: as the file has it
    "none": (None, None),
    "f32": ("f32", "f32"),
    "q8": ("q8_256", "q8_256"),
    "q4": ("q4_128", "q8_256"),  # on a small model a 4-bit head costs more quality than all it saves
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

    name: str  # a tied head has the embedding's
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
    """The weight table of one model, and the memory its rows point into: areas named WEIGHT.data, .scales and
    .bias, packed here or mapped from a file that holds them packed."""

    def __init__(self, needs: Mapping[str, Need], tensors: Mapping[str, Tensor], quant: str, threads: int,
                 progress: Callable[[float], None] | None = None, packed: Packed | None = None):  # fmt: skip
        """With `packed`, only the shapes of the tensors count, and quant is that of the file.

        BadModelFile if the file is damaged, or holds the weights of another config."""
        if quant not in QUANTS:
            raise ConfigError(f"--quant: {quant!r} is not one of {', '.join(QUANTS)}", "quant")
        self.table = WEIGHT.rows(len(needs))
        self.quant = packed.quant if packed else quant
        self._threads = threads
        self._packed = packed
        self._by_name: dict[str, Weight] = {}
        owners: dict[Need, Weight] = {}  # a tied head is the embedding
        for row, (name, need) in enumerate(needs.items()):
            if need not in owners:
                owners[need] = _weight(name, row, need, tensors, quant, packed)
            self._by_name[name] = owners[need]
        layout: Layout = {}
        for need, weight in owners.items():
            layout |= _areas(need, weight)
        if packed:
            self.areas = packed.areas(layout, progress)
        else:
            self.areas = arena(layout)
            self._pack(owners, tensors, progress)
        for need, weight in owners.items():
            self._enter(need, weight)

    def __getitem__(self, name: str) -> Weight:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def nbytes(self) -> int:
        """Bytes of memory all weights take."""
        return sum(area.nbytes for area in self.areas.values())

    @property
    def formats(self) -> dict[str, str]:
        """Weight -> format, of those that are a row of the table."""
        return {weight.name: weight.format for weight in self._by_name.values()}

    def floats(self, name: str) -> np.ndarray:
        """The rows of a table, (n, k) float32, padded."""
        return self.areas[f"{self[name].name}.data"]

    def nbytes_of(self, row: int) -> int:
        """Bytes of one weight's panels and scales."""
        name = next(weight.name for weight in self._by_name.values() if weight.row == row)
        parts = (self.areas.get(f"{name}.{part}") for part in ("data", "scales"))
        return sum(area.nbytes for area in parts if area is not None)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Area -> its checksum; reads all weights once, unless that has been done."""
        if self._packed:
            return {area: self._packed.digests[area] for area in self.areas}
        with ThreadPoolExecutor(self._threads) as pool:
            return dict(zip(self.areas, pool.map(digest, self.areas.values()), strict=True))

    def fingerprint(self) -> str:
        """A hash of all weights as they lie in memory, in hexadecimal digits, packed here or mapped."""
        layout = [
            (name, weight.row, weight.format, weight.n, weight.k) for name, weight in self._by_name.items()
        ]
        return hashlib.sha256(repr((layout, list(self.digests.items()))).encode()).hexdigest()

    def _enter(self, need: Need, weight: Weight) -> None:
        """Fill the weight's row of the table."""
        entry = self.table[weight.row]
        entry["n"], entry["k"] = weight.n, weight.k
        for part in ("data", "scales", "bias"):
            if (area := f"{weight.name}.{part}") in self.areas:
                entry[part] = self.areas[area].ctypes.data
        if need.role == "matrix" and need.fine:
            entry["gather"] = FORMATS[weight.format].gather.address

    def _pack(self, owners, tensors, progress):
        total, done = sum(tensors[need.source].data.nbytes for need in owners) or 1, 0
        with ThreadPoolExecutor(self._threads) as pool:
            for need, weight in owners.items():
                tensor, bias = _read(need, tensors)
                if need.role == "matrix":
                    self._matrix(pool, need, weight, tensor)
                else:
                    self._table(need, weight, tensor.float32())
                if bias is not None:
                    if need.role == "matrix":
                        bias = np.append(bias, 0)[_row_map(need, len(bias))]  # index -1: padding
                    self.areas[f"{weight.name}.bias"][: len(bias)] = bias
                tensors[need.source].release()
                done += tensors[need.source].data.nbytes
                if progress:
                    progress(done / total)

    def _table(self, need, weight, values):
        values = np.atleast_2d(values)
        if need.out_head:
            values = np.pad(values, ((0, 0), (0, 1)))[:, _row_map(need, values.shape[1])]
        self.areas[f"{weight.name}.data"][:, : values.shape[1]] = values

    def _matrix(self, pool, need, weight, tensor):
        columns = tensor.shape[0] if need.transposed else tensor.shape[1]
        group, padded_group = _groups(need, columns)
        format_, k = weight.format, weight.k
        kind, data = tensor.kind, tensor.data
        if _format(need, tensor, self.quant)[1]:
            kind, data = "f32", np.ascontiguousarray(tensor.float32()).reshape(-1).view(np.uint8)
        elif data.ctypes.data % max(1, _ELEMENT.get(kind, 1)):
            data = data.copy()  # a safetensors file may put its data at any byte
        available = tensor.shape[1] if need.transposed else tensor.shape[0]
        rows = _row_map(need, available)
        rows = np.pad(rows, (0, weight.n - len(rows)), constant_values=-1).astype(np.int32)
        panels = weight.n // PANEL
        source = SOURCE.rows()
        row_bytes = data.nbytes // tensor.shape[0]
        element = _ELEMENT.get(kind, 0)
        source["data"] = data.ctypes.data
        source["row_stride"] = element if need.transposed else row_bytes
        source["column_stride"] = row_bytes if need.transposed else element
        source["rows"], source["k"], source["padded_k"] = rows.ctypes.data, columns, k
        source["group"], source["padded_group"] = group, padded_group if need.in_head else group
        for part in ("data", "scales"):
            if (area := f"{weight.name}.{part}") in self.areas:
                source[f"{part}_out"] = self.areas[area].ctypes.data
        pack = PACKERS[kind, format_]
        pack.address  # noqa: B018 - compile here, once, not in every thread of the pool

        def work(lo, hi):
            scratch = aligned(scratch_bytes(k), np.uint8)
            pack(source.ctypes.data, lo, hi, scratch.ctypes.data)

        step = max(1, math.ceil(panels / self._threads))
        list(pool.map(work, range(0, panels, step), [min(p + step, panels) for p in range(0, panels, step)]))


def _weight(name: str, row: int, need: Need, tensors, quant: str, packed: Packed | None) -> Weight:
    """What a need becomes: the format that is asked for, or that the file has."""
    if packed:
        format_ = packed.format(name, 0 if need.role == "matrix" else 4 * math.prod(need.shape))
    else:
        format_ = _format(need, tensors[need.source], quant)[0] if need.role == "matrix" else "f32"
    return Weight(name, row, format_, *_extent(need, tensors))


def _extent(need: Need, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Padded rows and columns of what a need becomes: of a matrix whole panels, and a whole number of blocks
    for whoever reads the result."""
    if need.role == "matrix":
        n, k = need.shape[::-1] if need.transposed else need.shape
        group, padded_group = _groups(need, k)
        return padded(_count(need, n)), k // group * padded_group
    shape = _read(need, tensors)[0].shape if need.change else need.shape
    return math.prod(shape[:-1]), padded(_count(need, shape[-1]))


def _groups(need: Need, columns: int) -> tuple[int, int]:
    """Columns that stay together, and the room they get."""
    if need.in_head:
        return need.in_head // 2, padded(need.in_head) // 2
    return columns, padded(columns)


def _count(need: Need, available: int) -> int:
    """The length of `_row_map`."""
    rows = len(range(available)[slice(*need.columns)]) if need.columns else available
    return rows // need.out_head * padded(need.out_head) if need.out_head else rows


def _areas(need: Need, weight: Weight) -> Layout:
    """The areas a weight lies in."""
    areas = {"data": (np.float32, (weight.n, weight.k))}
    if need.role == "matrix":
        layout, blocks = FORMATS[weight.format], (weight.n // PANEL, weight.k // PAD)
        areas = {"data": (np.uint8, (*blocks, layout.panel_bytes))}
        if layout.group:
            groups = weight.n // PANEL * -(-weight.k // layout.group)
            areas["scales"] = (np.uint8, (padded(groups * layout.scale_bytes, LINE),))
    if need.bias:
        areas["bias"] = (np.float32, (weight.n if need.role == "matrix" else weight.k,))
    return {f"{weight.name}.{part}": what for part, what in areas.items()}


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
    it stays exact: f32. Integers of as many bits as are asked for stay what they are."""
    wanted, kind = QUANTS[quant][need.fine], "f32" if need.change else tensor.kind
    torn = kind not in _ELEMENT and need.in_head is not None and need.in_head % PAD != 0
    if wanted and kind in FORMATS and FORMATS[kind].panel_bytes == FORMATS[wanted].panel_bytes and not torn:
        wanted = kind
    format_ = wanted or (kind if kind in FORMATS else "f32")
    if (kind, format_) in PACKERS and not torn:
        return format_, False
    return wanted or "f32", True


def packed_bytes(needs: Mapping[str, Need], tensors: Mapping[str, Tensor], quant: str) -> int:
    """Bytes of memory the weights will take."""
    total = 0
    for need in dict.fromkeys(needs.values()):
        weight = _weight("", 0, need, tensors, quant, None)
        total += sum(nbytes(*what) for what in _areas(need, weight).values())
    return total
