"""Checkpoints with random weights at real shapes: for speed and memory, where what the model says does not
matter."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape

import tinydrug
from bench.shapes import SHAPES, Shape
from tinydrug.formats.weights import QUANTS

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
KINDS = {
    "q4": "Q4_0",
    "q8": "Q8_0",
    "q4_0": "Q4_0",
    "q8_0": "Q8_0",
    "f16": "F16",
    "bf16": "BF16",
}  # of a spec -> of the GGUF that peers run
BLOCKS = {"Q8_0": (34, 127.0), "Q4_0": (18, 8.0)}  # bytes of a block of 32, and what its largest value is
POOL = 1 << 24  # random numbers that are used over and over


@contextmanager
def scratch_folder(kept: Path | None) -> Iterator[Path]:
    """The folder for models: the one given, or one that goes away again."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="tinydrug-bench-") as folder:
        yield Path(folder)


def gguf_model(spec: str, scratch: Path) -> Path:
    """The GGUF of `NAME:KIND`, as in llama-1.1b:q4; made if it is not there."""
    name, _, kind = spec.partition(":")
    path = scratch / f"{name}-{KINDS[kind]}.gguf"
    if not path.exists():
        partial = path.with_name(f"{path.name}.partial")
        write_gguf(SHAPES[name], KINDS[kind], partial)
        partial.rename(path)
    return path


def our_model(spec: str, scratch: Path) -> Path:
    """What we run for `NAME:KIND`: of q4, q8 what `--quant` makes of bf16, packed; else the peers' GGUF."""
    name, _, kind = spec.partition(":")
    if kind not in QUANTS:
        return gguf_model(spec, scratch)
    folder = scratch / f"{name}-{kind}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=scratch) as source:
            tinydrug.quantize(write_safetensors(SHAPES[name], Path(source) / name), quant=kind, output=folder)
    return folder


def write_gguf(shape: Shape, kind: str, path: Path) -> Path:
    """A Llama GGUF with matrices of this kind; beside blocks a tied embedding is Q8_0, as in practice."""
    pool = np.random.default_rng(0).bytes(POOL)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.D)
    writer.add_block_count(shape.L)
    writer.add_feed_forward_length(shape.F)
    writer.add_head_count(shape.H)
    writer.add_head_count_kv(shape.G)
    writer.add_rope_dimension_count(shape.d)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    words = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]]
    words += [f"▁w{i}" for i in range(shape.V - len(words))]
    writer.add_token_list(words)
    writer.add_token_scores([float(-i) for i in range(shape.V)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (shape.V - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(name, size, how):
        data, as_type = _rows(pool, size, how), GGMLQuantizationType[how]
        assert quant_shape_to_byte_shape(size, as_type) == data.shape
        writer.add_tensor(f"{name}.weight", data, raw_dtype=as_type)

    matrix("token_embd", (shape.V, shape.D), "Q8_0" if shape.tied and kind in BLOCKS else kind)
    if not shape.tied:
        matrix("output", (shape.V, shape.D), kind)
    writer.add_tensor("output_norm.weight", np.ones(shape.D, np.float32))
    for i in range(shape.L):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(shape.D, np.float32))
        for name, size in shape.matrices().items():
            matrix(f"blk.{i}.{GGUF_NAMES[name]}", size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _rows(pool: bytes, size: tuple[int, int], kind: str) -> np.ndarray:
    """Random weights of about 0.02, as rows of bytes: floats, or blocks of uniform codes with scales."""
    if kind not in BLOCKS:
        values = np.resize(np.frombuffer(pool, np.int16), size) * np.float32(0.035 / 32768)
        halves = values.astype(np.float16) if kind == "F16" else (values.view(np.uint32) >> 16).astype("<u2")
        return halves.view(np.uint8)
    nbytes, top = BLOCKS[kind]
    blocks = np.resize(np.frombuffer(pool, np.uint8), (size[0] * size[1] // 32, nbytes))
    blocks[:, :2] = np.frombuffer(np.float16(0.035 / top).tobytes(), np.uint8)
    return blocks.reshape(size[0], -1)


def write_safetensors(shape: Shape, folder: Path, shard_layers: int = 8) -> Path:
    """A Llama folder (with a window: Mistral) in bf16, in shards; by hand, since NumPy has no bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).standard_normal(POOL // 4, np.float32) * 0.02
    pattern = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bf16 by truncation
    ends = ("model.embed_tokens",) if shape.tied else ("model.embed_tokens", "lm_head")
    shards = [{name: (shape.V, shape.D) for name in ends} | {"model.norm": (shape.D,)}]
    for first in range(0, shape.L, shard_layers):
        shard = {}
        for i in range(first, min(first + shard_layers, shape.L)):
            shard |= {f"model.layers.{i}.{name}": size for name, size in shape.matrices().items()}
            for name in ("input_layernorm", "post_attention_layernorm"):
                shard[f"model.layers.{i}.{name}"] = (shape.D,)
        shards.append(shard)
    names = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        header, at = {}, 0
        for name, size in shard.items():
            nbytes = 2 * int(np.prod(size))
            header[f"{name}.weight"] = {"dtype": "BF16", "shape": size, "data_offsets": [at, at + nbytes]}
            names[f"{name}.weight"] = file
            at += nbytes
        text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for size in shard.values():
                left = 2 * int(np.prod(size))
                if len(size) == 1:  # norms: ones
                    out.write(b"\x80\x3f" * size[0])
                    continue
                while left:
                    left -= out.write(pattern[: min(left, len(pattern))])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text(json.dumps({
        "model_type": "mistral" if shape.window else "llama",
        "architectures": ["MistralForCausalLM" if shape.window else "LlamaForCausalLM"],
        "hidden_size": shape.D, "num_hidden_layers": shape.L, "num_attention_heads": shape.H,
        "num_key_value_heads": shape.G, "head_dim": shape.d, "intermediate_size": shape.F,
        "vocab_size": shape.V, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 8192,
        "sliding_window": shape.window, "hidden_act": "silu", "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }))  # fmt: skip
    _write_tokenizer(shape, folder)
    return folder


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    """A word for every id."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(shape.V)} | {"<unk>": 0}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.decoder = ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
