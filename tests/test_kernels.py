"""Every kernel on its own against float64: one operation is run through the tables the engine runs it by."""

import ctypes
import json
import math
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import gguf
import naive
import numba
import numpy as np
import pytest
from numba import types

from bench import kernels as measured
from bench.shapes import SHAPES as MODELS
from tinydrug.engine.cache import RingCache
from tinydrug.engine.doses import dose_table
from tinydrug.formats.config import Config
from tinydrug.formats.tensor import KINDS, Tensor
from tinydrug.formats.weights import Need, Weights, padded
from tinydrug.kernels import activation, embed, jit, linear_tiles, lookups, maths, norm, quantise, rope
from tinydrug.kernels.attention import ATTEND, CHUNK, partial_bytes
from tinydrug.kernels.blocks import BLOCKS as BLOCK_FORMATS
from tinydrug.kernels.isa import KNOWN
from tinydrug.kernels.kinds import int64, void
from tinydrug.kernels.memory import Loans, aligned
from tinydrug.kernels.pack import FORMATS, PACKERS, SOURCE, scratch_bytes
from tinydrug.kernels.tables import CALL, OP, OPERAND, SPAN, TOKEN, WEIGHT
from tinydrug.kernels.team import PARKED, barrier
from tinydrug.kernels.vectors import load, load_bytes, store, store_bytes
from tinydrug.noise import SOBER

F32 = 2e-6  # a few roundings to float32, relative to the largest summand of each sum
ATTENTION = 4e-6  # a softmax over up to 700 scores and its mean of values around 1: measured 2.1e-6
FUNCTIONS = 6e-7  # absolute, of functions within [-1, 1]: measured 3.9e-7 (erf) and 4.7e-7 (cosine)
TILE = 16  # rows past the last token that a tile may touch
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 20, 21, 32, 61)
SHAPES = [(16, 32), (5, 40), (48, 100), (33, 172), (40, 1050)]  # rows, columns of a weight
RNG = np.random.default_rng


# --- one operation


class Array:
    """Rows of float32 as an operand: room for a tile past the last row, and a row for each thread."""

    def __init__(self, values: np.ndarray, threads: int, nbytes: int | None = None, private: bool = True):
        rows = values.reshape(len(values), math.prod(values.shape[1:])).astype(np.float32)
        stride = padded(nbytes or 4 * rows.shape[1], 64)
        self.memory = aligned((len(rows) + TILE + threads, stride), np.uint8)
        self.shared = self.memory[: len(rows)].view(np.float32)
        self.shared[:, : rows.shape[1]] = rows
        self.own = self.memory[-threads:].view(np.float32)
        self.own[:, : rows.shape[1]] = rows[:1] if len(rows) else 0
        self.operand = OPERAND.rows()
        self.operand["data"], self.operand["stride"] = self.memory.ctypes.data, stride
        if private:
            self.operand["private"] = self.own.ctypes.data

    def rows(self, private: bool) -> np.ndarray:
        """What was written, (T, columns); of a private result the threads' copies, which must agree."""
        if not private:
            return self.shared
        np.testing.assert_array_equal(self.own, np.broadcast_to(self.own[:1], self.own.shape))
        return self.own[:1]


class Step:
    """T tokens at these positions, in one span, and an operation in it, run by n threads one by one."""

    def __init__(self, T: int, threads: int = 1, positions=None, outputs=None):
        self.threads, self.keep = threads, []
        self.tokens, self.call, self.op = TOKEN.rows(max(T, 1)), CALL.rows(), OP.rows()
        self.tokens["position"][:T] = np.arange(T) if positions is None else positions
        self.tokens["output"] = -1 if outputs is None else outputs
        self.spans = SPAN.rows()
        self.spans["count"] = T
        self.scratch = aligned((threads, 1 << 21), np.uint8)
        self.sync = aligned(512, np.uint8)
        for name in ("tokens", "spans", "sync", "scratch"):
            self.call[name] = getattr(self, name).ctypes.data
        self.call["scratch_stride"] = self.scratch.strides[0]
        self.call["n_tokens"], self.call["n_spans"] = T, 1
        self.call["n_outputs"] = T if outputs is None else np.count_nonzero(np.asarray(outputs) >= 0)

    def run(self, kernel, weight=None, **fields) -> None:
        for name, value in fields.items():
            self.op[name] = value.operand.ctypes.data if isinstance(value, Array) else value
        if weight is not None:
            weights, name = weight
            self.op["weight"] = weights.table.ctypes.data + weights[name].row * weights.table.dtype.itemsize
        self.keep.append((weight, fields))
        for thread in range(self.threads):
            kernel(self.call.ctypes.data, self.op.ctypes.data, thread, self.threads)


FLOATS, BLOCKS = ("f32", "f16", "bf16"), tuple(BLOCK_FORMATS)
OURS = {"q8_256": "q8", "q4_128": "q4"}  # formats that no file has: the --quant that makes them
FILES = tuple(kind for kind in BLOCKS if kind not in OURS)
SCALES = {"iq4_nl": (0,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}  # where a block has its f16 numbers


def random_blocks(kind: str, values: np.ndarray) -> np.ndarray:
    """Random blocks for values (n, k) of about their size: nothing but llama.cpp quantises to these kinds."""
    elements, size = KINDS[kind]
    rng = RNG(zlib.crc32(values.tobytes()))
    blocks = rng.integers(0, 256, (values.size // elements, size), np.uint8)
    for at in SCALES[kind]:
        scales = rng.uniform(1e-4, 1e-3, len(blocks)).astype("<f2")
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    return blocks


def tensor(name: str, values: np.ndarray, kind: str = "f32") -> Tensor:
    """values (n, k) as a file would hold them in this kind."""
    if kind == "f32":
        data = values.astype("<f4")
    elif kind == "f16":
        data = values.astype("<f2")
    elif kind in SCALES:
        data = random_blocks(kind, values)
    else:
        data = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType[kind.upper()])
    data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return Tensor(name, values.shape, kind, data, "test")


def weights(values: np.ndarray, kind: str = "f32", bias=None, **need) -> tuple[Weights, str]:
    """A loaded matrix, in the format of the file; one that no file has is made of floats."""
    quant = OURS.get(kind, "none")
    tensors = {"w": tensor("w", values, "f32" if kind in OURS else kind)}
    if bias is not None:
        tensors["b"], need["bias"] = tensor("b", bias), "b"
    return Weights({"w": Need("w", values.shape, fine=kind != "q4_128", **need)}, tensors, quant, 1), "w"


def loaded_from(whole: Tensor) -> tuple[Weights, str]:
    """A loaded matrix, in the format of its file."""
    return Weights({"w": Need("w", whole.shape)}, {"w": whole}, "none", 1), "w"


def values_of(kind: str, values: np.ndarray) -> np.ndarray:
    """What the file then holds, float64; or, padded columns too, what the format holds that no file has."""
    if kind in OURS:
        return unpacked(*weights(values, kind))[: len(values)]
    return tensor("w", values, kind).float32().astype(np.float64)


def unpacked(loaded: Weights, name: str) -> np.ndarray:
    """The values of a matrix in one of our own formats, (padded rows, padded columns) float64, from its
    bytes."""
    data, scales = (loaded.areas[f"{name}.{part}"] for part in ("data", "scales"))
    (panels, blocks, _), layout = data.shape, FORMATS[loaded[name].format]
    many, fine = layout.group // 32, loaded[name].format == "q8_256"
    n_groups = -(-blocks // many)
    groups = scales[: panels * n_groups * layout.scale_bytes].reshape(panels, n_groups, -1)
    factors = np.repeat(groups[..., :32].copy().view("<f2"), many, 1)[:, :blocks].transpose(0, 2, 1)
    if fine:
        quads = data.reshape(panels, blocks, 8, 16, 4)
        integers = quads.transpose(0, 3, 1, 2, 4).reshape(panels, 16, blocks, 32) - 128.0
    else:
        quads = data.reshape(
            panels, blocks, 4, 16, 4
        )  # columns 0 .. 15 in low nibbles, 16 .. 31 in high ones
        numbers = np.stack([quads & 15, quads >> 4], 2).transpose(0, 4, 1, 2, 3, 5)  # panel, row, block, half
        numbers = numbers.reshape(panels, 16, blocks, 4, 8)
        keys = groups[..., 32:].reshape(panels, -1, 16)[:, :blocks].transpose(0, 2, 1)  # panel, row, block
        tables = keys[..., None] >> np.array([4, 6, 0, 2]) & 3
        integers = naive.TABLES[tables[..., None], numbers].reshape(panels, 16, blocks, 32)
    values = (integers * factors.astype(np.float64)[..., None]).reshape(panels * 16, blocks * 32)
    return naive.hadamard(values) if fine else values


def gathered(weight, rows: int) -> np.ndarray:
    """The first rows of a packed matrix, read back by its own gather kernel, (rows, padded columns)."""
    loaded, name = weight
    out = aligned((rows, loaded[name].k), np.float32)
    gather = FORMATS[loaded[name].format].gather
    for i in range(rows):
        gather(loaded.table.ctypes.data, i, out[i].ctypes.data)
    return out


# --- linear maps


def linear(weight, x: np.ndarray, y: np.ndarray, onto: bool, threads: int = 1, **step) -> np.ndarray:
    """x (T, k) -> (T, n); quantised first where the format wants it."""
    loaded, name = weight
    T, k, layout = len(x), loaded[name].k, FORMATS[loaded[name].format]
    call = Step(T, threads)
    rows = Array(np.pad(x, ((0, 0), (0, k - x.shape[1]))), threads)
    if layout.group:
        q = Array(np.zeros((T, 1)), threads, nbytes=int(k * quantise.ROW_BYTES))
        call.run(quantise.QUANTISE[layout.group, layout.spread], x=rows, y=q, width=k)
        rows = q
    out = Array(np.pad(y, ((0, 0), (0, loaded[name].n - y.shape[1]))), threads)
    call.run(layout.linear, weight=weight, x=rows, y=out, onto=int(onto))
    return out.shared[:, : y.shape[1]].copy()


def activations(x: np.ndarray, kind: str) -> np.ndarray:
    """x (T, k) as integer kernels see it, float64; in our own formats padding is rounded too."""
    if kind in FLOATS:
        return x.astype(np.float64)
    padding = padded(x.shape[1]) - x.shape[1] if kind in OURS else 0
    return naive.activations(np.pad(x, ((0, 0), (0, padding))), FORMATS[kind].group, FORMATS[kind].spread)


def columns(kind: str, k: int) -> int:
    """Files hold whole blocks."""
    return k if kind in OURS else padded(k, KINDS[kind][0])


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("kind", [*FLOATS, *BLOCKS])
def test_linear(kind, n, k):
    rng, k = RNG(n + k), columns(kind, k)
    w, b, before = rng.normal(size=(n, k)), rng.normal(size=n), rng.normal(size=(61, n)).astype(np.float32)
    x = rng.normal(size=(61, k)).astype(np.float32)
    for bias, onto in ((None, False), (b, False), (None, True), (b, True)):
        weight = weights(w, kind, bias)
        expected = activations(x, kind) @ values_of(kind, w).T
        expected += 0 if bias is None else bias.astype(np.float32)
        expected += before if onto else 0
        whole = linear(weight, x, before, onto)
        largest = np.abs(activations(x, kind)).max() * np.abs(w).max() * np.sqrt(k)
        np.testing.assert_allclose(whole, expected, rtol=0, atol=F32 * largest)
        for T in TOKENS:  # whatever the tile, and whoever computes it: the same bits
            for threads in (1, 3):
                np.testing.assert_array_equal(linear(weight, x[:T], before[:T], onto, threads), whole[:T])


@pytest.mark.parametrize("matrix", measured.MATRICES)
@pytest.mark.parametrize("kind", measured.KINDS)
def test_linear_as_it_is_measured(kind, matrix):
    """The cases of bench.kernels, in the shape of SmolLM2."""
    n, k = MODELS["smollm2-135m"].matrices()[matrix]
    rng, k = RNG(n + k), columns(kind, k)
    w, x = rng.normal(size=(n, k)), rng.normal(size=(max(measured.TOKENS), k)).astype(np.float32)
    weight, y = weights(w, kind), np.zeros((len(x), n), np.float32)
    whole = linear(weight, x, y, False)
    largest = np.abs(activations(x, kind)).max() * np.abs(w).max() * np.sqrt(k)
    expected = activations(x, kind) @ values_of(kind, w).T
    np.testing.assert_allclose(whole, expected, rtol=0, atol=F32 * largest)
    for T in measured.TOKENS:
        np.testing.assert_array_equal(linear(weight, x[:T], y[:T], False), whole[:T])


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_row_alone(kind, bad):
    """int8 has no NaN: it must survive in the block's scale."""
    rng, k = RNG(0), columns(kind, 96)
    weight = weights(rng.normal(size=(20, k)), kind)
    x, y = rng.normal(size=(17, k)), np.zeros((17, 20))
    good = linear(weight, x, y, False)
    x[2, 40] = bad
    found = linear(weight, x, y, False)
    assert not np.isfinite(found[2]).any()
    np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(good, 2, 0))
    np.testing.assert_array_equal(linear(weight, x[2:3], y[:1], False), found[2:3], "alone as in a tile")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_not_finite_spoils_its_own_column_alone(kind, bad):
    """Kernels that round alike must also fail alike."""
    rng, k, T = RNG(0), columns(kind, 96), 145  # more than are multiplied together: see tiles.py, by_sums
    values, x, y = rng.normal(size=(20, k)), rng.normal(size=(T, k)), np.zeros((T, 20))
    good = linear(loaded_from(tensor("w", values, kind)), x, y, False)
    for at in {"q4_1": (0, 2), "q5_1": (0, 2)}.get(kind, SCALES.get(kind, (0,))):  # minima, too
        whole = tensor("w", values, kind)
        whole.data.reshape(20, -1)[3, at : at + 2] = np.array([bad], "<f2").view(np.uint8)
        weight = loaded_from(whole)
        found = linear(weight, x, y, False)
        assert np.isnan(found[:, 3]).all()
        np.testing.assert_array_equal(np.delete(found, 3, 1), np.delete(good, 3, 1))
        np.testing.assert_array_equal(linear(weight, x[2:3], y[:1], False), found[2:3], "alone as in a tile")


@pytest.mark.parametrize("kind", ["q8_256", "q4_128", "q4_k", "q6_k"])
def test_more_panels_than_are_unpacked_together(kind):
    rng, k = RNG(1), columns(kind, 1050)
    weight, x = weights(rng.normal(size=(1200, k)), kind, rng.normal(size=1200)), rng.normal(size=(49, k))
    before = rng.normal(size=(49, 1200)).astype(np.float32)
    assert linear_tiles.UNPACKED < k * 1200
    together = linear(weight, x, before, True)
    for t in (0, 15, 16, 31, 32, 47, 48):
        np.testing.assert_array_equal(linear(weight, x[t : t + 1], before[t : t + 1], True)[0], together[t])


def test_linear_of_no_rows_writes_nothing():
    rng = RNG(0)
    call = Step(0)
    weight = weights(rng.normal(size=(20, 32)))
    out = Array(np.ones((3, 32)), 1)
    call.run(FORMATS["f32"].linear, weight=weight, x=Array(np.ones((3, 32)), 1), y=out)
    np.testing.assert_array_equal(out.shared, 1)


# --- quantising activations


@pytest.mark.parametrize(("group", "spread"), quantise.QUANTISE)
def test_quantise(group, spread):
    x = RNG(1).normal(size=(4, 352)).astype(np.float32) * np.float32(5)  # too few for tile registers
    x[1], x[2, 32:64], x[3, :32] = 0, 0, 1e-30
    x[0, :32] = np.linspace(-127, 127, 32)
    k, call = 352, Step(4, threads=2)
    q = Array(np.zeros((4, 1)), 2, nbytes=int(k * quantise.ROW_BYTES))
    call.run(quantise.QUANTISE[group, spread], x=Array(x, 2), y=q, width=k)
    stored, groups = q.memory[:4], -(-k // group)
    codes = stored[:, :k].view(np.int8).astype(np.int64)
    scales = stored[:, k : k + k // 8].view(np.float32)[:, :groups]
    sums = stored[:, k + k // 8 : k + k // 4].view(np.int32)[:, :groups]
    moments = stored[:, k + k // 4 : k + k // 4 + k // 8].view(np.float32)[:, :groups]
    each = np.repeat(scales, group, 1)[:, :k].astype("f8")
    np.testing.assert_array_equal(codes * each, naive.int8(naive.hadamard(x) if spread else x, group))
    assert np.abs(codes).max() == 127
    totals = np.add.reduceat(codes, range(0, k, group), 1)
    np.testing.assert_array_equal(sums, -totals)
    np.testing.assert_array_equal(moments, scales * totals.astype(np.float32))


# --- norms, activations, rope, embeddings


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("D", [32, 40, 48, 172])
def test_norms(D, T):
    rng, k = RNG(D), padded(D)
    x, w, b = rng.normal(size=(T, D)) * 3 + 1, rng.normal(size=D), rng.normal(size=D)
    loaded = Weights(
        {"rms": Need("w", (D,), "vector"), "layer": Need("w", (D,), "vector", bias="b")},
        {"w": tensor("w", w), "b": tensor("b", b)}, "none", 1,
    )  # fmt: skip
    x, w, b = (a.astype(np.float32).astype(np.float64) for a in (x, w, b))
    for kernel, name, expected in (
        (norm.rms_norm, "rms", naive.rms_norm(x, w, 1e-5)),
        (norm.layer_norm, "layer", naive.layer_norm(x, w, b, 1e-5)),
    ):
        for threads in (1, 2):
            rows = np.pad(x, ((0, 0), (0, k - D)))
            y = Array(np.full((T, k), 7.0), threads)
            source = Array(rows, threads, private=False)
            Step(T, threads).run(kernel, weight=(loaded, name), x=source, y=y, width=D, eps=1e-5)
            found = y.rows(private=T == 1)
            np.testing.assert_allclose(found[:, :D], expected, rtol=F32, atol=F32)
            np.testing.assert_array_equal(found[:, D:], 0, "padding must stay zero")


def test_activations_of_the_mlp():
    x = np.concatenate([np.linspace(-12, 12, 90), [0, -0.0, 1e-20, 100, -100, 60]])[None]
    x = np.repeat(x, 3, 0).astype(np.float32)
    up = RNG(0).normal(size=x.shape).astype(np.float32)
    wide = x.astype(np.float64)
    for kernel, fields, expected in (
        (activation.silu_mul, {"z": up}, naive.silu(np.maximum(wide, -700)) * up),
        (activation.gelu_tanh, {}, naive.gelu_tanh(wide)),
        (activation.gelu_erf, {}, naive.gelu(wide)),
    ):
        for T in (1, 3):
            arrays = {name: Array(a[:T], 2) for name, a in fields.items()}
            y = Array(np.zeros_like(x[:T]), 2)
            Step(T, 2).run(kernel, x=Array(x[:T], 2), y=y, width=96, **arrays)
            np.testing.assert_allclose(y.rows(T == 1), expected[:T], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("d", [8, 12, 64, 80])
def test_rope(d):
    H, G, T, half, wide = 6, 2, 5, d // 2, padded(d) // 2
    rng, positions = RNG(d), np.array([0, 1, 63, 500, 4095])
    x, freq = rng.normal(size=(T, H, d)), rng.uniform(0, 1, half)
    table = np.zeros((4096, 2, wide), np.float32)
    angles = np.arange(4096)[:, None] * freq
    table[:, 0, :half], table[:, 1, :half] = 1.5 * np.cos(angles), 1.5 * np.sin(angles)
    heads = np.zeros((T, H, 2, wide))
    heads[..., :half] = x.reshape(T, H, 2, half)
    for threads in (1, 2):
        array, z = Array(heads, threads), OPERAND.rows()
        z["data"], z["stride"] = table.ctypes.data, table.strides[0]
        step = Step(T, threads, positions)
        step.run(rope.rope, x=array, y=array, z=z.ctypes.data, heads=H, kv_heads=G, head_dim=2 * wide)
        found = array.shared.reshape(T, H, 2, wide)
        expected = naive.rope(x, positions, freq, 1.5).reshape(T, H, 2, half)
        np.testing.assert_allclose(found[..., :half], expected, atol=2e-6)
        np.testing.assert_array_equal(found[..., half:], 0)


@pytest.mark.parametrize("kind", [*FLOATS, *FILES, "q8_256"])
def test_embed_and_position_and_asked(kind):
    rng, k = RNG(3), columns(kind, 40)
    wide, table = padded(k), rng.normal(size=(20, k))
    places = np.pad(rng.normal(size=(9, k)), ((0, 0), (0, wide - k)))
    step = Step(4, threads=2, positions=[3, 0, 8, 8], outputs=[-1, 1, -1, 0])
    step.tokens["id"] = [19, 0, 7, 7]
    x = Array(np.ones((4, wide)), 2)
    step.run(embed.embed, weight=weights(table, kind), y=x, width=k)
    rounding = 4 * F32 if kind in OURS else 0
    held = values_of(kind, table)[[19, 0, 7, 7], :k]
    expected = held.astype(np.float32)
    np.testing.assert_allclose(x.shared[:, :k], expected, rtol=1e-7, atol=rounding)
    assert not x.shared[:, k:].any(), "padding must stay zero"
    loaded = Weights({"p": Need("p", (9, wide), "table")}, {"p": tensor("p", places)}, "none", 1)
    step.run(embed.add_position, weight=(loaded, "p"), x=x, y=x)
    expected = x.shared.copy()
    np.testing.assert_allclose(
        expected[:, :k], held + places[[3, 0, 8, 8], :k], rtol=1e-5, atol=max(rounding, 1e-6)
    )
    asked = Array(np.zeros((2, wide)), 2)
    step.run(embed.asked, x=x, y=asked, on_outputs=1)
    np.testing.assert_array_equal(asked.shared, expected[[3, 1]])


# --- attention

POSITIONS = [0, 1, 15, 16, 62, 63, 64, 65, 127, 128, 254, 255, 256, 257, 319, 511, 512, 513, 699]


def config(H: int, G: int, d: int) -> Config:
    return Config("llama", 2, H * d, H, G, d, 32, 32, 1024, 1e-5, "silu", False)


class Attention:
    """A ring cache with keys and values of many positions written into it by the engine's own kernel."""

    def __init__(self, H, G, d, cell, slots=1024, written=700, layer=1, seed=0):
        self.H, self.G, self.d, self.cell, self.layer = H, G, d, cell, layer
        self.wide, rng = padded(d), RNG(seed)
        self.config = config(H, G, d)
        self.cache = RingCache(self.config, slots, cell)
        self.doses = dose_table(SOBER, 2, cell)
        self.keys, self.values = (rng.normal(size=(written, G, d)).astype(np.float32) for _ in range(2))
        self.write(np.arange(written), self.keys, self.values)
        if cell == "f16":
            self.keys, self.values = (
                x.astype(np.float16).astype(np.float64) for x in (self.keys, self.values)
            )

    def write(self, positions, *vectors):
        """Keys and values, or one number for all of them, into the cache."""
        shape = len(positions), self.G, self.d
        k, v = (Array(self.heads(np.broadcast_to(x, shape)), 2) for x in (vectors * 2)[:2])
        self.step(positions, threads=2).run(rope.write_cache, x=k, z=v, **self.fields(self.G))

    def heads(self, x):
        """(T, heads, d) -> (T, heads, 2, padded half)."""
        out = np.zeros((*x.shape[:2], 2, self.wide // 2))
        out[..., : self.d // 2] = x.reshape(*x.shape[:2], 2, self.d // 2)
        return out

    def fields(self, heads):
        element = {"f16": 2, "f32": 4}[self.cell]
        return dict(layer=self.layer, cell=element, heads=heads, kv_heads=self.G, head_dim=self.wide)

    def step(self, positions, threads):
        step = Step(len(positions), threads, positions)
        step.spans["keys"], step.spans["values"] = self.cache.keys.ctypes.data, self.cache.values.ctypes.data
        step.spans["slots"], step.spans["doses"] = self.cache.slots, self.doses.ctypes.data
        step.call["sites"] = self.doses.shape[1]
        tiles = self.G * (self.H // self.G // 8 + 2)
        self.parts = aligned(tiles * (1024 // CHUNK + 2) * partial_bytes(self.wide), np.uint8)
        self.counts = aligned(tiles, np.int64)
        step.call["parts"], step.call["part_counts"] = self.parts.ctypes.data, self.counts.ctypes.data
        return step

    def attend(self, q, positions, window, threads=2):
        """q (T, H, d) -> (T, H, d)."""
        step, y = self.step(positions, threads), Array(self.heads(np.full_like(q, 9)), threads)
        x, scale = Array(self.heads(q), threads), self.d**-0.5
        window = window or 1 << 30
        step.run(
            ATTEND[self.cell],
            x=x,
            y=y,
            window=window,
            scale=scale,
            site=3,
            value_site=4,
            **self.fields(self.H),
        )
        found = y.shared.reshape(len(q), self.H, 2, self.wide // 2)
        assert not np.nan_to_num(found[..., self.d // 2 :]).any(), "padding must stay zero"
        return found[..., : self.d // 2].reshape(q.shape)

    def expected(self, q, positions, window):
        at = np.arange(len(self.keys))
        rows = [
            naive.attend(x.astype(np.float64), self.keys, self.values, p, at, window)
            for x, p in zip(q, positions, strict=True)
        ]
        return np.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 20, 256, 300])
@pytest.mark.parametrize(
    ("H", "G", "d"), [(4, 4, 8), (6, 2, 12), (4, 1, 32), (16, 2, 64), (9, 1, 8), (17, 1, 96)]
)
@pytest.mark.parametrize("cell", ["f16", "f32"])
def test_attention_of_one_token(cell, H, G, d, window):
    """Groups of 1 to 17 query heads; positions on both sides of every boundary there is (16, 64, 256)."""
    attention = Attention(H, G, d, cell)
    q = RNG(1).normal(size=(len(POSITIONS), H, d)).astype(np.float32) * 2
    found = [attention.attend(q[i : i + 1], [p], window) for i, p in enumerate(POSITIONS)]
    expected = attention.expected(q, POSITIONS, window)
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=ATTENTION)


@pytest.mark.parametrize("window", [None, 20, 300])
@pytest.mark.parametrize("cell", ["f16", "f32"])
@pytest.mark.parametrize(("H", "G", "d"), [(6, 2, 12), (4, 4, 8), (16, 2, 64)])
def test_attention_of_many_tokens_has_the_bits_of_one(H, G, d, cell, window):
    attention = Attention(H, G, d, cell)
    positions = np.arange(120, 700)
    q = RNG(2).normal(size=(len(positions), H, d)).astype(np.float32) * 2
    whole = attention.attend(q, positions, window)
    np.testing.assert_allclose(whole, attention.expected(q, positions, window), rtol=0, atol=ATTENTION)
    for p in POSITIONS:
        if p >= 120:
            at = slice(p - 120, p - 119)
            for threads in (1, 3):
                np.testing.assert_array_equal(attention.attend(q[at], [p], window, threads), whole[at])
    np.testing.assert_array_equal(attention.attend(q[77:96], positions[77:96], window), whole[77:96])


def test_attention_in_a_wrapped_ring():
    """128 slots, 700 positions written: those of the window are where the later ones have not been."""
    attention = Attention(4, 2, 16, "f32", slots=128)
    q = RNG(3).normal(size=(20, 4, 16)).astype(np.float32) * 2
    positions = np.arange(680, 700)
    expected = attention.expected(q, positions, 100)
    np.testing.assert_allclose(attention.attend(q, positions, 100), expected, rtol=0, atol=ATTENTION)
    for i in (0, 19):
        one = attention.attend(q[i : i + 1], positions[i : i + 1], 100)
        np.testing.assert_array_equal(one, attention.attend(q, positions, 100)[i : i + 1])


@pytest.mark.parametrize("cell", ["f16", "f32"])
@pytest.mark.parametrize("tokens", [1, 10, 40])
@pytest.mark.parametrize("window", [20, 70])
def test_attention_uses_nothing_of_slots_it_does_not_see(window, tokens, cell):
    """What was fed and taken back stays in the ring: before the window, or behind the last token."""
    attention = Attention(4, 2, 16, cell, slots=128)
    positions = np.arange(700 - tokens, 700)
    q = RNG(3).normal(size=(tokens, 4, 16)).astype(np.float32) * 2
    clean = attention.attend(q, positions, window)
    np.testing.assert_allclose(clean, attention.expected(q, positions, window), rtol=0, atol=ATTENTION)
    attention.write(np.arange(700, 700 + 128 - (window + tokens - 1)), np.nan)
    np.testing.assert_array_equal(attention.attend(q, positions, window), clean)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_attention_shows_what_is_not_finite(bad):
    attention = Attention(4, 2, 16, "f32", written=40)
    q = RNG(3).normal(size=(2, 4, 16)).astype(np.float32)
    q[1, 2, 3] = bad
    found = attention.attend(q, [30, 31], None)
    assert np.isfinite(found[0]).all() and not np.isfinite(found[1, 2]).any()
    assert np.isfinite(found[1, [0, 1, 3]]).all()


def test_scores_far_apart_and_far_below_zero():
    """All scores below -10,000: the running maximum must still find them."""
    attention = Attention(2, 1, 8, "f32", written=300)
    attention.cache.keys[:], attention.keys[:] = 0, -500
    step = attention.step(np.arange(300), 1)
    k, v = (Array(attention.heads(x), 1) for x in (attention.keys, attention.values))
    step.run(rope.write_cache, x=k, z=v, **attention.fields(1))
    q = np.full((1, 2, 8), 30.0, np.float32)
    expected = attention.expected(q, [299], None)
    np.testing.assert_allclose(attention.attend(q, [299], None), expected, rtol=0, atol=ATTENTION)


# --- functions

FUNCTION = {"exp": 0, "tanh": 1, "erf": 2, "sigmoid": 3, "sin": 4, "cos": 5, "exp2": 6}


@pytest.fixture(scope="module")
def function():
    """function(name, x (n,) float32) -> the kernel's function of each."""

    @numba.cfunc(types.void(types.int64, types.int64, types.int64, types.int64), error_model="numpy")
    def apply(which, x, y, nbytes):
        for j in range(0, nbytes, 64):
            v = load(x + j)
            if which == 0:
                v = maths.exp(v)
            elif which == 1:
                v = maths.tanh(v)
            elif which == 2:
                v = maths.erf(v)
            elif which == 3:
                v = maths.sigmoid(v)
            elif which == 4:
                v = maths.sin_cos_half(v)[0]
            elif which == 5:
                v = maths.sin_cos_half(v)[1]
            else:
                v = maths.exp2_falling(v)
            store(y + j, v)

    def call(name, x):
        source, target = aligned(padded(len(x)), np.float32), aligned(padded(len(x)), np.float32)
        source[: len(x)] = x
        apply.ctypes(FUNCTION[name], source.ctypes.data, target.ctypes.data, source.nbytes)
        return target[: len(x)].copy()

    return call


def test_exp(function):
    x = np.concatenate([np.linspace(-86.9, 88.7, 20001), [0, -0.0, 1e-30, 88.72]]).astype(np.float32)
    found = function("exp", x)
    np.testing.assert_allclose(found[:-1], np.exp(x[:-1].astype(np.float64)), rtol=3e-7)
    assert found[-4] == found[-3] == found[-2] == 1  # exactly: a softmax's largest weight
    extremes = function("exp", np.array([-87.5, -1e4, -np.inf, 89, 1e4, np.inf, np.nan], np.float32))
    np.testing.assert_array_equal(extremes, [0, 0, 0, np.inf, np.inf, np.inf, np.nan])


def test_exp2_falling(function):
    x = np.concatenate([np.linspace(-126, 0, 40001), [-0.0, -1e-30]]).astype(np.float32)
    found = function("exp2", x)
    np.testing.assert_allclose(found, np.exp2(x.astype(np.float64)), rtol=3e-7)
    assert (found[-3:] == 1).all()  # exactly: a softmax's largest weight
    extremes = function("exp2", np.array([-126.5, -1e30, -np.inf, np.nan], np.float32))
    np.testing.assert_array_equal(extremes, [0, 0, 0, np.nan])


@pytest.mark.parametrize(
    ("name", "exact", "edge"),
    [
        ("tanh", np.tanh, [-1, 1, np.nan]),
        ("erf", np.vectorize(math.erf), [-1, 1, np.nan]),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), [0, 1, np.nan]),
    ],
)
def test_saturating_functions(name, exact, edge, function):
    x = np.concatenate([np.linspace(-20, 20, 20001), np.linspace(-1e-3, 1e-3, 101)]).astype(np.float32)
    np.testing.assert_allclose(function(name, x), exact(x.astype(np.float64)), rtol=0, atol=FUNCTIONS)
    np.testing.assert_array_equal(function(name, np.array([-np.inf, np.inf, np.nan], np.float32)), edge)


def test_sine_and_cosine_of_twice_the_argument(function):
    half = np.linspace(-np.pi / 2, np.pi / 2, 20001).astype(np.float32)
    wide = 2 * half.astype(np.float64)
    sin, cos = function("sin", half), function("cos", half)
    np.testing.assert_allclose(sin, np.sin(wide), rtol=0, atol=FUNCTIONS)
    np.testing.assert_allclose(cos, np.cos(wide), rtol=0, atol=FUNCTIONS)
    np.testing.assert_allclose(sin.astype("f8") ** 2 + cos.astype("f8") ** 2, 1, rtol=0, atol=2 * FUNCTIONS)


# --- packing


def round_trip(values: np.ndarray, name: str) -> np.ndarray:
    """float32 (n, k), k a multiple of 32, through a format by the library that defined it."""
    if name == "f32":
        return values
    if name == "f16":
        return values.astype(np.float16).astype(np.float32)
    if name == "bf16":  # truncated: exact for what came from bf16, the only case there is
        return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    kind = gguf.GGMLQuantizationType[name.upper()]
    return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)


def assert_rounded(found: np.ndarray, held: np.ndarray, name: str) -> None:
    """found is `held` through a format, ties apart: ggml rounds half away from zero, we half to even; or, of
    4 bits, with as little error as the search for scales in float64 leaves: where two scales are about as
    good, blocks may end otherwise."""
    if name in FLOATS:
        np.testing.assert_array_equal(found, round_trip(held, name))
        return
    expected = naive.rounded(held, int(name[1])) if name in OURS else round_trip(held, name)
    group = min(FORMATS[name].group, held.shape[-1])
    found, expected, held = (x.reshape(-1, group) for x in (found, expected, held))
    if name in OURS:
        ours, theirs = (np.square(x - held.astype(np.float64)).sum(-1) for x in (found, expected))
        assert np.isclose(ours, theirs, rtol=1e-3, atol=1e-6).mean() > 0.9
        assert ours.sum() < 1.002 * theirs.sum() + 1e-6
    else:
        steps = np.abs(held) / np.maximum(np.abs(held).max(-1, keepdims=True) / 127, 1e-30)
        same = np.isclose(found, expected, rtol=1e-6, atol=0)
        assert (same | (np.abs(steps % 1 - 0.5) < 1e-4)).all()


@pytest.mark.parametrize("kind", [*FLOATS, *FILES])
@pytest.mark.parametrize("quant", ["none", "f32", "q8", "q4"])
@pytest.mark.parametrize("fine", [True, False])
def test_packed_rows_come_back(kind, quant, fine):
    """Every kind of tensor in every format it can be loaded as, read back row by row."""
    w = RNG(4).normal(size=(37, columns(kind, 64))).astype(np.float32)
    w[0, :32], w[1, :32], w[2, 5] = 0, 0.25, -30
    loaded = Weights({"w": Need("w", w.shape, fine=fine)}, {"w": tensor("w", w, kind)}, quant, 2), "w"
    eight = kind if kind == "q8_0" else "q8_256"
    four = kind if kind in ("q4_0", "q4_1", "q4_k", "iq4_nl") else "q4_128"
    name = loaded[0]["w"].format
    assert name == {"none": kind, "f32": "f32", "q8": eight, "q4": eight if fine else four}[quant]
    found, held = gathered(loaded, loaded[0]["w"].n), values_of(kind, w).astype(np.float32)
    if name == kind:
        np.testing.assert_array_equal(found[:37], held)
    else:
        assert_rounded(found[:37], held, name)
    assert not found[37:].any(), "rows of padding must be zero"


def packed(kind: str, name: str, data: np.ndarray, k: int) -> np.ndarray:
    """One panel of 16 rows packed by the kernel of this pair and read back, (16, padded k)."""
    layout, wide = FORMATS[name], padded(k)
    out = aligned(wide // 32 * layout.panel_bytes, np.uint8)
    scales = aligned(max(1, -(-wide // (layout.group or 32)) * layout.scale_bytes), np.uint8)
    rows, scratch = np.arange(16, dtype=np.int32), aligned(scratch_bytes(wide), np.uint8)
    source, weight = SOURCE.rows(), WEIGHT.rows()
    source["data"], source["row_stride"] = data.ctypes.data, len(data) // 16
    source["column_stride"] = {"f32": 4, "f16": 2, "bf16": 2}.get(kind, 0)
    source["rows"], source["k"], source["group"], source["padded_group"] = rows.ctypes.data, k, k, k
    source["padded_k"], source["data_out"], source["scales_out"] = wide, out.ctypes.data, scales.ctypes.data
    PACKERS[kind, name](source.ctypes.data, 0, 1, scratch.ctypes.data)
    weight["n"], weight["k"], weight["data"], weight["scales"] = 16, wide, out.ctypes.data, scales.ctypes.data
    back = aligned((16, wide), np.float32)
    for i in range(16):
        layout.gather(weight.ctypes.data, i, back[i].ctypes.data)
    return back


@pytest.mark.parametrize("k", [70, 512])
@pytest.mark.parametrize(("kind", "name"), PACKERS)
def test_every_packer(kind, name, k):
    """Pairs that no option asks for today included: a format is one registry line away."""
    k = columns(kind, k)
    stored = tensor("w", RNG(5).normal(size=(16, k)).astype(np.float32), kind)
    held, found = np.pad(stored.float32(), ((0, 0), (0, padded(k) - k))), packed(kind, name, stored.data, k)
    if kind == name:
        np.testing.assert_array_equal(found, held)
    else:
        assert_rounded(found, held, name)


@pytest.mark.parametrize("name", ["q8_0", "q8_256", "q4_128"])
@pytest.mark.parametrize("large", [1e9, 1e30, np.inf])
def test_a_scale_beyond_f16_is_nan(name, large):
    """1e9 / 127 is more than one holds, spread over 64 columns, too."""
    w = np.ones((16, 64), np.float32)
    w[3, 40] = large
    found = packed("f32", name, w.reshape(-1).view(np.uint8), 64)
    of_its_scale = 32 if name == "q8_0" else 0  # the columns from here on
    assert np.isnan(found[3, of_its_scale:]).all() and np.isfinite(np.delete(found, 3, 0)).all()


@pytest.mark.parametrize("size", [1e-3, 1, 300])
@pytest.mark.parametrize(("tails", "least"), [(1000, 0.33), (4, 0.45)])
def test_levels_leave_less_error_than_even_steps(tails, least, size):
    """Squares, against those of ggml's q4_0, which takes more bytes."""
    w = (size * RNG(6).standard_t(tails, (16, 2048))).astype(np.float32)
    found = packed("f32", "q4_128", w.reshape(-1).view(np.uint8), w.shape[1])
    ours, even = (np.square(x - w.astype(np.float64)).sum() for x in (found, round_trip(w, "q4_0")))
    assert ours < (1 - least) * even


@pytest.mark.parametrize("quant", ["f32", "q8", "q4"])
@pytest.mark.parametrize("special", [np.nan, np.inf, 1e30])
def test_weights_that_are_not_finite_stay_so(special, quant):
    w = np.ones((16, 64), np.float32)
    w[3, 40] = special
    loaded = Weights({"w": Need("w", w.shape)}, {"w": tensor("w", w)}, quant, 1), "w"
    found = linear(loaded, np.ones((2, 64), np.float32), np.zeros((2, 16)), False)
    assert np.isfinite(found[:, [0, 1, 2, 4]]).all()
    assert (quant == "f32" and special == 1e30) or not np.isfinite(found[:, 3]).any()


def halves(x: np.ndarray, d: int) -> np.ndarray:
    """Columns that are heads of width d -> each as two padded halves."""
    heads = x.reshape(len(x), -1, 2, d // 2)
    return np.pad(heads, ((0, 0),) * 3 + ((0, padded(d) // 2 - d // 2),)).reshape(len(x), -1)


LAYOUTS = {  # name: fields of Need, the matrix in the file -> the rows the engine computes with
    "heads of 12 rows": (dict(out_head=12), lambda w: halves(w.T, 12).T),
    "heads of 12 columns": (dict(in_head=12), lambda w: halves(w, 12)),
    "heads of 32": (dict(in_head=32, out_head=32), lambda w: w),
    "interleaved heads": (
        dict(out_head=12, interleaved=True),
        lambda w: halves(w.reshape(-1, 6, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape).T, 12).T,
    ),
    "transposed": (dict(transposed=True), lambda w: w.T),
    "transposed, part of the rows": (dict(transposed=True, columns=(32, 64)), lambda w: w.T[32:64]),
    "part of the rows, in heads": (dict(columns=(12, 36), out_head=12), lambda w: halves(w[12:36].T, 12).T),
}


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, kind):
    fields, arrange = LAYOUTS[name]
    if kind == "q8_0" and "transposed" in fields:
        kind = "bf16"  # a transposed matrix comes from Conv1D, and no file has that in blocks
    w = RNG(7).normal(size=(96, 96))
    biases = RNG(8).normal(size=96).astype(np.float32)
    weight = weights(w, kind, biases, **fields)
    expected = arrange(values_of(kind, w))
    found = gathered(weight, len(expected))
    np.testing.assert_allclose(found[:, : expected.shape[1]], expected, rtol=1e-7)
    assert not found[:, expected.shape[1] :].any()
    row = weight[0].table[0]
    held = np.ctypeslib.as_array((ctypes.c_float * int(row["n"])).from_address(int(row["bias"])))
    of_rows = (
        np.broadcast_to(biases, (96, 96)) if "transposed" in fields else np.repeat(biases[:, None], 96, 1)
    )
    np.testing.assert_array_equal(held[: len(expected)], arrange(of_rows)[:, 0])


# --- the cache of compiled kernels


def doubled(x):
    return x + x


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """kept() -> the same small kernel as a new process would see it, cached in a folder of its own."""
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path)
    return lambda: jit.Kernel(doubled, int64(int64), "doubled")


def test_a_kernel_is_compiled_once_and_then_loaded(kept, tmp_path, monkeypatch):
    kernel = kept()
    assert not kernel.is_cached and kernel(21) == 42 and kernel.is_cached
    assert [path.name for path in tmp_path.iterdir()] == ["doubled"]
    monkeypatch.setattr(jit, "_write", lambda *_: pytest.fail("compiled again"))
    assert kept().is_cached and kept()(4) == 8


SMALL = "embed.embed, norm.rms_norm, embed.asked, rope.rope, team.post, rope.write_cache"  # kernels
COMPILE = f"""
import sys
from tinydrug.kernels import compiler, crew, embed, norm, rope, team
compiled, whole = [], compiler.object_code
compiler.object_code = lambda *about: compiled.append(about[2]) or whole(*about)
sys.executable = sys.argv[1] or sys.executable
kernels, shares = ({SMALL},), []
crew.compile_all(kernels, 2, shares.append)
assert all("address" in vars(kernel) for kernel in kernels)
assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)
print(*compiled)
"""


@pytest.mark.parametrize(
    ("python", "here"),
    [("", {1, 2, 3, 4, 5}), ("python-that-is-not", {6}), ("python-that-ends", {6}), ("an-application", {6})],
)
def test_kernels_are_compiled_by_two_processes_or_by_this_one(python, here, tmp_path, tmp_path_factory):
    """python: what runs the worker; here: how many kernels this process may have compiled."""
    if python:
        python = tmp_path_factory.mktemp("bin") / python
        if python.name != "python-that-is-not":
            python.write_text('#!/bin/sh\ntouch "$0.ran"\n')
            python.chmod(0o700)
    environment = os.environ | {"TINYDRUG_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(python)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.split()) in here and not done.stderr
    if python:
        assert Path(f"{python}.ran").exists() == (python.name == "python-that-ends")
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        name.rpartition(".")[2] for name in SMALL.split(", ")
    )


@pytest.mark.parametrize("damage", ["", "half", "garbage", "one byte"])
def test_a_damaged_file_is_compiled_anew(damage, kept, tmp_path):
    assert kept()(1) == 2
    file = tmp_path / "doubled"
    good = file.read_bytes()
    other = bytearray(good)
    other[len(good) // 2] ^= 1
    file.write_bytes({"half": good[: len(good) // 2], "one byte": other}.get(damage, damage.encode()))
    assert kept()(3) == 6
    assert jit._read(file) and file.stat().st_size > 0.9 * len(good), "and kept again"


def loud(x):
    print(x)
    return x


def test_a_kernel_that_needs_the_interpreter_is_refused():
    """What Numba brings along is not there when machine code is loaded without it."""
    with pytest.raises(AssertionError, match="loud needs the interpreter: it calls .*Py"):
        jit.Kernel(loud, int64(int64), "loud").address  # noqa: B018


def test_without_room_kernels_are_not_kept(kept, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jit.os, "replace", full)
    assert kept()(5) == 10 and list(tmp_path.iterdir()) == []
    assert "doubled is not kept: [Errno 28] No space left" in caplog.text


def test_the_cache_folder_is_the_users_own_or_none(tmp_path, monkeypatch, caplog):
    find = jit.cache_folder.__wrapped__
    monkeypatch.setenv("TINYDRUG_CACHE_DIR", str(tmp_path / "mine"))
    folder = find()
    assert folder.parent == tmp_path / "mine" and folder.stat().st_mode & 0o777 == 0o700 and not caplog.text
    folder.chmod(0o777)
    assert find() is None and "it can be written by others" in caplog.text
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TINYDRUG_CACHE_DIR", str(tmp_path / "file"))
    caplog.clear()
    assert find() is None and "set TINYDRUG_CACHE_DIR" in caplog.text


# --- instruction sets


@pytest.mark.parametrize("emit", [lookups.lookup_64.__defaults__[0], lookups._lookup_64_by_16])
def test_tables_of_64_bytes(emit):
    """With and without the instruction that reads one."""
    table = RNG(2).permutation(256)[:64].tolist()
    entry = lookups.lookup_64(table, emit)

    @numba.njit(types.void(types.int64, types.int64))
    def all_entries(x, y):
        store_bytes(y, entry(load_bytes(x)))

    numbers, found = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
    for upper in (0, 64, 192):  # bits above the lower six are not looked at
        x = numbers + np.uint8(upper)
        all_entries(x.ctypes.data, found.ctypes.data)
        np.testing.assert_array_equal(found, table)


ISA_RUN = """
import hashlib, json, sys
import numpy as np
from engines import logits, runtime
from test_kernels import BLOCKS, FLOATS, columns, linear, weights
from tinydrug.kernels.isa import ISA
import tiny
out = {"isa": ISA}
for quant in ("f32", "q8", "q4"):
    model = runtime(sys.argv[1], quant=quant)
    out[quant] = hashlib.sha256(logits(model, tiny.ids("llama-gqa")).tobytes()).hexdigest()
for kind in (*FLOATS, *BLOCKS):
    w, x = np.random.default_rng(0).normal(size=(2, 64, columns(kind, 1056)))
    w[:, 0], x[:, 1] = 100, -100  # the largest products there are: 127 * 255
    y = [linear(weights(w, kind), x[:T], np.zeros((T, 64)), False) for T in (1, 4, 17, 49)]
    out[kind] = hashlib.sha256(b"".join(a.tobytes() for a in y)).hexdigest()
print(json.dumps(out))
"""


def test_every_instruction_set_gives_the_same_bits(tiny_model):
    found = {}
    tests = Path(__file__).parent
    for isa in KNOWN:
        places = os.pathsep.join([str(tests), *filter(None, sys.path)])
        env = os.environ | {"TINYDRUG_ISA": isa, "PYTHONPATH": places}
        command = [sys.executable, "-c", ISA_RUN, str(tiny_model("llama-gqa"))]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        if done.returncode and "this machine runs" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result.pop("isa") == isa
        found[isa] = result
    assert "portable" in found
    for isa, result in found.items():
        assert result == found["portable"], isa


# --- memory that is handed out


def test_a_loan_is_used_again_only_when_nobody_holds_it_or_a_view_of_it():
    loans = Loans()
    first, at = loans.take(3, (2, 10), 64)
    view = first[1:, :3]
    assert at == first.ctypes.data and at % 64 == 0 and first.strides == (64, 4)
    del first
    assert loans.take(3, (3, 16), 64)[1] != at, "a view holds it"
    del view
    assert at in {loans.take(2, (2, 16), 64)[1], loans.take(3, (3, 16), 64)[1]}
    held = [loans.take(1, (1, 25), 128)[0] for _ in range(10)]
    assert len({array.ctypes.data for array in held}) == 10


def test_large_loans_do_not_overlap():
    loans = Loans()
    big, _ = loans.take(2, (2, 1 << 20), 1 << 22)  # from pages of its own
    big[:] = 7
    other, _ = loans.take(2, (2, 1 << 20), 1 << 22)
    other[:] = 9
    assert (big == 7).all()


# --- threads that wait


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it spins, and yields to who wants the core")
def test_who_waits_long_for_others_sleeps():
    @jit.kernel(void(int64, int64), cached=False)
    def meet(sync, n):
        for _ in range(n):
            barrier(sync, 2)

    sync = aligned(PARKED, np.uint8)
    arguments = sync.ctypes.data, 1000
    meet(sync.ctypes.data, 0)  # compile
    early = threading.Thread(target=meet, args=arguments, daemon=True)
    early.start()
    time.sleep(0.05)
    start = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - start < 0.1, "it spins"
    meet(*arguments)
    early.join(10)
    assert not early.is_alive()
