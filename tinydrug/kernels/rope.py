"""Rotary position embedding, and the writing of keys and values into the cache."""

from tinydrug.kernels.jit import inline
from tinydrug.kernels.tables import operation, share
from tinydrug.kernels.vectors import load, load_f32, store, store_f16, store_f32, store_halves


@inline
def my_groups(call, op, tid, n):
    """The (token, kv head) pairs lo .. hi of this thread. Everything between the projections and attention
    splits this way, so a thread only ever needs what it wrote itself."""
    return share(call.n_tokens * op.kv_heads, tid, n)


@operation
def rope(call, op, tid, n):
    """x (T, H, d) in place: halves (a, b) -> (a cos - b sin, b cos + a sin), as in Hugging Face's Llama. z: a
    row a position, d/2 cosines and d/2 sines, the attention factor of the rope type multiplied in."""
    d, group = op.head_dim, op.heads // op.kv_heads
    lo, hi = my_groups(call, op, tid, n)
    for u in range(lo, hi):
        token, g = u // op.kv_heads, u % op.kv_heads
        table = op.z.data + op.z.stride * call.tokens[token].position
        for h in range(g * group, (g + 1) * group):
            x = op.x.data + token * op.x.stride + 4 * d * h
            for j in range(0, 2 * d, 64):
                a, b = load(x + j), load(x + 2 * d + j)
                cos, sin = load(table + j), load(table + 2 * d + j)
                store(x + j, a * cos - b * sin)
                store(x + 2 * d + j, b * cos + a * sin)


@inline
def key_address(span, op, g, slot):
    """Of component 0 of the key in this slot: (L, G, S/16, d, 16), so that a vector load takes one component
    of 16 positions."""
    row = (op.layer * op.kv_heads + g) * span.slots + slot // 16 * 16
    return span.keys + op.cell * (row * op.head_dim + slot % 16)


@inline
def value_address(span, op, g, slot):
    """Of the value in this slot: (L, G, S, d)."""
    return span.values + op.cell * op.head_dim * ((op.layer * op.kv_heads + g) * span.slots + slot)


@operation
def write_cache(call, op, tid, n):
    """keys x (T, G, d) and values z (T, G, d) into the slots of their positions, as f16 or f32."""
    d = op.head_dim
    lo, hi = my_groups(call, op, tid, n)
    for u in range(lo, hi):
        token, g = u // op.kv_heads, u % op.kv_heads
        span = call.spans[call.tokens[token].span]
        slot = call.tokens[token].position % span.slots
        key, value = key_address(span, op, g, slot), value_address(span, op, g, slot)
        k = op.x.data + token * op.x.stride + 4 * d * g
        v = op.z.data + token * op.z.stride + 4 * d * g
        if op.cell == 2:
            for i in range(d):
                store_f16(key + 32 * i, load_f32(k + 4 * i))
            for j in range(0, d, 16):
                store_halves(value + 2 * j, load(v + 4 * j))
        else:
            for i in range(d):
                store_f32(key + 64 * i, load_f32(k + 4 * i))
            for j in range(0, d, 16):
                store(value + 4 * j, load(v + 4 * j))
