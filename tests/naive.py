"""The second reference: every formula in float64 NumPy, written from its definition, one query at a time.

Letters: T tokens, S keys, D hidden size, F MLP size, H query heads, G key/value heads, d head size. Noise is
a hook

    noise(site, layer, x, positions, query=None) -> what x becomes

with x of shape (T, D) at H, (T, F) at M, (T, H, d) at Q and A, (T, G, d) at pK, and positions (T,) of its
rows. At K and V it is called once for every reading token: x is all keys (or values) up to it, (S, G, d),
positions (S,) are theirs and `query` is the reader's. So a draw belongs to (layer, head, key position, query
position), and what is cached stays as it was.
"""

import math
from collections.abc import Callable

import numpy as np

# --- norms, activations, softmax


def rms_norm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """x (T, D), w (D,) -> (T, D)."""
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * w


def layer_norm(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float) -> np.ndarray:
    """x (T, D), w (D,), b (D,) -> (T, D); the variance is the biased one."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + eps) * w + b


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    """The exact one: x times the normal distribution's cumulative probability."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GPT-2's own approximation, `gelu_new` in its config."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# --- rotary positions


def rope_fields(config: dict) -> dict:
    """The rope parameters of a config.json in transformers 4 or 5 spelling, with rope_type and rope_theta."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def inv_freq(config: dict, length: int = 0) -> tuple[np.ndarray, float]:
    """Radians a position (d/2,), and the factor of cos and sin; only dynamic asks for the `length` so far."""
    rope = rope_fields(config)
    d = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    exponents = np.arange(0, d, 2) / d
    longest, base, kind = config["max_position_embeddings"], rope["rope_theta"], rope["rope_type"]
    if kind == "dynamic":  # the base grows with the length, once that is beyond what the model was trained on
        growth = rope["factor"] * max(length, longest) / longest - (rope["factor"] - 1)
        return (base * growth ** (d / (d - 2))) ** -exponents, 1.0
    freq = base**-exponents
    if kind == "linear":
        return freq / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3(freq, rope, rope.get("original_max_position_embeddings", longest)), 1.0
    if kind == "yarn":
        return _yarn(freq, rope, rope.get("original_max_position_embeddings", longest), d)
    assert kind == "default", kind
    return freq, 1.0


def _llama3(freq: np.ndarray, rope: dict, trained: int) -> np.ndarray:
    """Long waves are stretched by the factor, short ones not; between, the turns they make decide."""
    turns = trained * freq / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - blend) * freq / rope["factor"] + blend * freq


def _yarn(freq: np.ndarray, rope: dict, trained: int, d: int) -> tuple[np.ndarray, float]:
    """Dimensions that turn often keep their frequency, those that seldom do are stretched; a ramp between."""
    factor = rope["factor"]

    def dimension(turns):  # which makes this many turns in the trained length
        return d * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    first, last = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    stretched = np.clip((np.arange(d // 2) - first) / max(last - first, 0.001), 0, 1)

    def mscale(weight):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return freq * (1 - stretched) + freq / factor * stretched, mscale(1) if scale is None else scale


def rope(x: np.ndarray, positions: np.ndarray, freq: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """x (T, H, d), positions (T,), freq (d/2,) or (T, d/2) -> (T, H, d); element i is paired with i + d/2."""
    angle = (positions[:, None] * freq)[:, None]  # (T, 1, d/2)
    a, b = np.split(x, 2, -1)
    return scale * np.concatenate(
        (a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)), -1
    )


# --- attention


def attend(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    position: int,
    positions: np.ndarray,
    window: int | None = None,
) -> np.ndarray:
    """One query: q (H, d) at `position`, keys and values (S, G, d) at positions (S,) -> (H, d).

    It sees positions up to its own and, with a window, only the last `window` of them, its own included.
    """
    seen = positions <= position
    if window is not None:
        seen &= positions > position - window
    out = np.empty_like(q)
    for h in range(len(q)):
        g = h * keys.shape[1] // len(q)
        weights = softmax(keys[seen, g] @ q[h] / math.sqrt(q.shape[1]))
        out[h] = weights @ values[seen, g]
    return out


def self_attention(q, k, v, positions, layer, noise, window=None) -> np.ndarray:
    """q (T, H, d), k and v (T, G, d) from position 0 on -> (T, H, d); K and V noise is each query's own."""
    rows = []
    for t, position in enumerate(positions):
        cached = positions[: t + 1]
        keys = noise("K", layer, k[: t + 1].copy(), cached, query=position)
        values = noise("V", layer, v[: t + 1].copy(), cached, query=position)
        rows.append(attend(q[t], keys, values, position, cached, window))
    return np.stack(rows)


# --- noise


def sober(
    site: str, layer: int, x: np.ndarray, positions: np.ndarray, query: int | None = None
) -> np.ndarray:
    """The hook that adds nothing."""
    return x


def rotate(x: np.ndarray, r: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """x (..., d) turned by phi (...) radians towards r (..., d), its length kept.

    Where there is no direction to turn in (x is zero, r is parallel to x, d is 1) x comes back as it was.
    """
    x, r, phi = np.broadcast_arrays(x, r, np.asarray(phi, float)[..., None])
    out = np.array(x, np.float64)
    for i in np.ndindex(x.shape[:-1]):
        length = math.sqrt(x[i] @ x[i])
        if length == 0:
            continue
        unit = x[i] / length
        o = r[i] - unit * (r[i] @ unit)
        o_length = math.sqrt(o @ o)
        if x.shape[-1] > 1 and o_length > 1e-12 * math.sqrt(r[i] @ r[i]):
            out[i] = x[i] * math.cos(phi[i][0]) + length * o / o_length * math.sin(phi[i][0])
    return out


def add(x: np.ndarray, r: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """x (..., d) plus phi (...) times its own length in the direction r (..., d); the length is not kept."""
    length, r_length = (np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, r))
    return x + np.asarray(phi, float)[..., None] * length * r / np.where(r_length > 0, r_length, 1)


def nlerp(x: np.ndarray, r: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """x (..., d) plus phi (...) times |x| o/|o|, o the part of r orthogonal to x; then as long as x again."""
    moved = x + np.asarray(phi, float)[..., None] * rotate(x, r, math.pi / 2)
    length, longer = (np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, moved))
    return moved * length / np.where(longer > 0, longer, 1)


FORMS = {"rotation": rotate, "L2": add, "NL": nlerp}  # by the name a dose has for it


# --- block quantisation, by ggml's rules; float32 where ggml's result depends on it


LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])  # of iq4_nl


def hadamard(x: np.ndarray) -> np.ndarray:
    """x (..., K), K a multiple of 32: every 256 columns times a Hadamard matrix that keeps lengths, what is
    left in runs of the power of two that divides it. In the type of x, in the kernels' order; its own
    inverse."""
    out = np.array(x)
    for first in range(0, x.shape[-1], 256):
        part, n = out[..., first : first + 256], 1
        while part.shape[-1] % (2 * n) == 0:
            pairs = part.reshape(*part.shape[:-1], -1, 2, n)
            part = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2)
            part, n = part.reshape(pairs.shape[:-3] + (-1,)), 2 * n
        out[..., first : first + 256] = part * x.dtype.type(n**-0.5)
    return out


def activations(x: np.ndarray, group: int, spread: bool) -> np.ndarray:
    """Activations x (T, k) as integer kernels see them, float64; to be spread, k is a multiple of 32."""
    return hadamard(int8(hadamard(x.astype(np.float32)), group)) if spread else int8(x, group)


def int8(x: np.ndarray, group: int) -> np.ndarray:
    """x (T, k), every `group` columns of a row rounded to int8 with a float32 scale; float64."""
    groups = np.pad(x, ((0, 0), (0, -x.shape[1] % group))).reshape(len(x), -1, group).astype(np.float32)
    top = np.abs(groups).max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(top > 0, np.float32(127) / top, np.float32(0))
    rounded = np.rint(groups * inverse).astype(np.float64) * (top * np.float32(1 / 127)).astype(np.float64)
    return rounded.reshape(len(x), -1)[:, : x.shape[1]]


SHRINKS = np.float32([1, 0.85, 0.68, 0.5])  # of the levels, in the tables of q4_128
TABLES = np.rint(np.float32(LEVELS) * SHRINKS[:, None])  # (4, 16)


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """x (..., K), K a multiple of 32, through our q8_256 or q4_128 -> (..., K) float64: see
    kernels/blocks.py."""
    group, round_group, turn = {8: (256, _even_steps, hadamard), 4: (128, _levels, np.array)}[bits]
    out = turn(np.asarray(x, np.float32)).astype(np.float64)
    for first in range(0, x.shape[-1], group):
        part = out[..., first : first + group]
        part[:] = np.apply_along_axis(round_group, -1, part)
    return turn(out)


def _even_steps(x: np.ndarray) -> np.ndarray:
    """The extreme becomes 127 steps, in float32 as the kernels have it."""
    top = np.abs(x).max().astype(np.float32)
    steps = np.rint(x.astype(np.float32) * (np.float32(127) / top)) if top else x
    return steps * np.float64(np.float16(top / np.float32(127)))


def _levels(x: np.ndarray) -> np.ndarray:
    """The extreme becomes the first level or the last, or a bit more; then the scale of least squares."""
    found, extreme = [(np.inf, 0.0)], x.max() if x.max() > -x.min() else x.min()
    for end in (-127, 113, -137, 121) if extreme else ():
        q = _by_tables(x * end / extreme, 1)
        found.append((np.square(x - (q @ x / (q @ q)) * q).sum(), q @ x / (q @ q)))
    scale = np.float64(np.float16(min(found)[1]))
    return scale * _by_tables(x / scale if scale else x, 3)


def _by_tables(x: np.ndarray, tables: int) -> np.ndarray:
    """Every 8 numbers in the smallest table that reaches about as far, or of so many tables up to it in that
    with the least squares of errors."""
    blocks = x.reshape(-1, 8)
    reach = np.maximum(blocks.max(-1) / 113, blocks.min(-1) / -127) / 1.1
    first = np.maximum((SHRINKS >= reach[:, None]).sum(-1) - 1, 0)
    numbers = np.abs(x.reshape(-1, 1, 8, 1) / SHRINKS[:, None, None] - LEVELS).argmin(-1)  # (n, 4, 8)
    q = np.take_along_axis(np.broadcast_to(TABLES, (len(numbers), 4, 16)), numbers, 2)
    errors = np.square(q - blocks[:, None]).sum(-1)
    back = first[:, None] - np.arange(4)  # how many tables before the smallest
    best = np.where((back >= 0) & (back < tables), errors, np.inf).argmin(1)
    return q[np.arange(len(q)), best].reshape(-1)


# --- whole models


def llama(config: dict, w: dict, ids: np.ndarray, noise: Callable = sober, whole: bool = False) -> np.ndarray:
    """ids (T,) -> logits (T, V) of a Llama or Mistral.

    With dynamic rope a token is rotated for the length at its own time; `whole` rotates all for the final
    length, as transformers does in a single pass.
    """
    H, G = config["num_attention_heads"], config["num_key_value_heads"]
    eps, window = config["rms_norm_eps"], config.get("sliding_window")
    T, positions = len(ids), np.arange(len(ids))
    tables = [inv_freq(config, T if whole else t + 1) for t in range(T)]
    freq, scale = np.stack([f for f, _ in tables]), tables[0][1]  # (T, d/2)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    x = w["embed_tokens.weight"][ids]  # (T, D)
    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}"
        h = noise("H", i, rms_norm(x, w[f"{layer}.input_layernorm.weight"], eps), positions)
        q = linear(h, f"{layer}.self_attn.q_proj").reshape(T, H, -1)
        k = linear(h, f"{layer}.self_attn.k_proj").reshape(T, G, -1)
        v = linear(h, f"{layer}.self_attn.v_proj").reshape(T, G, -1)
        q = rope(noise("Q", i, q, positions), positions, freq, scale)
        k = rope(noise("pK", i, k, positions), positions, freq, scale)
        y = noise("A", i, self_attention(q, k, v, positions, i, noise, window), positions)
        x = x + linear(y.reshape(T, -1), f"{layer}.self_attn.o_proj")
        h = rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"], eps)
        gate, up = linear(h, f"{layer}.mlp.gate_proj"), linear(h, f"{layer}.mlp.up_proj")
        x = x + linear(noise("M", i, silu(gate) * up, positions), f"{layer}.mlp.down_proj")
    head = w["embed_tokens.weight"] if config["tie_word_embeddings"] else w["lm_head.weight"]
    return rms_norm(x, w["norm.weight"], eps) @ head.T


def gpt2(config: dict, w: dict, ids: np.ndarray, noise: Callable = sober) -> np.ndarray:
    """ids (T,) -> logits (T, V); Conv1D weights are (in, out); nothing stands between pK and the cache."""
    H, eps = config["n_head"], config["layer_norm_epsilon"]
    activate = {"gelu_new": gelu_tanh, "gelu": gelu}[config["activation_function"]]
    T, positions = len(ids), np.arange(len(ids))

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def norm(x, name):
        return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], eps)

    x = w["wte.weight"][ids] + w["wpe.weight"][:T]  # (T, D)
    for i in range(config["n_layer"]):
        h = noise("H", i, norm(x, f"h.{i}.ln_1"), positions)
        q, k, v = np.split(linear(h, f"h.{i}.attn.c_attn").reshape(T, 3 * H, -1), 3, 1)
        q = noise("Q", i, q, positions)
        k = noise("pK", i, k, positions)
        y = noise("A", i, self_attention(q, k, v, positions, i, noise), positions)
        x = x + linear(y.reshape(T, -1), f"h.{i}.attn.c_proj")
        h = activate(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"))
        x = x + linear(noise("M", i, h, positions), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def canonical(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors -> the same in float64, their names without model. or transformer. in front."""
    return {
        name.removeprefix("model.").removeprefix("transformer."): np.asarray(x, np.float64)
        for name, x in weights.items()
    }


MODELS = {"llama": llama, "mistral": llama, "gpt2": gpt2}  # by model_type
