"""Tiny checkpoints with random weights, one for each thing an architecture can ask for, the same everywhere.

The weights come from an integer hash of (spec, tensor, index), not from a library's generator, so that the
committed golden logits stay valid for ever. The safetensors files are written here by hand, bf16 included, so
that no reader is tested by its own writer. Scales make attention far from uniform and logits spread by 2.
"""

import json
import zlib
from pathlib import Path

import numpy as np

VOCAB = 96


def _config(model_type: str, **fields) -> dict:
    names = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "gpt2": "GPT2LMHeadModel"}
    return {"architectures": [names[model_type]], "model_type": model_type, "vocab_size": VOCAB} | fields


def _llama(hidden: int, heads: int, kv_heads: int, model_type: str = "llama", **fields) -> dict:
    """A config.json in transformers v5 spelling, 2 layers; `fields` override."""
    return _config(model_type) | {
        "hidden_size": hidden,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **fields,
    }


def _v4(config: dict) -> dict:
    """The same config as transformers 4 spelled it: rope_theta and rope_scaling apart, torch_dtype."""
    rope = dict(config.pop("rope_parameters"))
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    return config


def _rope(rope_type: str, **fields) -> dict:
    return {"rope_type": rope_type, "rope_theta": 10000.0, **fields}


def _v4_typed(config: dict) -> dict:
    """The oldest spelling: `type` where `rope_type` came later."""
    config = _v4(config)
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    return config


def _gpt2(embd: int, heads: int, **fields) -> dict:
    return _config("gpt2") | {
        "n_embd": embd,
        "n_head": heads,
        "n_layer": 2,
        "n_positions": 64,
        "n_ctx": 64,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "bos_token_id": 95,
        "eos_token_id": 95,
        **fields,
    }


LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


def _yarn(kv_heads: int, **fields) -> dict:
    rope = _rope("yarn", factor=4.0, original_max_position_embeddings=64, **fields)
    return _llama(32, 2, kv_heads, max_position_embeddings=256, rope_parameters=rope)


SPECS: dict[str, dict] = {  # name: its config.json
    "llama-mha": _llama(32, 4, 4),
    "llama-gqa": _v4(_llama(48, 6, 2, num_hidden_layers=3, intermediate_size=100, tie_word_embeddings=True)),
    "llama-mqa": _llama(32, 4, 1, dtype="float16"),
    "llama-head16": _llama(48, 6, 2, head_dim=16),
    "llama-head12": _v4(_llama(48, 3, 3, head_dim=12, tie_word_embeddings=True)),
    "llama-bias": _llama(
        40, 5, 5, intermediate_size=172, attention_bias=True, mlp_bias=True, dtype="bfloat16"
    ),
    "llama-sharded": _v4(_llama(32, 4, 2, num_hidden_layers=3, dtype="bfloat16")),
    "llama-linear": _v4_typed(_llama(32, 4, 2, rope_parameters=_rope("linear", factor=4.0))),
    "llama-linear-v5": _llama(32, 4, 2, rope_parameters=_rope("linear", factor=2.5)),
    "llama-dynamic": _v4_typed(
        _llama(32, 4, 2, max_position_embeddings=24, rope_parameters=_rope("dynamic", factor=2.0))
    ),
    "llama-dynamic-v5": _llama(
        32, 2, 2, max_position_embeddings=16, rope_parameters=_rope("dynamic", factor=4.0)
    ),
    "llama-llama3": _llama(32, 2, 1, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-llama3-v4": _v4(_llama(32, 2, 2, rope_parameters=LLAMA3 | {"rope_theta": 500000.0})),
    "llama-yarn": _yarn(2),
    "llama-yarn-mscale": _v4(_yarn(1, mscale=1.0, mscale_all_dim=0.5, beta_fast=8.0, beta_slow=2.0)),
    "llama-yarn-factor": _yarn(2, attention_factor=0.8, truncate=False),
    "mistral-window": _v4(_llama(32, 4, 2, "mistral", sliding_window=16)),
    "mistral-full": _llama(48, 6, 3, "mistral", head_dim=16, sliding_window=None, dtype="bfloat16"),
    "gpt2": _gpt2(40, 4),
    "gpt2-prefix": _gpt2(48, 3, n_inner=100, activation_function="gelu", dtype="float16"),
}

SHARDS = {"llama-sharded": 3}  # files a checkpoint is split into, with an index; the others are one file
PREFIX = {"gpt2-prefix": "transformer."}  # before every tensor's name; official GPT-2 files have none
LENGTHS = {"mistral-window": 90}  # positions in the golden logits; the others have 40


def ids(name: str) -> np.ndarray:
    """The token ids (T,) int64 that the golden logits of a spec belong to."""
    n = LENGTHS.get(name, 40)
    return (3 + counter_hash(f"{name}/ids", n) % np.uint64(VOCAB - 4)).astype(np.int64)


def weights(name: str) -> dict[str, np.ndarray]:
    """Every parameter of a spec by its name in the file: float32, rounded to what the stored dtype holds."""
    config = SPECS[name]
    table = _gpt2_table(config) if config["model_type"] == "gpt2" else _llama_table(config)
    made = {}
    for tensor, (shape, mean, std) in table.items():
        values = mean + std * uniform(f"{name}/{tensor}", shape)
        stored = decode(encode(values, _dtype(config)), _dtype(config))
        made[PREFIX.get(name, "") + tensor] = stored.reshape(shape)
    return made


def weights_crc(name: str) -> int:
    """A checksum of all weights, to tell when golden logits no longer belong to them."""
    crc = 0
    for tensor, values in weights(name).items():
        crc = zlib.crc32(values.astype("<f4").tobytes(), zlib.crc32(tensor.encode(), crc))
    return crc


def build(name: str, folder: Path) -> Path:
    """Write config.json and the safetensors of a spec into `folder`, which is made if missing; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = SPECS[name]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {t: (_dtype(config), w.shape, encode(w, _dtype(config))) for t, w in weights(name).items()}
    tensors |= _buffers(name, config)
    n = SHARDS.get(name, 1)
    if n == 1:
        _write_safetensors(folder / "model.safetensors", tensors)
        return folder
    names, index = sorted(tensors), {}
    for i in range(n):
        file = f"model-{i + 1:05}-of-{n:05}.safetensors"
        _write_safetensors(folder / file, {t: tensors[t] for t in names[i::n]})
        index |= dict.fromkeys(names[i::n], file)
    total = sum(len(data) for _, _, data in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    )
    return folder


def _llama_table(c: dict) -> dict[str, tuple[tuple, float, float]]:
    """tensor: (shape, mean, std) of a Llama or Mistral checkpoint."""
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    d = c.get("head_dim") or hidden // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    table = {"model.embed_tokens.weight": ((VOCAB, hidden), 0, 2 * hidden**-0.5)}
    for i in range(c["num_hidden_layers"]):
        maps = {  # name: rows, columns, gain
            "self_attn.q_proj": (q, hidden, 1.6),
            "self_attn.k_proj": (kv, hidden, 1.6),
            "self_attn.v_proj": (kv, hidden, 1),
            "self_attn.o_proj": (hidden, q, 1),
            "mlp.gate_proj": (inner, hidden, 1),
            "mlp.up_proj": (inner, hidden, 1),
            "mlp.down_proj": (hidden, inner, 1),
        }
        for name, (rows, columns, gain) in maps.items():
            table[f"model.layers.{i}.{name}.weight"] = ((rows, columns), 0, gain * columns**-0.5)
            if c.get("attention_bias" if name.startswith("self_attn") else "mlp_bias"):
                table[f"model.layers.{i}.{name}.bias"] = ((rows,), 0, 0.3)
        table[f"model.layers.{i}.input_layernorm.weight"] = ((hidden,), 1, 0.2)
        table[f"model.layers.{i}.post_attention_layernorm.weight"] = ((hidden,), 1, 0.2)
    table["model.norm.weight"] = ((hidden,), 1, 0.2)
    if not c["tie_word_embeddings"]:
        table["lm_head.weight"] = ((VOCAB, hidden), 0, 2 * hidden**-0.5)
    return table


def _gpt2_table(c: dict) -> dict[str, tuple[tuple, float, float]]:
    """tensor: (shape, mean, std) of a GPT-2 checkpoint; Conv1D weights are (in, out)."""
    embd, inner = c["n_embd"], c["n_inner"] or 4 * c["n_embd"]
    table = {
        "wte.weight": ((VOCAB, embd), 0, 2 * embd**-0.5),
        "wpe.weight": ((c["n_positions"], embd), 0, embd**-0.5),
        "ln_f.weight": ((embd,), 1, 0.2),
        "ln_f.bias": ((embd,), 0, 0.1),
    }
    for i in range(c["n_layer"]):
        maps = {
            "attn.c_attn": (embd, 3 * embd, 1.4),
            "attn.c_proj": (embd, embd, 1),
            "mlp.c_fc": (embd, inner, 1.5),
            "mlp.c_proj": (inner, embd, 1),
        }
        for name, (rows, columns, gain) in maps.items():
            table[f"h.{i}.{name}.weight"] = ((rows, columns), 0, gain * rows**-0.5)
            table[f"h.{i}.{name}.bias"] = ((columns,), 0, 0.3)
        for norm in ("ln_1", "ln_2"):
            table[f"h.{i}.{norm}.weight"] = ((embd,), 1, 0.2)
            table[f"h.{i}.{norm}.bias"] = ((embd,), 0, 0.1)
    return table


def _buffers(name: str, c: dict) -> dict[str, tuple[str, tuple, bytes]]:
    """The causal masks GPT-2 files carry though nobody reads them: f32 in the official ones, u8 in others."""
    if c["model_type"] != "gpt2":
        return {}
    n, prefix = c["n_positions"], PREFIX.get(name, "")
    dtype, kind = ("U8", np.uint8) if prefix else ("F32", np.float32)
    mask, minus = np.tril(np.ones((n, n), kind)).tobytes(), np.float32(-1e4).tobytes()
    made = {}
    for i in range(c["n_layer"]):
        made[f"{prefix}h.{i}.attn.bias"] = (dtype, (1, 1, n, n), mask)
        made[f"{prefix}h.{i}.attn.masked_bias"] = ("F32", (), minus)
    return made


def _dtype(c: dict) -> str:
    stored = c.get("dtype") or c.get("torch_dtype") or "float32"
    return {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[stored]


def encode(values: np.ndarray, dtype: str) -> bytes:
    """values -> little-endian bytes in a safetensors dtype, rounded to nearest even."""
    if dtype == "BF16":
        bits = values.astype("<f4").view("<u4")
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def decode(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def _write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple, bytes]]) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, offset + len(data))}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(d for _, _, d in tensors.values()))


def counter_hash(name: str, n: int) -> np.ndarray:
    """splitmix64 over a counter that starts at a place given by the name -> (n,) uint64."""
    z = np.arange(1, n + 1, dtype=np.uint64) + np.array([zlib.crc32(name.encode()) << 32], np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def uniform(name: str, shape: tuple) -> np.ndarray:
    """Float32 numbers of mean 0 and variance 1, from a name; 24 bits each, so the conversion is exact."""
    u = (counter_hash(name, int(np.prod(shape))) >> np.uint64(40)).astype(np.float64) * 2.0**-24  # [0, 1)
    return (np.sqrt(12) * (u - 0.5)).astype(np.float32).reshape(shape)
