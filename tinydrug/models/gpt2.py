"""GPT-2: LayerNorm, learned positions, multi-head attention, GELU MLP."""

from dataclasses import replace

from tinydrug.errors import UnsupportedModel
from tinydrug.formats.config import Config, Fields
from tinydrug.formats.tensor import Tensor
from tinydrug.formats.weights import Need
from tinydrug.models.program import ACTIVATIONS, Program, Value

IGNORED = (".attn.bias", ".attn.masked_bias")  # the causal mask, stored by old checkpoints


def config(fields: Fields, tensors: dict[str, Tensor]) -> Config:
    """From config.json of GPT-2."""
    fields.refuse(
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        add_cross_attention=False,
        quantization_config=None,
    )
    hidden = fields.size("n_embd", 768, aliases=("hidden_size",))
    heads = fields.size("n_head", 12, aliases=("num_attention_heads",))
    activation = fields.get("activation_function", str, "gelu_new")
    if activation not in ACTIVATIONS or activation == "silu":
        raise UnsupportedModel(
            f"{fields.path}: activation_function {activation!r} is not supported; gelu_new and gelu are"
        )
    if hidden % heads or hidden // heads % 2:
        raise UnsupportedModel(
            f"{fields.path}: n_embd {hidden} does not divide into {heads} heads of even width"
        )
    return Config(
        model_type="gpt2",
        n_layers=fields.size("n_layer", 12, aliases=("num_hidden_layers",)),
        hidden_size=hidden,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=fields.size("n_inner", 4 * hidden),
        vocab_size=fields.size("vocab_size", 50257),
        max_seq_len=fields.size("n_positions", 1024, aliases=("max_position_embeddings",)),
        norm_eps=fields.get("layer_norm_epsilon", float, 1e-5),
        activation=activation,
        tied=fields.get("tie_word_embeddings", bool, True),
    )


def needs(c: Config, gguf: bool) -> dict[str, Need]:
    """Every tensor of the model. Hugging Face keeps (in, out) Conv1D matrices with q, k and v in one; GGUF
    keeps (out, in)."""
    D, F, d = c.hidden_size, c.intermediate_size, c.head_dim

    def matrix(name, n, k, shape=None, **layout):
        shape = shape or (n, k)
        return Need(
            f"{name}.weight",
            shape if gguf else shape[::-1],
            bias=f"{name}.bias",
            transposed=not gguf,
            **layout,
        )

    def norm(name):
        return Need(f"{name}.weight", (D,), role="vector", bias=f"{name}.bias")

    layer = "blk.{i}." if gguf else "h.{i}."
    ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj = (
        ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
        if gguf
        else ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    )
    embed, positions, ln_f, head = (
        ("token_embd", "position_embd", "output_norm", "output")
        if gguf
        else ("wte", "wpe", "ln_f", "lm_head")
    )
    out = {
        "wte": Need(f"{embed}.weight", (c.vocab_size, D), fine=True),
        "wpe": Need(f"{positions}.weight", (c.max_seq_len, D), role="table"),
    }
    for i in range(c.n_layers):
        at = layer.format(i=i)
        out[f"{i}.ln_1"] = norm(at + ln_1)
        for j, name in enumerate(("q", "k", "v")):
            part = (j * D, (j + 1) * D)
            out[f"{i}.{name}"] = matrix(at + c_attn, D, D, (3 * D, D), columns=part, out_head=d)
        out[f"{i}.attn_proj"] = matrix(at + attn_proj, D, D, in_head=d)
        out[f"{i}.ln_2"] = norm(at + ln_2)
        out[f"{i}.c_fc"] = matrix(at + c_fc, F, D)
        out[f"{i}.mlp_proj"] = matrix(at + mlp_proj, D, F)
    out["ln_f"] = norm(ln_f)
    out["lm_head"] = out["wte"] if c.tied else Need(f"{head}.weight", (c.vocab_size, D), fine=True)
    return out


def tensors(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefix `transformer.`: the official files have none, saved ones do."""
    return {name.removeprefix("transformer."): replace(t, name=name) for name, t in given.items()}


def forward(p: Program, c: Config, n_positions: int) -> Value:
    """Token ids -> logits (outputs, V)."""
    x = p.add_position(p.embed("wte"), "wpe")  # (T, D)
    for i in range(c.n_layers):
        h = p.noise("H", i, p.layer_norm(x, f"{i}.ln_1"))  # (T, D)
        q, k, v = (p.linear(h, f"{i}.{name}") for name in "qkv")  # (T, H, d)
        q, k = p.noise("Q", i, q), p.noise("pK", i, k)
        keys, values = p.cache(i, k, v)  # (S, H, d)
        y = p.attend(i, q, p.noise("K", i, keys), p.noise("V", i, values), None)
        y = p.drift(i, p.noise("A", i, y))  # (T, H, d)
        x = p.linear(y, f"{i}.attn_proj", onto=x)
        h = p.activate(p.linear(p.layer_norm(x, f"{i}.ln_2"), f"{i}.c_fc"))  # (T, F)
        x = p.linear(p.noise("M", i, h), f"{i}.mlp_proj", onto=x)
        p.probe(x)  # (T, D)
    return p.linear(p.layer_norm(p.asked(x), "ln_f"), "lm_head")
