"""Against plain torch: transformers' models with hooks that replay the engine's draws, where installed."""

import numpy as np
import pytest
import tiny
from engines import logits, runtime

from tinydrug.engine.draws import draw
from tinydrug.noise import SITES, Schedule

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs transformers")

REPLAY = 1e-4  # asked for by the project: float64 torch against our float32
MODELS = ["llama-gqa", "llama-head12", "llama-bias", "mistral-window", "gpt2", "gpt2-prefix"]
ALL = "H:0.3,Q:0.5,pK:0.4,K:0.6,V:0.5,A:0.7,M:0.3"
T = 24  # beyond the window of 16


def turned(x, r, phi):
    """x cos phi + |x| o/|o| sin phi, with o the part of r orthogonal to x; x (..., d), phi (...)."""
    projection = x * ((r * x).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True))
    o = r - projection
    o = o / o.norm(dim=-1, keepdim=True)
    return x * phi.cos()[..., None] + x.norm(dim=-1, keepdim=True) * o * phi.sin()[..., None]


class Drugged:
    """A transformers model whose vectors are turned by the engine's draws, at the places of the table."""

    def __init__(self, folder, config, drug, seed):
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register("replayed", self.attend)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="replayed"
        )
        self.model = model.double().eval()
        self.config, self.seed, self.schedule = config, seed, Schedule.parse(drug)
        self.thetas = self.schedule.table(config.n_layers)["theta"]
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
                self.after(layer.ln_1, "H", i, 1)
                layer.attn.c_attn.register_forward_hook(self.of_fused(i))
                self.before(layer.attn.c_proj, "A", i, config.n_heads)
                self.before(layer.mlp.c_proj, "M", i, 1)

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
            draw(self.schedule, self.seed, self.config, site, layer, head, p, s)
            for p, s in zip(positions, steps, strict=True)
        ]
        phi, r = (np.array(values) for values in zip(*found, strict=True))
        return torch.from_numpy(r), torch.from_numpy(phi)

    def rows(self, x, site, layer, heads):
        """x (1, T, heads * d), each head of each row turned, where its position is not protected."""
        if self.thetas[layer, SITES[site].code] == 0:
            return x
        split, first = x[0].unflatten(-1, (heads, -1)).clone(), self.schedule.sink
        positions = range(first, len(split))
        for h in range(heads):
            split[first:, h] = turned(split[first:, h], *self.draws(site, layer, h, positions, positions))
        return split.flatten(1)[None]

    def read(self, x, site, layer, step):
        """x (G, S, d) of the cache as the token at `step` reads it: drawn anew for it, kept by nobody."""
        if self.thetas[layer, SITES[site].code] == 0 or step < self.schedule.sink:
            return x
        x, positions = x.clone(), range(self.schedule.sink, x.shape[1])
        for g in range(len(x)):
            r, phi = self.draws(site, layer, g, positions, [step] * len(positions))
            x[g, self.schedule.sink :] = turned(x[g, self.schedule.sink :], r, phi)
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

    def __call__(self, ids):
        with torch.no_grad():
            return self.model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


@pytest.fixture(scope="module")
def run(tiny_model):
    built = {}

    def make(name):
        if name not in built:
            built[name] = runtime(tiny_model(name))
        return built[name]

    yield make
    for each in built.values():
        each.close()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("drug", ["V:0", *(f"{site}:0.8" for site in SITES), ALL])
def test_drugged_logits_equal_torch(name, drug, run, tiny_model):
    ids, model = tiny.ids(name)[:T].tolist(), run(name)
    expected = Drugged(tiny_model(name), model.config, drug, seed=11)(ids)
    np.testing.assert_allclose(logits(model, ids, drug, 11), expected, rtol=0, atol=REPLAY)
