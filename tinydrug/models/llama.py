"""Llama 1, 2, 3 and Mistral: RMSNorm, rotary grouped-query attention, gated MLP."""

from dataclasses import replace

from tinydrug.errors import UnsupportedModel
from tinydrug.formats.config import Config, Fields
from tinydrug.formats.tensor import Tensor
from tinydrug.formats.weights import Need
from tinydrug.models.program import Program, Value
from tinydrug.models.rope import check_rope

HUGGING_FACE = {
    "embed": "model.embed_tokens",
    "attn_norm": "model.layers.{i}.input_layernorm",
    "q_proj": "model.layers.{i}.self_attn.q_proj",
    "k_proj": "model.layers.{i}.self_attn.k_proj",
    "v_proj": "model.layers.{i}.self_attn.v_proj",
    "o_proj": "model.layers.{i}.self_attn.o_proj",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "gate_proj": "model.layers.{i}.mlp.gate_proj",
    "up_proj": "model.layers.{i}.mlp.up_proj",
    "down_proj": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
GGUF = {
    "embed": "token_embd",
    "attn_norm": "blk.{i}.attn_norm",
    "q_proj": "blk.{i}.attn_q",
    "k_proj": "blk.{i}.attn_k",
    "v_proj": "blk.{i}.attn_v",
    "o_proj": "blk.{i}.attn_output",
    "mlp_norm": "blk.{i}.ffn_norm",
    "gate_proj": "blk.{i}.ffn_gate",
    "up_proj": "blk.{i}.ffn_up",
    "down_proj": "blk.{i}.ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}
UNSAID = {  # what transformers takes a field for that is absent from a Mistral's config; null is none
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
IGNORED = ("rotary_emb.inv_freq", "rope_freqs.weight")  # derived from the config, stored by old checkpoints


def config(fields: Fields, tensors: dict[str, Tensor]) -> Config:
    """From config.json of Llama or Mistral."""
    fields.refuse(pretraining_tp=1, quantization_config=None, num_experts=None, partial_rotary_factor=1.0)
    mistral = fields.get("model_type", str) == "mistral"
    if mistral:
        fields = Fields(UNSAID | fields.raw, fields.path)
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    if fields.raw.get("head_dim") is None and hidden % heads:
        raise UnsupportedModel(f"{fields.path}: hidden_size {hidden} does not divide into {heads} heads")
    c = Config(
        model_type=fields.get("model_type", str),
        n_layers=fields.size("num_hidden_layers"),
        hidden_size=hidden,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=fields.size("head_dim", hidden // heads),
        intermediate_size=fields.size("intermediate_size"),
        vocab_size=fields.size("vocab_size"),
        max_seq_len=fields.size("max_position_embeddings", 2048),
        norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        activation=fields.get("hidden_act", str, "silu"),
        tied=fields.get("tie_word_embeddings", bool, False),
        rope=fields.rope(),
        sliding_window=fields.size("sliding_window", None) if mistral else None,
        attention_bias=fields.get("attention_bias", bool, False),
        mlp_bias=fields.get("mlp_bias", bool, False),
    )
    if c.activation != "silu":
        raise UnsupportedModel(
            f"{fields.path}: hidden_act {c.activation!r} is not supported for {c.model_type}; only silu is"
        )
    if c.n_heads % c.n_kv_heads or c.head_dim % 2:
        raise UnsupportedModel(
            f"{fields.path}: {c.n_heads} heads over {c.n_kv_heads} kv heads of width {c.head_dim}: "
            "the heads must divide, the width must be even"
        )
    check_rope(c, fields.path)
    return c


def needs(c: Config, gguf: bool) -> dict[str, Need]:
    """Every tensor of the model, by the name the forward pass uses."""
    names = GGUF if gguf else HUGGING_FACE
    D, H, G, d, F = c.hidden_size, c.n_heads, c.n_kv_heads, c.head_dim, c.intermediate_size
    matrices = {
        "q_proj": Need("", (H * d, D), out_head=d, interleaved=gguf),
        "k_proj": Need("", (G * d, D), out_head=d, interleaved=gguf),
        "v_proj": Need("", (G * d, D), out_head=d),
        "o_proj": Need("", (D, H * d), in_head=d),
        "gate_proj": Need("", (F, D)),
        "up_proj": Need("", (F, D)),
        "down_proj": Need("", (D, F)),
    }
    attention, mlp = list(matrices)[:4], list(matrices)[4:]
    biased = dict.fromkeys(attention, c.attention_bias) | dict.fromkeys(mlp, c.mlp_bias)
    norm = Need("", (D,), role="vector")
    out = {"embed": Need(f"{names['embed']}.weight", (c.vocab_size, D), fine=True)}
    for i in range(c.n_layers):
        for name in ("attn_norm", *attention, "mlp_norm", *mlp):
            source = names[name].format(i=i)
            out[f"{i}.{name}"] = replace(
                matrices.get(name, norm),
                source=f"{source}.weight",
                bias=f"{source}.bias" if biased.get(name) else None,
            )
    out["norm"] = replace(norm, source=f"{names['norm']}.weight")
    out["lm_head"] = (
        out["embed"] if c.tied else Need(f"{names['lm_head']}.weight", (c.vocab_size, D), fine=True)
    )
    return out


def tensors(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as they are."""
    return given


def forward(p: Program, c: Config, n_positions: int) -> Value:
    """Token ids -> logits (outputs, V)."""
    rope = p.rotary(n_positions)
    x = p.embed("embed")  # (T, D)
    for i in range(c.n_layers):
        h = p.noise("H", i, p.rms_norm(x, f"{i}.attn_norm"))  # (T, D)
        # Noise comes after all three: a linear map between two steps by heads would make threads meet again.
        q, k, v = (p.linear(h, f"{i}.{name}_proj") for name in "qkv")  # (T, H, d), and twice (T, G, d)
        q, k = p.noise("Q", i, q), p.noise("pK", i, k)
        keys, values = p.cache(i, p.rope(k, rope), v)  # (S, G, d)
        y = p.attend(i, p.rope(q, rope), p.noise("K", i, keys), p.noise("V", i, values), c.sliding_window)
        y = p.drift(i, p.noise("A", i, y))  # (T, H, d)
        x = p.linear(y, f"{i}.o_proj", onto=x)
        h = p.rms_norm(x, f"{i}.mlp_norm")  # (T, D)
        h = p.gated(p.linear(h, f"{i}.gate_proj"), p.linear(h, f"{i}.up_proj"))  # (T, F)
        x = p.linear(p.noise("M", i, h), f"{i}.down_proj", onto=x)
        p.probe(x)  # (T, D)
    return p.linear(p.rms_norm(p.asked(x), "norm"), "lm_head")
