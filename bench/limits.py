"""What the machine allows, measured in the same minute as what is held against it: reading memory, integer
dot products and float multiply-adds."""

import statistics
import threading
import time

import numpy as np
from llvmlite import ir

from tinydrug.kernels import amx, emit
from tinydrug.kernels.emit import i8
from tinydrug.kernels.jit import kernel
from tinydrug.kernels.kinds import address, op, void
from tinydrug.kernels.linear_tiles import AHEAD
from tinydrug.kernels.memory import aligned
from tinydrug.kernels.tiles import tile8, tile_as_floats, tile_dot4, tile_fma, tile_ints, tile_store
from tinydrug.kernels.vectors import floats, load, load_bytes, prefetch_l2, store_f32, sum_lanes

NEVER_CACHED = 1 << 30  # bytes that no cache of one core's holds
REPEATS = 10_000_000  # of what an arithmetic probe does in registers


f4 = np.float32
PROBE = void(address, address, address)


@kernel(PROBE, cached=False)
def read_memory(start, nbytes, out):
    """Load every byte once, in two streams far apart, and ask for what comes next: the fastest way that was
    found. Four streams of loads alone read 4 to 5 % less."""
    a, b = floats(f4(0.0)), floats(f4(0.0))
    step = nbytes // 2
    for p in range(start, start + step, 64):
        prefetch_l2(p + AHEAD)
        prefetch_l2(p + step + AHEAD)
        a, b = a + load(p), b + load(p + step)
    store_f32(out, sum_lanes(a + b))


@kernel(PROBE, cached=False)
def fused_multiply_adds(rounds, data, out):
    """rounds x 8 x 16 of them in float32, one operand in a register and one in the first cache lines."""
    acc = tile8()
    w = load(data)
    for _ in range(rounds):
        acc = tile_fma(acc, w, data + 64, 4)
    tile_store(acc, out, 64)


@kernel(PROBE, cached=False)
def dot_products(rounds, data, out):
    """rounds x 8 x 16 dot products of 4 bytes, operands in registers or the first cache lines."""
    acc = tile_ints(tile8())
    w = load_bytes(data)
    for _ in range(rounds):
        acc = tile_dot4(acc, w, data + 64, 4)
    tile_store(tile_as_floats(acc), out, 64)


def _instruction(name: str, *tiles: int):
    """An instruction on these tile registers, or on memory where there are none."""
    if tiles:
        return op(void())(lambda b: emit.call(b, name, ir.VoidType(), [i8(tile) for tile in tiles]))
    return op(void(address))(lambda b, p: emit.call(b, name, ir.VoidType(), [b.inttoptr(p, i8.as_pointer())]))


configure = _instruction("llvm.x86.ldtilecfg")
product_0, product_1, product_2, product_3 = (
    _instruction("llvm.x86.tdpbssd", t, 4 + t // 2, 6 + t % 2) for t in range(4)
)


@kernel(PROBE, cached=False)
def tile_products(rounds, shapes, out):
    """rounds x 4 products of full tiles of signed bytes, (16, 64) by (64, 16)."""
    configure(shapes)
    for _ in range(rounds):
        product_0()
        product_1()
        product_2()
        product_3()
    amx.release()


def together(work, threads: int) -> float:
    """Seconds until work(i) is done in every one of so many threads."""
    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


class Limits:
    """Of so many threads, on demand, medians of a few rounds. Of operations a multiply-add counts two."""

    def __init__(self, threads: int):
        self.threads = threads
        self._area = aligned(NEVER_CACHED // 4, np.float32)
        self._area[:] = 1  # pages that were never written read faster than memory
        self._out = aligned((threads, 8 * 16), np.float32)
        self._shapes = aligned(64, np.uint8)  # of tile registers: palette, bytes a row, rows
        self._shapes[0], self._shapes[16:32:2], self._shapes[48:56] = 1, 64, 16

    def read_gbs(self, rounds: int = 3, area: np.ndarray | None = None) -> float:
        """GB/s of reading memory; or these bytes, since in a virtual machine not all memory is as fast."""
        area = self._area if area is None else area
        part = area.nbytes // self.threads // 256 * 256
        passes = -(-NEVER_CACHED // area.nbytes)  # long against the starting of threads

        def work(i):
            for _ in range(passes):
                read_memory(area.ctypes.data + i * part, part, self._out[i].ctypes.data)

        seconds = (together(work, self.threads) for _ in range(rounds))
        return passes * part * self.threads / statistics.median(seconds) / 1e9

    def gops(self, rounds: int = 3) -> dict[str, float]:
        """GOP/s by unit: float32 multiply-adds, bytes in vector registers, and in tiles if there are any."""
        data = self._area.ctypes.data
        units = {
            "f32": (fused_multiply_adds, data, 8 * 16),
            "int8 dots": (dot_products, data, 8 * 16 * 4),
        }
        if amx.AVAILABLE:
            units["int8 tiles"] = tile_products, self._shapes.ctypes.data, 4 * 16 * 16 * 64
        return {unit: self._gops(*probe, rounds) for unit, probe in units.items()}

    def _gops(self, probe, data: int, multiply_adds: int, rounds: int) -> float:
        """Of a probe that does so many multiply-adds a round."""
        probe.address  # noqa: B018 - compiles

        def work(i):
            probe(REPEATS, data, self._out[i].ctypes.data)

        seconds = (together(work, self.threads) for _ in range(rounds))
        return 2 * REPEATS * multiply_adds * self.threads / statistics.median(seconds) / 1e9
