"""A forward pass as a table of operations, written by calling it once.

A model file describes its pass with the methods of `Program` as if they computed: each notes one operation
and returns a `Value` that stands for the array it will make. The program then gives every value memory
(reused as soon as nobody needs it), and finds where the threads must meet. The table is run by
kernels/team.py; nothing compiles for a new architecture.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tinydrug.formats.config import Config
from tinydrug.formats.weights import Weight, Weights, padded
from tinydrug.kernels import activation, drift, embed, noise, norm, rope
from tinydrug.kernels.attention import ATTEND
from tinydrug.kernels.jit import Kernel
from tinydrug.kernels.pack import FORMATS
from tinydrug.kernels.quantise import QUANTISE, ROW_BYTES
from tinydrug.kernels.tables import OP
from tinydrug.models.rope import RopeTable
from tinydrug.noise import SITES

CELL_BYTES = {"f16": 2, "f32": 4}
ACTIVATIONS = {  # Hugging Face's hidden_act -> kernel: of gate and up, or of one array
    "silu": activation.silu_mul,
    "gelu_new": activation.gelu_tanh,
    "gelu_pytorch_tanh": activation.gelu_tanh,
    "gelu": activation.gelu_erf,
}

# How an operation is split among threads. Two operations need no barrier between them if they split alike.
ROWS = "rows"  # by token; with one row every thread does it for itself, in its own memory
TOKENS = "tokens"  # by token, always in shared memory
HEADS = "heads"  # by (token, kv head)
SHARED = "shared"  # in a way of its own: a barrier before whatever touches the same memory


@dataclass(frozen=True)
class Value:
    """An array with one row a token: where it will lie, and what is known of its rows."""

    slot: int  # memory; operations in place give a new value in the same slot
    nbytes: int  # of a row
    width: int  # floats in a row, padded
    private: bool = False  # with one row, every thread has its own copy
    on_outputs: bool = False  # rows are the tokens whose logits are asked for


@dataclass(frozen=True)
class Cached:
    """The cached keys or values of a layer; `site`: noise drawn in them at every read."""

    site: str | None = None


@dataclass(frozen=True)
class Step:
    """One operation, before it has addresses."""

    kernel: Kernel
    split: str
    reads: tuple  # slots, and whether privately
    writes: tuple
    operands: dict  # field of OP -> Value
    fields: dict  # field of OP -> number
    weight: Weight | None = None


CACHE = -1  # the slot that stands for the key-value cache


class Program:
    """The operations of one model, and the memory they need. `outputs` is the value that holds the logits."""

    def __init__(self, config: Config, weights: Weights, cell: str):
        self.config, self.weights, self.cell = config, weights, cell
        self.steps: list[Step] = []
        self.row_bytes: list[int] = []  # of each slot
        self.hidden: list[Value] | None = None  # a list: hidden states are kept in these, layer by layer
        self._quantised: dict[tuple[Value, tuple], Value] = {}  # by how: a key of QUANTISE
        self._half = padded(config.head_dim) // 2  # floats of half a head, padded
        self.tables: list[np.ndarray] = []  # constant tables that values may stand for
        self._rotary: list[RopeTable] = []  # those that are computed as positions are reached

    # --- the vocabulary of a model file ---------------------------------------------------------------------
    def embed(self, name: str) -> Value:
        """Token embeddings -> (T, D)."""
        weight = self.weights[name]
        x = self._value(weight.k)
        self._note(embed.embed, TOKENS, y=x, weight=weight, width=self.config.hidden_size)
        return x

    def add_position(self, x: Value, name: str) -> Value:
        """x (T, D) + the position's row of a table."""
        self._note(embed.add_position, TOKENS, x=x, y=x, weight=self.weights[name])
        return x

    def rms_norm(self, x: Value, name: str) -> Value:
        """x (T, D) -> (T, D)."""
        return self._norm(norm.rms_norm, x, name)

    def layer_norm(self, x: Value, name: str) -> Value:
        """x (T, D) -> (T, D)."""
        return self._norm(norm.layer_norm, x, name)

    def linear(self, x: Value, name: str, onto: Value | None = None) -> Value:
        """x (T, K) -> (T, N), added to `onto` if given."""
        weight = self.weights[name]
        format_ = FORMATS[weight.format]
        if format_.group:
            x = self._quantise(x, (format_.group, format_.spread))
        y = onto or self._value(weight.n, x.on_outputs)
        self._note(format_.linear, SHARED, x=x, y=y, weight=weight, onto=int(onto is not None))
        return y

    def rope(self, x: Value, table: Value) -> Value:
        """x (T, heads, d) turned by position."""
        self._note(rope.rope, HEADS, x=x, y=x, z=table, **self._heads(x))
        return x

    def cache(self, layer: int, keys: Value, values: Value) -> tuple[Cached, Cached]:
        """Write keys and values (T, G, d) into the slots of their positions; from now on they are read from
        there."""
        self._note(
            rope.write_cache,
            HEADS,
            also_writes=CACHE,
            x=keys,
            z=values,
            layer=layer,
            cell=CELL_BYTES[self.cell],
            **self._heads(keys),
        )
        return Cached(), Cached()

    def attend(self, layer: int, q: Value, keys: Cached, values: Cached, window: int | None) -> Value:
        """q (T, H, d) over what each token may see of the cache -> (T, H, d)."""
        y = self._value(q.width)
        self._note(
            ATTEND[self.cell],
            SHARED,
            also_reads=CACHE,
            x=q,
            y=y,
            layer=layer,
            site=SITES[keys.site].code,
            value_site=SITES[values.site].code,
            window=window or 1 << 30,
            scale=self.config.head_dim**-0.5,
            cell=CELL_BYTES[self.cell],
            **self._heads(q),
        )
        return y

    def noise(self, site: str, layer: int, x):
        """Where noise enters: x as it is, or turned, as the schedule of each token's sequence says."""
        if isinstance(x, Cached):
            return replace(x, site=site)
        where = {"layer": layer, "site": SITES[site].code}
        whole = {"H": self.config.hidden_size, "M": self.config.intermediate_size}
        if site in whole:  # the row is one vector
            row = {"heads": 1, "head_dim": x.width, "period": x.width, "valid": whole[site]}
            return self._note_rows(noise.noise_rows, x, **row, **where)
        if site == "A":
            return self._note_rows(noise.noise_rows, x, **self._heads(x), **where)
        self._note(noise.noise_heads, HEADS, x=x, y=x, **self._heads(x), **where)
        return x

    def drift(self, layer: int, x: Value) -> Value:
        """A place where drift and diffusion enter, after noise at A: x (T, H, d) as it is, or as the schedule
        of each token's sequence says. A weight "LAYER.drift" says what drift the model adds after it."""
        name = f"{layer}.drift"
        rows = self.constant(self.weights.floats(name)) if name in self.weights else self._driftless
        return self._note_rows(drift.drift, x, z=rows, layer=layer, **self._heads(x))

    def gated(self, gate: Value, up: Value) -> Value:
        """act(gate) * up, (T, F)."""
        kernel = ACTIVATIONS[self.config.activation]
        y = replace(gate, private=True)
        self._note(kernel, ROWS, x=gate, z=up, y=y, width=gate.width)
        return y

    def activate(self, x: Value) -> Value:
        """act(x), (T, F)."""
        return self._note_rows(ACTIVATIONS[self.config.activation], x, width=x.width)

    def asked(self, x: Value) -> Value:
        """x (T, D) -> (outputs, D): only the tokens whose logits are asked for."""
        y = self._value(x.width, on_outputs=True)
        self._note(embed.asked, SHARED, x=x, y=y)
        return y

    def probe(self, x: Value) -> None:
        """x (T, D) as it leaves a layer: kept, of tokens whose logits are asked for, if that is wanted."""
        if self.hidden is not None:
            self.hidden.append(self.asked(x))

    def constant(self, table: np.ndarray) -> Value:
        """A float table of one row a position, which operations may read."""
        self.tables.append(table)
        return Value(-1 - len(self.tables), table.strides[0], table.shape[-1])

    def rotary(self, n_positions: int) -> Value:
        """The table of cosines and sines that `rope` turns by."""
        self._rotary.append(RopeTable(self.config, n_positions, self._half))
        return self.constant(self._rotary[-1].rows)

    def reach(self, end: int) -> None:
        """Called by the runtime: positions before this one are about to be used."""
        for table in self._rotary:
            table.reach(end)

    @cached_property
    def _driftless(self) -> Value:
        """Centre 0, spread 1 and std 0 of every component of H heads, (3, H d): no drift in the model."""
        rows = np.zeros((3, self.config.n_heads, 2, self._half), np.float32)
        rows[1, :, :, : self.config.head_dim // 2] = 1
        return self.constant(rows.reshape(3, -1))

    # --- notation -------------------------------------------------------------------------------------------
    def _heads(self, x: Value) -> dict:
        d = 2 * self._half
        G = self.config.n_kv_heads
        return {
            "heads": x.width // d,
            "kv_heads": G,
            "head_dim": d,
            "period": self._half,
            "valid": self.config.head_dim // 2,
        }

    def _value(self, width: int, on_outputs: bool = False, nbytes: int | None = None) -> Value:
        self.row_bytes.append(padded(nbytes or 4 * width, 64))
        return Value(len(self.row_bytes) - 1, self.row_bytes[-1], width, on_outputs=on_outputs)

    def _norm(self, kernel, x, name):
        y = replace(self._value(x.width, x.on_outputs), private=True)
        self._note(
            kernel,
            ROWS,
            x=x,
            y=y,
            weight=self.weights[name],
            width=self.config.hidden_size,
            eps=self.config.norm_eps,
        )
        return y

    def _quantise(self, x: Value, how: tuple[int, bool]) -> Value:
        if (x, how) not in self._quantised:
            q = self._value(x.width, x.on_outputs, int(x.width * ROW_BYTES))
            self._quantised[x, how] = replace(q, private=True)
            self._note(QUANTISE[how], ROWS, x=x, y=self._quantised[x, how], width=x.width)
        return self._quantised[x, how]

    def _note_rows(self, kernel, x: Value, **fields) -> Value:
        y = replace(x, private=True)
        self._note(kernel, ROWS, x=x, y=y, **fields)
        return y

    def _note(self, kernel, split, also_reads=None, also_writes=None, weight=None, **fields):
        operands = {name: value for name, value in fields.items() if isinstance(value, Value)}
        numbers = {name: value for name, value in fields.items() if not isinstance(value, Value)}
        reads = [(v.slot, v.private) for name, v in operands.items() if name != "y" and v.slot >= 0]
        writes = [(v.slot, v.private) for name, v in operands.items() if name == "y"]
        if also_reads is not None:
            reads.append((also_reads, False))
        if also_writes is not None:
            writes.append((also_writes, False))
        if "y" in operands:
            numbers["on_outputs"] = int(operands["y"].on_outputs)
            written = operands["y"].slot  # whatever was quantised from this memory is stale now
            self._quantised = {key: q for key, q in self._quantised.items() if key[0].slot != written}
        self.steps.append(Step(kernel, split, tuple(reads), tuple(writes), operands, numbers, weight))

    # --- memory and barriers --------------------------------------------------------------------------------
    def place(self) -> list[int]:
        """The memory area of each slot: slots of one size that are never alive together share one."""
        last = {slot: i for i, step in enumerate(self.steps) for slot, _ in step.reads + step.writes}
        last |= {value.slot: len(self.steps) for value in self.hidden or ()}  # read when all is done
        free, place, n_areas = {}, {}, 0
        for i, step in enumerate(self.steps):
            slots = dict.fromkeys(slot for slot, _ in step.writes + step.reads if slot >= 0)
            for slot in slots:
                if slot not in place:
                    spare = free.setdefault(self.row_bytes[slot], [])
                    if not spare:
                        spare.append(n_areas)
                        n_areas += 1
                    place[slot] = spare.pop()
            for slot in slots:
                if last[slot] == i:
                    free[self.row_bytes[slot]].append(place[slot])
        return [place[slot] for slot in range(len(self.row_bytes))]

    def barriers(self, place: list[int], alone: bool) -> list[bool]:
        """Before which steps all threads must meet: where memory is touched that another thread may still
        use.

        alone: for calls with one row, when steps split by rows work in each thread's own memory."""
        pending: list[tuple[int, bool, str]] = []  # (area, written, split) since the last barrier
        flags = []
        for step in self.steps:
            split = TOKENS if step.split == ROWS and not alone else step.split

            def touched(slots, written, split=split):
                return [
                    (place[slot] if slot >= 0 else slot, written, split)
                    for slot, private in slots
                    if not (alone and private)
                ]

            now = touched(step.reads, False) + touched(step.writes, True)
            meet = any(
                area == other
                and (written or other_written)
                and not (split == other_split and split in (TOKENS, HEADS))
                for area, written, split in now
                for other, other_written, other_split in pending
            )
            if meet:
                pending = []
            pending += now
            flags.append(meet)
        return flags

    @cached_property
    def cached(self) -> int:
        """How many steps it takes until all that is kept of a token is in the cache."""
        return 1 + max(i for i, step in enumerate(self.steps) if (CACHE, False) in step.writes)

    def kernels(self) -> list[Kernel]:
        """Every kernel the program calls, once."""
        return list(dict.fromkeys(step.kernel for step in self.steps))

    def table(self, operand_address, weight_table: np.ndarray) -> np.ndarray:
        """The program as rows of OP. operand_address(value) -> address of its OPERAND row."""
        ops = OP.rows(len(self.steps))
        place = self.place()
        alone, many = self.barriers(place, True), self.barriers(place, False)
        row_bytes = weight_table.dtype.itemsize
        for op, step, meet_alone, meet_many in zip(ops, self.steps, alone, many, strict=True):
            op["kernel"] = step.kernel.address
            op["barrier_alone"], op["barrier_many"] = meet_alone, meet_many
            for name, value in step.operands.items():
                op[name] = operand_address(value)
            for name, number in step.fields.items():
                op[name] = number
            if step.weight is not None:
                op["weight"] = weight_table.ctypes.data + step.weight.row * row_bytes
        return ops
