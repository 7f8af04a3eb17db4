"""GGUF files: typed metadata, a table of tensors and their bytes; and the metadata told as a config.json."""

import struct
from reprlib import repr as short

import numpy as np

from tinydrug.errors import BadModelFile, UnsupportedModel
from tinydrug.formats.tensor import KINDS, Tensor, byte_size, check_name, read_bytes


def read(path, mmap: bool = True) -> tuple[dict, dict[str, Tensor]]:
    """(metadata, tensors) of a file; the tensors are views of one mapping (mmap=False: of one copy).

    BadModelFile for anything that is not a sound GGUF file; UnsupportedModel for versions, byte orders and
    element types that are not known here.
    """
    path = str(path)
    content, mapping = read_bytes(path, mapped=mmap)
    scan = _Scanner(path, content)
    n_tensors, n_keys = _head(path, scan)
    metadata = _metadata(path, scan, n_keys)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise BadModelFile(path, f"general.alignment is {short(alignment)}, not a power of two")
    table = _table(path, scan, n_tensors)

    start, end, previous = -(-scan.position // alignment) * alignment, 0, ""
    for name, (_, _, offset, size) in sorted(table.items(), key=lambda item: item[1][2:]):
        if offset % alignment:
            raise BadModelFile(path, f"its offset {offset} is not aligned to {alignment} bytes", name)
        if offset < end:
            raise BadModelFile(path, f"it overlaps tensor {previous}", name)
        end, previous = offset + size, name
    if table and start + end > content.size:
        raise BadModelFile(
            path, f"expected {start + end} bytes, the file has {content.size}: download incomplete?"
        )
    tensors = {}
    for name, (shape, kind, offset, size) in table.items():
        data = content[start + offset : start + offset + size]
        tensors[name] = Tensor(name, shape, kind, data, path, mapping)
    return metadata, tensors


class _Scanner:
    """Reads a header value by value, and never past the end of the file."""

    def __init__(self, path: str, content: np.ndarray):
        self.path, self.view, self.size, self.position = path, memoryview(content), content.size, 0

    def numbers(self, code: str, count: int) -> tuple:
        """The next `count` numbers of one struct code."""
        start = self.position
        stop = start + count * struct.calcsize("<" + code)
        if stop > self.size:
            raise self._ended()
        self.position = stop
        return struct.unpack_from(f"<{count}{code}", self.view, start)

    def number(self, code: str):
        return self.numbers(code, 1)[0]

    def strings(self, count: int) -> list[str]:
        """The next `count` strings. Opening a model is mostly this loop, hence the local names."""
        view, size, length = self.view, self.size, struct.Struct("<Q").unpack_from
        texts, stop = [], self.position
        try:
            for _ in range(count):
                start = stop + 8
                stop = start + length(view, stop)[0]
                if stop > size:
                    raise self._ended()
                texts.append(str(view[start:stop], "utf-8"))
        except struct.error:
            raise self._ended() from None
        except UnicodeDecodeError:
            raise BadModelFile(self.path, f"the string at byte {start} is not UTF-8") from None
        self.position = stop
        return texts

    def string(self) -> str:
        return self.strings(1)[0]

    def _ended(self) -> BadModelFile:
        return BadModelFile(self.path, f"ends inside its header, at byte {self.size}: download incomplete?")


def _head(path, scan: _Scanner) -> tuple[int, int]:
    """(number of tensors, number of metadata keys), once magic and version are known to be right."""
    if scan.view[:4] != b"GGUF":
        raise BadModelFile(path, "not a GGUF file: it does not begin with 'GGUF'")
    scan.position = 4
    version = scan.number("I")
    if version and not version & 0xFFFF:
        raise UnsupportedModel(f"{path}: big-endian GGUF: convert the model for a little-endian machine")
    if version not in (2, 3):
        raise UnsupportedModel(f"{path}: GGUF version {version} is not 2 or 3: convert the model again")
    return scan.numbers("Q", 2)


def _metadata(path, scan: _Scanner, n_keys: int) -> dict:
    metadata = {}
    for _ in range(n_keys):
        key = scan.string()
        if key in metadata:
            raise BadModelFile(path, f"metadata key {short(key)} stands twice")
        value_type = scan.number("I")
        is_array = value_type == ARRAY
        if is_array:
            value_type = scan.number("I")
        count = scan.number("Q") if is_array else 1
        if value_type == STRING:
            values = scan.strings(count)
        elif value_type in NUMBERS:
            values = scan.numbers(NUMBERS[value_type], count)
        elif value_type == ARRAY:
            raise UnsupportedModel(f"{path}: metadata key {short(key)} is an array of arrays")
        else:
            raise BadModelFile(path, f"metadata key {short(key)} has the unknown type {value_type}")
        metadata[key] = list(values) if is_array else values[0]
    return metadata


def _table(path, scan: _Scanner, n_tensors: int) -> dict[str, tuple[tuple[int, ...], str, int, int]]:
    """name -> (shape, kind, offset, bytes), offsets counted from the start of the data."""
    table = {}
    for _ in range(n_tensors):
        name = scan.string()
        check_name(path, name)
        if name in table:
            raise BadModelFile(path, "its name stands twice", name)
        n_dims = scan.number("I")
        if n_dims > 4:
            raise BadModelFile(path, f"{n_dims} dimensions, of at most 4", name)
        shape = scan.numbers("Q", n_dims)[::-1]  # GGUF writes the innermost dimension first
        type_id, offset = scan.number("I"), scan.number("Q")
        if type_id not in TYPES:
            raise UnsupportedModel(f"{path}: tensor {name} has the unknown or retired GGUF type {type_id}")
        kind = TYPES[type_id]
        size = byte_size(path, name, kind, shape)
        if (shape[-1] if shape else 1) % KINDS[kind][0]:
            raise BadModelFile(path, f"rows of {shape[-1]} elements are not whole blocks of {kind}", name)
        table[name] = shape, kind, offset, size
    return table


def hf_config(path, metadata: dict, tensors: dict[str, Tensor]) -> dict:
    """The metadata in the words of HF's config.json.

    Two things no config.json says. `rope_parameters` of type "factors" hold the numbers of Llama 3's tensor
    rope_freqs.weight, (head_dim / 2,), by which the inverse frequencies are to be divided. And the rows of a
    Llama's attn_q and attn_k lie interleaved in GGUF, which concerns whoever reads those tensors.

    UnsupportedModel for an architecture or a setting this engine does not run; BadModelFile for a field that
    is missing or makes no sense.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in CONFIGS:
        known = ", ".join(sorted(CONFIGS))
        raise UnsupportedModel(
            f"{path}: GGUF architecture {short(architecture)} is none of the supported: {known}"
        )
    fields = _Fields(str(path), metadata)
    config = CONFIGS[architecture](fields, tensors)
    config["tie_word_embeddings"] = "output.weight" not in tensors
    for name in ("bos_token_id", "eos_token_id"):
        if f"tokenizer.ggml.{name}" in metadata:
            config[name] = fields.integer(f"tokenizer.ggml.{name}", least=0)
    return config


def _llama(fields: "_Fields", tensors: dict[str, Tensor]) -> dict:
    hidden_size = fields.integer("llama.embedding_length")
    n_heads = fields.integer("llama.attention.head_count")
    head_dim = fields.integer("llama.attention.key_length", hidden_size // n_heads)
    window = fields.integer("llama.attention.sliding_window", 0, least=0)
    fields.expect("llama.attention.value_length", head_dim)
    fields.expect("llama.rope.dimension_count", head_dim)
    fields.expect("llama.expert_count", 0)
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if window:  # in HF's family the field that only Mistral has
        kind = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    return kind | {
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("llama.feed_forward_length"),
        "num_hidden_layers": fields.integer("llama.block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": fields.integer("llama.attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": fields.real("llama.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": fields.integer("llama.context_length"),
        "vocab_size": fields.integer("llama.vocab_size", _n_embeddings(tensors)),
        "rope_parameters": _rope_parameters(fields, tensors, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }


def _rope_parameters(fields: "_Fields", tensors: dict[str, Tensor], head_dim: int) -> dict:
    fields.expect("llama.rope.scaling.attn_factor", 1)
    theta = {"rope_theta": fields.real("llama.rope.freq_base", 10000.0)}
    kind = fields.text("llama.rope.scaling.type", "linear")
    factor = fields.real("llama.rope.scaling.factor", fields.real("llama.rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        if "rope_freqs.weight" not in tensors:
            return {"rope_type": "default"} | theta
        factors = tensors["rope_freqs.weight"].float32().ravel()  # (head_dim / 2,)
        if factors.size * 2 != head_dim or not (np.isfinite(factors) & (factors > 0)).all():
            reason = (
                f"not {head_dim // 2} positive factors, one for each pair of a head's {head_dim} elements"
            )
            raise BadModelFile(fields.path, reason, "rope_freqs.weight")
        return {"rope_type": "factors", "factors": factors.tolist()} | theta
    if "rope_freqs.weight" in tensors:
        raise UnsupportedModel(
            f"{fields.path}: rope scaling {short(kind)} together with tensor rope_freqs.weight"
        )
    scaling = {"rope_type": kind, "factor": factor} | theta
    if kind == "yarn":
        fields.expect("llama.rope.scaling.yarn_ext_factor", 1)
        length = fields.integer("llama.context_length")
        original = fields.integer("llama.rope.scaling.original_context_length", length)
        scaling["original_max_position_embeddings"] = original
        for name, key in YARN.items():
            if key in fields.metadata:
                scaling[name] = fields.real(key)
        if "mscale_all_dim" in scaling:
            scaling["mscale"] = 1.0
    return scaling


def _gpt2(fields: "_Fields", tensors: dict[str, Tensor]) -> dict:
    n_embd = fields.integer("gpt2.embedding_length")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": n_embd,
        "n_inner": fields.integer("gpt2.feed_forward_length", 4 * n_embd),
        "n_layer": fields.integer("gpt2.block_count"),
        "n_head": fields.integer("gpt2.attention.head_count"),
        "n_positions": fields.integer("gpt2.context_length"),
        "layer_norm_epsilon": fields.real("gpt2.attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "vocab_size": fields.integer("gpt2.vocab_size", _n_embeddings(tensors)),
    }


def _n_embeddings(tensors: dict[str, Tensor]) -> int | None:
    """Rows of the token embeddings: the vocabulary's size, which not every converter writes down."""
    embeddings = tensors.get("token_embd.weight")
    return embeddings.shape[0] if embeddings and embeddings.shape else None


class _Fields:
    """Metadata, each value checked for its type as it is asked for; without a default it is required."""

    def __init__(self, path: str, metadata: dict):
        self.path, self.metadata = path, metadata

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number; of a list, one number a layer, the one that all its elements are."""
        value = self._value(key, default)
        if isinstance(value, list) and value:
            if any(other != value[0] for other in value):
                raise UnsupportedModel(f"{self.path}: {key} differs from layer to layer: {short(value)}")
            value = value[0]
        if type(value) is not int or value < least:
            raise BadModelFile(self.path, f"{key} is {short(value)}, not a whole number of at least {least}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A number >= 0, as the shortest decimal that is the file's float32: 1e-05, not 9.99999974e-06."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not 0 <= value < 1e38:
            raise BadModelFile(self.path, f"{key} is {short(value)}, not a finite number >= 0")
        return float(np.format_float_scientific(np.float32(value)))

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise BadModelFile(self.path, f"{key} is {short(value)}, not a string")
        return value

    def expect(self, key: str, value) -> None:
        """UnsupportedModel if the field is there and is not the one value this engine runs."""
        found = self.metadata.get(key, value)
        if found != value:
            raise UnsupportedModel(f"{self.path}: {key} is {short(found)}; only {value} is supported")

    def _value(self, key: str, default):
        value = self.metadata.get(key, default)
        if value is None:
            raise BadModelFile(self.path, f"its metadata lacks {key}")
        return value


NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

TYPES = {  # the file's number -> kind; "-" stands for the numbers that were retired
    number: kind
    for number, kind in enumerate(
        (
            "f32 f16 q4_0 q4_1 - - q5_0 q5_1 q8_0 q8_1 q2_k q3_k q4_k q5_k q6_k q8_k "
            "iq2_xxs iq2_xs iq3_xxs iq1_s iq4_nl iq3_s iq2_s iq4_xs i8 i16 i32 i64 f64 iq1_m bf16 "
            "- - - tq1_0 tq2_0 - - - mxfp4 nvfp4 q1_0 q2_0"
        ).split()
    )
    if kind != "-"
}

YARN = {  # HF's name of a yarn parameter -> GGUF's
    "attention_factor": "llama.rope.scaling.yarn_attn_factor",
    "beta_fast": "llama.rope.scaling.yarn_beta_fast",
    "beta_slow": "llama.rope.scaling.yarn_beta_slow",
    "mscale_all_dim": "llama.rope.scaling.yarn_log_multiplier",
}

CONFIGS = {  # general.architecture -> function giving its config.json
    "llama": _llama,
    "gpt2": _gpt2,
}
