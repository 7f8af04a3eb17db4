"""Grouped-query attention over the ring-buffer cache, with noise drawn in keys and values as they are read.

Work is cut into units of up to 64 query rows (token, head) that share a kv head. A unit goes over absolute
chunks of 256 positions, each giving partial softmaxes, merged in order of position: so the chunks of one
token can be computed by different threads, and no bit depends on who computed what. Threads claim units
from one counter, at first a run of those that are chunks of one token. Keys and values become floats 64
positions at a time, turned by noise on the way, once for all rows of a unit; of few rows, or an f32 cache,
without noise they are multiplied as the cache has them.
"""

import numpy as np

from tinydrug.kernels.atomics import atomic_add, atomic_store
from tinydrug.kernels.jit import helper, inline, kernel
from tinydrug.kernels.noise import DRAWN, DRAWN_BYTES, call_turn, drawn_at, prepare, turn_bytes
from tinydrug.kernels.rope import key_address, value_address
from tinydrug.kernels.softmax import (
    CHUNK,
    ROWS,
    SCALE,
    clear,
    merge,
    multiplier,
    partial_bytes,
    softmax_output,
    weigh,
)
from tinydrug.kernels.structs import Struct
from tinydrug.kernels.tables import OPERATION
from tinydrug.kernels.team import claim
from tinydrug.kernels.vectors import load, load_halves, load_i32, store, store_i32

f4, i4, i8 = np.float32, np.int32, np.int64
BLOCK = 64  # positions whose keys or values are floats at a time; S is a multiple of it
QUERIES = 64  # query rows of a unit
TILES = QUERIES // ROWS  # partial softmaxes of a unit

UNIT = Struct(  # what a thread works on, and the memory it uses for that
    "Unit",
    g="i8",  # kv head
    first="i8",  # its query rows are first .. first + rows of the span's (tokens, heads of g)
    rows="i8",
    low="i8",  # position of the first row
    high="i8",  # and of the last
    turn_keys="i8",  # address of the kernel that makes cached keys noisy, or 0
    turn_values="i8",
    drawn_keys=DRAWN,  # the noise this unit meets in keys
    drawn_values=DRAWN,
    queries="i8",  # [QUERIES][d] f32
    positions="i8",  # [QUERIES] i32
    scores="i8",  # [QUERIES][CHUNK] f32
    floats="i8",  # [BLOCK][d] f32, keys or values
    totals="i8",  # [TILES] partial softmaxes: of all chunks so far,
    parts="i8",  # and of one chunk
    ahead="i8",  # address of the keys that this thread is likely to read next
    scratch="i8",  # of the kernels that make noise
)
unit_at = UNIT.pointer()
UNIT_BYTES = 512  # of a unit and what it has drawn


def scratch_bytes(d: int) -> int:
    """Private memory of a thread for heads of this (padded) width."""
    rows = 4 * QUERIES * (d + 1 + CHUNK)  # queries, positions, scores
    return UNIT_BYTES + rows + 4 * BLOCK * d + 2 * TILES * partial_bytes(d) + turn_bytes(d)


def split_tiles(group: int) -> int:
    """Partial softmaxes of a chunk, of one token and one kv head."""
    return -(-group // QUERIES) * -(-min(group, QUERIES) // ROWS)


@inline
def lay_out(at, d):
    """A unit in the memory at this address."""
    unit = unit_at(at)
    unit.drawn_keys = drawn_at(at + UNIT_BYTES - 2 * DRAWN_BYTES)
    unit.drawn_values = drawn_at(at + UNIT_BYTES - DRAWN_BYTES)
    unit.queries = at + UNIT_BYTES
    unit.positions = unit.queries + 4 * QUERIES * d
    unit.scores = unit.positions + 4 * QUERIES
    unit.floats = unit.scores + 4 * QUERIES * CHUNK
    unit.totals = unit.floats + 4 * BLOCK * d
    unit.parts = unit.totals + TILES * partial_bytes(d)
    unit.scratch = unit.parts + TILES * partial_bytes(d)
    return unit


@inline
def prepare_read(drawn, dose, span, site, unit, window, measured):
    """The noise that the token at position unit.low meets in the cached vectors of a kv head."""
    prepare(drawn, dose, span.seed, site, unit.g, unit.low, unit.low - span.born, True)
    drawn.awake, drawn.measured = span.awake, measured
    drawn.lowest, drawn.highest = unit.low - window + 1, unit.low
    if measured != 0:
        drawn.measured = measured + 24 * site


@helper
def take_rows(call, op, span, unit):
    """Queries of the unit's rows, times the scale of scores, and positions. Rows past the last one, up to a
    whole tile, repeat it: computed, never written."""
    d, group = op.head_dim, op.heads // op.kv_heads
    for r in range((unit.rows + ROWS - 1) // ROWS * ROWS):
        row = unit.first + min(r, unit.rows - 1)
        token, h = span.first + row // group, unit.g * group + row % group
        store_i32(unit.positions + 4 * r, i4(call.tokens[token].position))
        x = op.x.data + token * op.x.stride + 4 * d * h
        for j in range(0, 4 * d, 64):
            store(unit.queries + 4 * d * r + j, load(x + j) * f4(op.scale * SCALE))
    unit.low = call.tokens[span.first + unit.first // group].position
    unit.high = call.tokens[span.first + (unit.first + unit.rows - 1) // group].position


@inline
def last_seen(unit, r):
    """The last position that a row of the tile from row r on sees."""
    return load_i32(unit.positions + 4 * min(r + ROWS, unit.rows) - 4)


@helper
def count_touched(op, span, unit, start, end):
    """Add the unprotected vectors at positions start .. end to the counters of those moved."""
    lowest = max(start, unit.low - op.window + 1)
    touched = load_i32(span.awake + 4 * end + 4) - load_i32(span.awake + 4 * lowest)
    if touched > 0:
        if unit.turn_keys != 0:
            atomic_add(span.moved + 8 * op.site, touched)
        if unit.turn_values != 0:
            atomic_add(span.moved + 8 * op.value_site, touched)


@helper
def write_outputs(op, span, unit, totals):
    """Of the unit's rows -> y (T, H, d)."""
    d, group = op.head_dim, op.heads // op.kv_heads
    for r in range(unit.rows):
        row, total = unit.first + r, totals + partial_bytes(d) * (r // ROWS)
        y = op.y.data + (span.first + row // group) * op.y.stride + 4 * d * (unit.g * group + row % group)
        softmax_output(total, r % ROWS, d, y)


@inline
def merge_tiles(unit, totals, parts, d):
    """Add the partial softmaxes of the next chunk to those of all before. They are spent."""
    for r in range(0, unit.rows, ROWS):
        at = partial_bytes(d) * (r // ROWS)
        merge(totals + at, parts + at, min(ROWS, unit.rows - r), d)


@inline
def units_of(claimed, run, n):
    """The units u .. stop - 1 of a claim: a run for each of the first n, then one by one."""
    if claimed < n:
        return claimed * run, (claimed + 1) * run
    return n * (run - 1) + claimed, n * (run - 1) + claimed + 1


multiply_floats = multiplier(load, 4)


def _attend(name, load_cell, cell):
    """The operation for one element type of the cache."""
    multiply_cells = multiplier(load_cell, cell) if cell < 4 else multiply_floats

    @inline
    def multiply(cells, *args):
        """cells: whether b is the cache itself."""
        if cells:
            multiply_cells(*args)
        else:
            multiply_floats(*args)

    @helper
    def as_floats(op, unit, turn, drawn, source, position, count):
        """Cached keys or values of `count` positions -> unit.floats. turn: address of the kernel that makes
        them noisy, or 0."""
        if turn != 0:
            call_turn(turn, op, drawn, source, position, count, unit.floats, unit.scratch)
        else:
            for j in range(0, op.head_dim * ((count + 15) // 16)):
                store(unit.floats + 64 * j, load_cell(source + 16 * cell * j))
        return unit.floats

    @helper
    def attend_chunk(op, span, unit, first, last, parts):
        """The partial softmaxes of a unit's tiles over positions first .. last (first a multiple of 64). What
        an earlier sequence left in slots that no row sees may be NaN: such keys get no weight, and such
        values are not read."""
        d, direct = op.head_dim, cell == 4 or unit.rows <= ROWS  # several tiles share what becomes floats
        lowest = max(first, unit.low - op.window + 1)  # position that a row sees
        begin = lowest // BLOCK * BLOCK
        cells = unit.turn_keys == 0 and direct
        for start in range(begin, last + 1, BLOCK):
            count = min(BLOCK, last + 1 - start)
            keys = key_address(span, op, unit.g, start % span.slots)
            if not cells:
                keys = as_floats(op, unit, unit.turn_keys, unit.drawn_keys, keys, start, count)
            ahead = value_address(span, op, unit.g, start % span.slots)
            for r in range(0, unit.rows, ROWS):
                panels = (min(count, last_seen(unit, r) + 1 - start) + 15) // 16
                if panels > 0:
                    q, at = unit.queries + 4 * d * r, unit.scores + 4 * (CHUNK * r + start - first)
                    rows = min(ROWS, unit.rows - r)
                    multiply(cells, rows, q, 4 * d, d, keys, 16, 16 * d, panels, False, at, 4 * CHUNK, ahead)
        asked, farthest = unit.ahead, unit.ahead + cell * d * (CHUNK - BLOCK)
        for r in range(0, unit.rows, ROWS):
            part, rows = parts + partial_bytes(d) * (r // ROWS), min(ROWS, unit.rows - r)
            groups = max(0, (min(last, last_seen(unit, r)) - first + 16) // 16)
            at, positions = unit.scores + 4 * CHUNK * r, unit.positions + 4 * r
            clear(part, d)
            weigh(at, positions, rows, first, groups, op.window, part, asked)
            asked = min(asked + 64 * rows * groups, farthest)
        cells = unit.turn_values == 0 and direct
        for start in range(begin, last + 1, BLOCK):
            count, skipped = min(BLOCK, last + 1 - start), max(0, lowest - start)
            values = value_address(span, op, unit.g, start % span.slots)
            if not cells:
                values = as_floats(op, unit, unit.turn_values, unit.drawn_values, values, start, count)
            values += (cell if cells else 4) * d * skipped
            ahead = min(asked + cell * d * (start - begin), farthest)
            for r in range(0, unit.rows, ROWS):
                n = min(count, last_seen(unit, r) + 1 - start) - skipped
                if n > 0:
                    weights = unit.scores + 4 * (CHUNK * r + start - first + skipped)
                    y, rows = parts + partial_bytes(d) * (r // ROWS) + 128, min(ROWS, unit.rows - r)
                    step, panels = 4 * CHUNK, d // 16
                    multiply(cells, rows, weights, step, n, values, d, 16, panels, True, y, 4 * d, ahead)

    @kernel(OPERATION, f"attend_{name}", big=True)
    def attend(call, op, tid, n):
        """queries x (T, H, d) over the cached keys and values -> y (T, H, d)."""
        d, G, group = op.head_dim, op.kv_heads, op.heads // op.kv_heads
        unit = lay_out(call.scratch + tid * call.scratch_stride, d)
        passed, counters, parts_passed = i8(0), call.part_counts, call.parts
        claimed = claim(call)
        for s in range(call.n_spans):
            span = call.spans[s]
            doses = span.doses[op.layer * call.sites]
            dose_k, dose_v = doses[op.site], doses[op.value_site]
            unit.turn_keys = dose_k.keys if dose_k.theta > 0.0 else i8(0)
            unit.turn_values = dose_v.values if dose_v.theta > 0.0 else i8(0)
            noisy = unit.turn_keys != 0 or unit.turn_values != 0
            # Rows are cut into units; under noise, those of one token, since each token has its own noise.
            together = group if noisy else span.count * group
            size = min(QUERIES, together)
            per_token = (together + size - 1) // size
            units = per_token * (span.count if noisy else 1)
            tiles = (size + ROWS - 1) // ROWS
            last = call.tokens[span.first + span.count - 1].position
            # A token alone: its chunks are units, too.
            split = last // CHUNK - max(0, last - op.window + 1) // CHUNK + 1 if span.count == 1 else 1
            # Chunks that follow each other are read faster than in turns with another thread. An eighth is
            # claimed one by one, so that threads end together.
            count = G * units * split
            run = max(1, count * 7 // (8 * n)) if split > 1 else 1
            claims, u, stop = count - n * (run - 1), i8(0), i8(0)
            while claimed < passed + claims:
                if u == stop:
                    u, stop = units_of(claimed - passed, run, n)
                # Later tokens see more: they come first, so that threads end together.
                c, unit.g, at = u % split, u // split % G, units - 1 - u // (split * G)
                unit.first = at // per_token * together + at % per_token * size
                unit.rows = min(size, together - at % per_token * size)
                take_rows(call, op, span, unit)
                counted, measured = noisy and at % per_token == 0, i8(0)
                if span.measured != 0 and counted:
                    measured = span.measured + 24 * tid * call.sites
                if unit.turn_keys != 0:
                    prepare_read(unit.drawn_keys, dose_k, span, op.site, unit, op.window, measured)
                if unit.turn_values != 0:
                    prepare_read(unit.drawn_values, dose_v, span, op.value_site, unit, op.window, measured)
                c0 = max(0, unit.low - op.window + 1) // CHUNK + c
                c1 = c0 if split > 1 else unit.high // CHUNK
                # This thread's next unit, if all go on alike.
                next_u = u + 1 if u + 1 < stop else n * run + claimed - passed
                other = call.spans[s + 1] if next_u >= count and s + 1 < call.n_spans else span
                next_start = (c0 - c + next_u % split) * CHUNK
                next_keys = key_address(other, op, next_u // split % G, next_start % other.slots)
                chunk_bytes = partial_bytes(d) * tiles
                parts = parts_passed + chunk_bytes * u if split > 1 else unit.totals
                for chunk in range(c0, c1 + 1):
                    start, end = chunk * CHUNK, min(unit.high, (chunk + 1) * CHUNK - 1)
                    unit.ahead = next_keys
                    if chunk < c1:
                        unit.ahead = key_address(span, op, unit.g, (start + CHUNK) % span.slots)
                    attend_chunk(op, span, unit, start, end, parts if chunk == c0 else unit.parts)
                    if counted:
                        count_touched(op, span, unit, start, end)
                    if chunk > c0:
                        merge_tiles(unit, unit.totals, unit.parts, d)
                if split == 1:
                    write_outputs(op, span, unit, unit.totals)
                elif atomic_add(counters + 8 * (u // split), 1) == split - 1:
                    # Who finishes a unit's last chunk merges them all, in order.
                    atomic_store(counters + 8 * (u // split), 0)
                    totals = parts - chunk_bytes * c
                    for each in range(1, split):
                        merge_tiles(unit, totals, totals + chunk_bytes * each, d)
                    write_outputs(op, span, unit, totals)
                u += 1
                if u == stop:
                    claimed = claim(call)
            passed += claims
            if split > 1:
                counters += 8 * G * units
                parts_passed += partial_bytes(d) * tiles * count

    return attend


ATTEND = {
    "f16": _attend("f16", load_halves, 2),
    "f32": _attend("f32", load, 4),
}
