"""Against plain torch: transformers' models with hooks that replay the engine's draws, where installed."""

import json

import numpy as np
import pytest
import tiny
from engines import feed, logits, runtime, session

from tinydrug.engine.draws import draw
from tinydrug.formats.config import Fields
from tinydrug.models import llama
from tinydrug.noise import SITES, Schedule
from tinydrug.noise.laws import ANGLES, FORMS, LAWS

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs transformers")

REPLAY = 1e-4  # asked for by the project: float64 torch against our float32
MODELS = ["llama-gqa", "llama-head12", "llama-bias", "mistral-window", "gpt2", "gpt2-prefix"]
ALL = "H:0.3,Q:0.5,pK:0.4,K:0.6,V:0.5,A:0.7,M:0.3"
T = 24  # beyond the window of 16


def turned(x, r, phi):
    """x cos phi + |x| o/|o| sin phi, with o the part of r orthogonal to x; x (..., d), phi (...)."""
    return x * phi.cos()[..., None] + x.norm(dim=-1, keepdim=True) * across(x, r) * phi.sin()[..., None]


def added(x, r, phi):
    """x + phi |x| r/|r|."""
    return x + phi[..., None] * x.norm(dim=-1, keepdim=True) * r / r.norm(dim=-1, keepdim=True)


def interpolated(x, r, phi):
    """x/|x| + phi o/|o|, normalised, times |x|."""
    length = x.norm(dim=-1, keepdim=True)
    between = x / length + phi[..., None] * across(x, r)
    return length * between / between.norm(dim=-1, keepdim=True)


def across(x, r):
    """The direction of the part of r that is orthogonal to x."""
    o = r - x * ((r * x).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True))
    return o / o.norm(dim=-1, keepdim=True)


MOVES = {"rotation": turned, "L2": added, "NL": interpolated}


class Drugged:
    """A transformers model whose vectors are moved by the engine's draws, at the places of the table.

    `first`: tokens before it are read without noise, and ramps begin there."""

    def __init__(self, folder, config):
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register("replayed", lambda module, *args, **how: module.of(module, *args, **how))
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="replayed"
        )
        self.model, self.config = model.double().eval(), config
        llama = hasattr(model, "model")
        for i, layer in enumerate(model.model.layers if llama else model.transformer.h):
            if llama:
                attention, mlp = layer.self_attn, layer.mlp
                self.after(layer.input_layernorm, "H", i, 1)
                self.after(attention.q_proj, "Q", i, config.n_heads)
                self.after(attention.k_proj, "pK", i, config.n_kv_heads)
                self.before(attention.o_proj, "A", i, config.n_heads)
                self.before(mlp.down_proj, "M", i, 1)
            else:
                attention = layer.attn
                self.after(layer.ln_1, "H", i, 1)
                attention.c_attn.register_forward_hook(self.of_fused(i))
                self.before(attention.c_proj, "A", i, config.n_heads)
                self.before(layer.mlp.c_proj, "M", i, 1)
            attention.of = self.attend

    def after(self, module, site, layer, heads):
        module.register_forward_hook(lambda _, inputs, out: self.rows(out, site, layer, heads))

    def before(self, module, site, layer, heads):
        module.register_forward_pre_hook(lambda _, inputs: (self.rows(inputs[0], site, layer, heads),))

    def of_fused(self, layer):
        def hook(_, inputs, out):
            q, k, v = out.chunk(3, -1)
            heads = self.config.n_heads
            return torch.cat((self.rows(q, "Q", layer, heads), self.rows(k, "pK", layer, heads), v), -1)

        return hook

    def draws(self, site, layer, head, positions, steps):
        found = [
            draw(self.schedule, self.seed, self.config, site, layer, head, p, s, self.first)
            for p, s in zip(positions, steps, strict=True)
        ]
        phi, r = (np.array(values) for values in zip(*found, strict=True))
        return torch.from_numpy(r), torch.from_numpy(phi)

    def rows(self, x, site, layer, heads):
        """x (1, T, heads * d), each head of each row moved, where its position is not protected."""
        split, first = x[0].unflatten(-1, (heads, -1)).clone(), max(self.schedule.sink, self.first)
        if self.thetas[layer, SITES[site].code] == 0 or first >= len(split):
            return x
        positions = range(first, len(split))
        for h in range(heads):
            split[first:, h] = self.move[site](
                split[first:, h], *self.draws(site, layer, h, positions, positions)
            )
        return split.flatten(1)[None]

    def read(self, x, site, layer, step):
        """x (G, S, d) of the cache as the token at `step` reads it: drawn anew for it, kept by nobody."""
        sink = self.schedule.sink
        if self.thetas[layer, SITES[site].code] == 0 or step < max(sink, self.first):
            return x
        x, positions = x.clone(), range(sink, x.shape[1])
        for g in range(len(x)):
            r, phi = self.draws(site, layer, g, positions, [step] * len(positions))
            x[g, sink:] = self.move[site](x[g, sink:], r, phi)
        return x

    def attend(self, module, query, key, value, attention_mask, scaling=None, **_):
        """query (1, H, T, d), key and value (1, G, T, d) -> (1, T, H, d), a token at a time."""
        H, d = query.shape[1], query.shape[3]
        window, rows = self.config.sliding_window or 10**9, []
        for step in range(query.shape[2]):
            first = max(0, step + 1 - window)
            keys = self.read(key[0, :, : step + 1], "K", module.layer_idx, step)[:, first:]
            values = self.read(value[0, :, : step + 1], "V", module.layer_idx, step)[:, first:]
            keys, values = (x.repeat_interleave(H // len(x), 0) for x in (keys, values))
            weights = (torch.einsum("hd,hsd->hs", query[0, :, step], keys) * d**-0.5).softmax(-1)
            rows.append(torch.einsum("hs,hsd->hd", weights, values))
        return torch.stack(rows)[None], None

    def __call__(self, ids, drug, seed, first=0):
        self.schedule, self.seed, self.first = Schedule.parse(drug), seed, first
        self.thetas = self.schedule.table(self.config.n_layers)["theta"]
        self.move = {dose.site: MOVES[dose.form] for dose in self.schedule.doses}
        with torch.no_grad():
            return self.model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


@pytest.fixture(scope="module")
def twins(tiny_model):
    """twins(name) -> the engine's model and transformers', built once."""
    built = {}

    def make(name):
        if name not in built:
            model = runtime(tiny_model(name))
            built[name] = model, Drugged(tiny_model(name), model.config)
        return built[name]

    yield make
    for model, _ in built.values():
        model.close()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("drug", ["V:0", *(f"{site}:0.8" for site in SITES), ALL])
def test_drugged_logits_equal_torch(name, drug, twins):
    ids, (model, torchs) = tiny.ids(name)[:T].tolist(), twins(name)
    np.testing.assert_allclose(logits(model, ids, drug, 11), torchs(ids, drug, 11), rtol=0, atol=REPLAY)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("law", LAWS)
def test_every_law_form_angle_and_site_equals_torch(law, form, angle, site, twins):
    ids, (model, torchs) = tiny.ids("llama-gqa")[:10].tolist(), twins("llama-gqa")
    drug = f"{FORMS[form].mark}{site}{ANGLES[angle].mark}:0.5~{law},sink=3"
    found = logits(model, ids, drug, 5)
    np.testing.assert_allclose(found, torchs(ids, drug, 5), rtol=0, atol=REPLAY)
    assert np.abs(found - logits(model, ids)).max() > 0.005, "noise of this size must be seen"


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize(
    "time", ["held", "wander:5", "cosine:9", "linear:6", "tied", "sign+held+cosine:12", "gauss+wander:3+tied"]
)
def test_noise_over_time_equals_torch(time, name, twins):
    """Eight tokens sober, then ramps begin; at every site."""
    ids, (model, torchs) = tiny.ids(name)[:18].tolist(), twins(name)
    drug = ",".join(f"{site}:0.5~{time}" for site in SITES)
    sequence = session(model, drug, 4)
    feed(sequence, ids[:8])
    found, expected = feed(sequence, ids[8:], drugged="all"), torchs(ids, drug, 4, first=8)[8:]
    np.testing.assert_allclose(found, expected, rtol=0, atol=REPLAY)


BOTH = [{}, {"sliding_window": None}, {"sliding_window": 16}]
BOTH += [{"num_key_value_heads": 4, "max_position_embeddings": 64}]
GIVEN = [(kind, given) for kind in ("llama", "mistral") for given in BOTH]
GIVEN += [("llama", {"num_key_value_heads": None})]  # transformers 5 refuses it for a Mistral


@pytest.mark.parametrize(("kind", "given"), GIVEN, ids=json.dumps)
def test_what_a_config_does_not_say_is_what_transformers_takes_it_for(kind, given):
    """A field that is absent has the default of its class; null is a value of its own."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 1, "intermediate_size": 64}
    raw = {"model_type": kind, "vocab_size": 96} | sizes | given
    theirs, ours = AutoConfig.for_model(**raw), llama.config(Fields(raw, "config.json"), {})
    window = theirs.sliding_window if kind == "mistral" else None
    assert ours.sliding_window == window and ours.n_kv_heads == theirs.num_key_value_heads
    assert ours.max_seq_len == theirs.max_position_embeddings and ours.head_dim == theirs.head_dim
    assert ours.norm_eps == theirs.rms_norm_eps and ours.tied == theirs.tie_word_embeddings
