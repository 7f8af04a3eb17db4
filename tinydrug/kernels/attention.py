"""Grouped-query attention over the ring-buffer cache, with noise drawn in keys and values as they are read.

Work is cut into tiles of up to 8 query rows (token, head) that share a kv head. A tile goes over absolute
chunks of 256 positions, each giving a partial softmax, merged in order of position: so the chunks of one
token can be computed by different threads, and no bit depends on who computed what. Threads claim units
from one counter.

A partial result at an address: row maxima [16 f32], row sums [16 f32], outputs [8][d] f32.
"""

import numpy as np

from tinydrug.kernels.jit import inline, kernel
from tinydrug.kernels.maths import exp
from tinydrug.kernels.noise import DRAWN_BYTES, call_scores, call_values, drawn_at, prepare
from tinydrug.kernels.rope import key_address, value_address
from tinydrug.kernels.tables import OPERATION
from tinydrug.kernels.team import claim
from tinydrug.kernels.vectors import (
    atomic_add,
    atomic_store,
    both,
    floats,
    fma,
    lane,
    load,
    load_f32,
    load_halves,
    load_i32,
    max_lanes,
    maximum,
    select,
    store,
    store_f32,
    store_i32,
    sum_lanes,
    tile1,
    tile4,
    tile8,
    tile_fma,
    tile_load,
    tile_rows,
    tile_store,
)

f4, i4, i8 = np.float32, np.int32, np.int64
CHUNK = 256  # positions of one partial softmax
BLOCK = 64  # positions scored before their values are read; S is a multiple of it
ROWS = 8  # query rows of a tile


@inline
def partial_bytes(d):
    return 128 + 4 * ROWS * d


@inline
def clear(total, d):
    store(total, floats(f4(-1e30)))  # not -inf: -inf - -inf would be NaN
    for j in range(64, partial_bytes(d), 64):
        store(total + j, floats(f4(0.0)))


@inline
def merge(total, part, rows, d):
    """Add the next chunk's partial result to the running one. `part` is spent."""
    top = maximum(load(total), load(part))
    a, b = exp(load(total) - top), exp(load(part) - top)
    store(total, top)
    store(total + 64, fma(load(part + 64), b, load(total + 64) * a))
    store(part, a)
    store(part + 64, b)
    for r in range(rows):
        a, b = floats(load_f32(part + 4 * r)), floats(load_f32(part + 64 + 4 * r))
        for j in range(128 + 4 * r * d, 128 + 4 * (r + 1) * d, 64):
            store(total + j, fma(load(part + j), b, load(total + j) * a))


@inline
def write_output(op, total, token, first_row, rows, g):
    """Outputs divided by their sums -> y (T, H, d)."""
    d, group = op.head_dim, op.heads // op.kv_heads
    for r in range(rows):
        row = first_row + r
        y = op.y.data + (token + row // group) * op.y.stride + 4 * d * (g * group + row % group)
        inverse = f4(1.0) / load_f32(total + 64 + 4 * r)
        for j in range(0, 4 * d, 64):
            store(y + j, load(total + 128 + 4 * r * d + j) * inverse)


@inline
def prepare_read(drawn, dose, span, site, g, step, measured, scratch):
    """The noise that the token at position `step` meets in the cached vectors of kv head g."""
    prepare(drawn, dose, span.seed, site, g, step, step - span.born, True)
    drawn.awake, drawn.scratch, drawn.measured = span.awake, scratch, measured
    if measured != 0:
        drawn.measured = measured + 24 * site


def _attend(name, load_cell, cell):
    """The operation for one element type of the cache."""

    @inline
    def chunk(zeros, op, span, doses, g, first, last, step, noisy, measured, q, positions, part, scratch):
        """The partial softmax of a tile over positions first .. last (first a multiple of 64) of one kv head.

        A masked position adds an exact zero. Scratch: scores [8][64], decays [16], noisy values [16][d],
        and 1 KiB for the noise kernels."""
        d = op.head_dim
        scores, decays = scratch, scratch + 2048
        for_noise, noisy_values = scratch + 2560, scratch + 3584
        dose_k, dose_v = doses[op.site], doses[op.value_site]
        noisy_k, noisy_v = noisy and dose_k.theta > 0.0, noisy and dose_v.theta > 0.0
        drawn_k, drawn_v = drawn_at(scratch + 2112), drawn_at(scratch + 2112 + DRAWN_BYTES)
        if noisy_k:
            prepare_read(drawn_k, dose_k, span, op.site, g, step, measured, for_noise + 640)
        if noisy_v:
            prepare_read(drawn_v, dose_v, span, op.value_site, g, step, measured, for_noise + 640)
        clear(part, d)
        for start in range(first, last + 1, BLOCK):
            groups, slot = min(BLOCK // 16, (last - start) // 16 + 1), start % span.slots
            for j in range(groups):
                keys = key_address(span, op, g, slot + 16 * j)
                if noisy_k:
                    call_scores(
                        dose_k.scores,
                        op,
                        drawn_k,
                        keys,
                        q,
                        tile_rows(zeros),
                        start + 16 * j,
                        scores + 64 * j,
                    )
                else:
                    s = zeros
                    for i in range(d):
                        s = tile_fma(s, load_cell(keys + 16 * cell * i), q + 4 * i, 4 * d)
                    tile_store(s, scores + 64 * j, 256)
            for r in range(tile_rows(zeros)):
                own = load_i32(positions + 4 * r)
                top = floats(f4(-np.inf))
                for j in range(groups):
                    position = lane() + i4(start + 16 * j)
                    seen = both(position <= own, position > own - i4(op.window))
                    s = select(seen, load(scores + 256 * r + 64 * j), floats(f4(-np.inf)))
                    store(scores + 256 * r + 64 * j, s)
                    top = maximum(top, s)
                before = load_f32(part + 4 * r)
                highest = max(before, max_lanes(top))
                store_f32(part + 4 * r, highest)
                store_f32(decays + 4 * r, before - highest)
            decay = exp(load(decays))
            store(decays, decay)
            store(part + 64, load(part + 64) * decay)
            for r in range(tile_rows(zeros)):
                highest, total, kept = load_f32(part + 4 * r), floats(f4(0.0)), load_f32(decays + 4 * r)
                for j in range(groups):
                    weight = exp(load(scores + 256 * r + 64 * j) - highest)
                    store(scores + 256 * r + 64 * j, weight)
                    total = total + weight
                store_f32(part + 64 + 4 * r, load_f32(part + 64 + 4 * r) + sum_lanes(total))
                if kept != f4(1.0):
                    for j in range(128 + 4 * r * d, 128 + 4 * (r + 1) * d, 64):
                        store(part + j, load(part + j) * kept)
            if noisy_v:
                for j in range(groups):
                    values = value_address(span, op, g, slot + 16 * j)
                    call_values(dose_v.values, op, drawn_v, values, start + 16 * j, noisy_values, for_noise)
                    for c in range(0, d, 16):
                        o = tile_load(zeros, part + 128 + 4 * c, 4 * d)
                        for i in range(min(16, last - start - 16 * j + 1)):
                            v = load(noisy_values + 4 * (i * d + c))
                            o = tile_fma(o, v, scores + 64 * j + 4 * i, 256)
                        tile_store(o, part + 128 + 4 * c, 4 * d)
            else:
                values = value_address(span, op, g, slot)
                for c in range(0, d, 16):
                    o = tile_load(zeros, part + 128 + 4 * c, 4 * d)
                    # Not beyond the last position: 0 times what an earlier sequence left there may be NaN.
                    for i in range(min(BLOCK, last - start + 1)):
                        o = tile_fma(o, load_cell(values + cell * (i * d + c)), scores + 4 * i, 256)
                    tile_store(o, part + 128 + 4 * c, 4 * d)

    @kernel(OPERATION, f"attend_{name}")
    def attend(call, op, tid, n):
        """queries x (T, H, d) over the cached keys and values -> y (T, H, d)."""
        d, G, group = op.head_dim, op.kv_heads, op.heads // op.kv_heads
        q = call.scratch + tid * call.scratch_stride
        positions = q + 4 * ROWS * d
        total = positions + 64
        mine = total + partial_bytes(d)
        scratch = mine + partial_bytes(d)
        passed, tiles_passed, parts_passed = i8(0), i8(0), i8(0)
        unit = claim(call)
        for s in range(call.n_spans):
            span = call.spans[s]
            doses = span.doses[op.layer * call.sites]
            noisy = doses[op.site].theta > 0.0 or doses[op.value_site].theta > 0.0
            size = (
                min(ROWS, group) if noisy else ROWS
            )  # under noise a tile holds one token: each has its own noise
            per_token = (group + size - 1) // size
            tiles = span.count * per_token if noisy else (span.count * group + ROWS - 1) // ROWS
            last = call.tokens[span.first + span.count - 1].position
            chunk0 = max(0, last - op.window + 1) // CHUNK
            split = last // CHUNK - chunk0 + 1 if span.count == 1 else 1
            while unit < passed + G * tiles * split:
                u = unit - passed
                g, tile, c = u // (tiles * split), u // split % tiles, u % split
                if noisy:
                    first_row = tile // per_token * group + tile % per_token * size
                    rows = min(size, group - tile % per_token * size)
                else:
                    first_row, rows = tile * size, min(size, span.count * group - tile * size)
                for r in range(ROWS):  # rows past the last one repeat it: computed, never written
                    at = first_row + min(r, rows - 1)
                    token, h = span.first + at // group, g * group + at % group
                    store_i32(positions + 4 * r, i4(call.tokens[token].position))
                    source = op.x.data + token * op.x.stride + 4 * d * h
                    for j in range(0, 4 * d, 64):
                        store(q + 4 * d * r + j, load(source + j) * f4(op.scale))
                low = call.tokens[span.first + first_row // group].position
                high = call.tokens[span.first + (first_row + rows - 1) // group].position
                c0 = max(0, low - op.window + 1) // CHUNK + c
                c1 = c0 if split > 1 else high // CHUNK
                if split == 1:
                    clear(total, d)
                measured = i8(0)
                if span.measured != 0 and tile % per_token == 0:
                    measured = span.measured + 24 * tid * call.sites
                for at in range(c0, c1 + 1):
                    part = mine
                    if split > 1:
                        part = call.parts + partial_bytes(d) * (parts_passed + u)
                    start, end = at * CHUNK, min(high, (at + 1) * CHUNK - 1)
                    if rows == 1:
                        chunk(
                            tile1(),
                            op,
                            span,
                            doses,
                            g,
                            start,
                            end,
                            low,
                            noisy,
                            measured,
                            q,
                            positions,
                            part,
                            scratch,
                        )
                    elif rows <= 4:
                        chunk(
                            tile4(),
                            op,
                            span,
                            doses,
                            g,
                            start,
                            end,
                            low,
                            noisy,
                            measured,
                            q,
                            positions,
                            part,
                            scratch,
                        )
                    else:
                        chunk(
                            tile8(),
                            op,
                            span,
                            doses,
                            g,
                            start,
                            end,
                            low,
                            noisy,
                            measured,
                            q,
                            positions,
                            part,
                            scratch,
                        )
                    if noisy and tile % per_token == 0:
                        lowest = max(start, low - op.window + 1)
                        touched = load_i32(span.awake + 4 * end + 4) - load_i32(span.awake + 4 * lowest)
                        if touched > 0:
                            if doses[op.site].theta > 0.0:
                                atomic_add(span.moved + 8 * op.site, touched)
                            if doses[op.value_site].theta > 0.0:
                                atomic_add(span.moved + 8 * op.value_site, touched)
                    if split == 1:
                        merge(total, part, rows, d)
                if split == 1:
                    write_output(op, total, span.first, first_row, rows, g)
                else:  # who finishes a tile's last chunk merges them all, in order
                    counter = call.part_counts + 8 * (tiles_passed + g * tiles + tile)
                    if atomic_add(counter, 1) == split - 1:
                        atomic_store(counter, 0)
                        clear(total, d)
                        for at in range(split):
                            merge(total, call.parts + partial_bytes(d) * (parts_passed + u - c + at), rows, d)
                        write_output(op, total, span.first, first_row, rows, g)
                unit = claim(call)
            passed += G * tiles * split
            if split > 1:
                tiles_passed += G * tiles
                parts_passed += G * tiles * split

    return attend


ATTEND = {
    "f16": _attend("f16", load_halves, 2),
    "f32": _attend("f32", load, 4),
}
