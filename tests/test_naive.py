"""The second reference is itself checked: against transformers, published vectors, and the gguf library."""

import json

import naive
import numpy as np
import pytest
import tiny
from safetensors import safe_open
from safetensors.numpy import load_file

# float32 transformers against float64: 1.3e-5 at worst over all specs, on logits of spread 2
ROUNDING = 2e-5


def logits(name, ids, **options):
    config = tiny.SPECS[name]
    return naive.MODELS[config["model_type"]](config, naive.canonical(tiny.weights(name)), ids, **options)


# --- the checkpoints


@pytest.mark.parametrize("name", tiny.SPECS)
def test_weights_are_those_of_the_golden_logits(name, golden):
    assert tiny.weights_crc(name) == golden(name)["weights_crc"]
    np.testing.assert_array_equal(tiny.ids(name), golden(name)["ids"])


@pytest.mark.parametrize("name", tiny.SPECS)
def test_files_hold_the_weights(name, tiny_model):
    dtype, found = tiny.SPECS[name].get("dtype") or tiny.SPECS[name].get("torch_dtype", "float32"), set()
    for file in tiny_model(name).glob("*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            found |= {key for key in tensors.keys() if not key.endswith((".attn.bias", ".masked_bias"))}
        if dtype != "bfloat16":  # which NumPy lacks
            for key, stored in load_file(file).items():
                if key in found:
                    np.testing.assert_array_equal(stored.astype(np.float32), tiny.weights(name)[key], key)
    assert found == set(tiny.weights(name))


def test_bf16_rounds_to_nearest_even():
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.0], np.float32)
    rounded = tiny.decode(tiny.encode(x, "BF16"), "BF16")
    np.testing.assert_array_equal(rounded, [1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -3.0])


# --- whole models


@pytest.mark.parametrize("name", tiny.SPECS)
def test_model_equals_transformers(name, golden):
    expected = golden(name)
    whole = {"whole": True} if "dynamic" in name else {}
    np.testing.assert_allclose(
        logits(name, expected["ids"], **whole), expected["logits"], rtol=0, atol=ROUNDING
    )


@pytest.mark.parametrize("name", [name for name in tiny.SPECS if "dynamic" in name])
def test_dynamic_rope_by_steps_equals_transformers_with_a_cache(name, golden):
    expected = golden(name)
    np.testing.assert_allclose(logits(name, expected["ids"]), expected["stepwise"], rtol=0, atol=ROUNDING)


def test_stories260k_continues_as_in_transformers(golden, stories260k):
    config = json.loads((stories260k / "config.json").read_text())
    expected = golden("stories260k")
    ids = np.concatenate((expected["prompt"], expected["greedy"]))
    found = naive.llama(config, naive.canonical(load_file(stories260k / "model.safetensors")), ids)
    np.testing.assert_allclose(found[expected["positions"]], expected["logits"], rtol=0, atol=ROUNDING)
    np.testing.assert_array_equal(found.argmax(-1)[len(expected["prompt"]) - 1 : -1], expected["greedy"])


# --- noise


def test_rotate_published_vectors():
    x, r = np.array([3.0, 4, 0, 0]), np.array([0.1, 0.2, 0.3, 0.4])
    turned = naive.rotate(x, r, 0.5)
    np.testing.assert_allclose(turned, [2.4798201011, 3.6250259360, 1.4336961054, 1.9115948072], atol=1e-10)
    assert np.linalg.norm(turned) == pytest.approx(5, abs=1e-14)
    x, r = np.array([1, -2, 3, 0.5]), np.array([0.9, 0.1, 0.5, 0.7])
    expected = [1.2536633582, -1.8257503030, 2.9717963327, 0.7165127861]
    np.testing.assert_allclose(naive.rotate(x, r, 0.1), expected, atol=1e-10)
    np.testing.assert_allclose(naive.rotate(x, r, np.pi), -x, atol=1e-15)


def test_rotate_turns_by_the_angle_and_keeps_the_length():
    x, r = np.random.default_rng(0).normal(size=(2, 7, 3, 16))
    phi = np.linspace(0, 3, 21).reshape(7, 3)
    turned = naive.rotate(x, r, phi)
    lengths = np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), lengths, rtol=1e-14)
    np.testing.assert_allclose(np.arccos(np.sum(x * turned, -1) / lengths**2), phi, atol=2e-7)
    np.testing.assert_array_equal(naive.rotate(x, r, 0.0), x)


@pytest.mark.parametrize(
    ("x", "r"),
    [([0.0, 0, 0], [0.1, 0.2, 0.3]), ([1.0, 2, 3], [0.5, 1, 1.5]), ([2.0], [0.7]), ([1.0, 2], [0, 0])],
    ids=["x zero", "r parallel to x", "d 1", "r zero"],
)
def test_rotate_leaves_alone_what_has_no_direction_to_turn_in(x, r):
    np.testing.assert_array_equal(naive.rotate(np.array(x), np.array(r), 0.7), x)
    np.testing.assert_allclose(naive.nlerp(np.array(x), np.array(r), 0.7), x, rtol=1e-15)
    steps = naive.add(np.array(x), np.array(r), 0.7) - x  # it adds r whatever its direction
    assert np.linalg.norm(steps) == pytest.approx(0.7 * np.linalg.norm(x) * np.any(r))


def test_nlerp_is_a_turn_by_the_arctangent():
    x, r = np.random.default_rng(3).normal(size=(2, 7, 3, 16))
    phi = np.linspace(0, 3, 21).reshape(7, 3)
    np.testing.assert_allclose(naive.nlerp(x, r, phi), naive.rotate(x, r, np.arctan(phi)), atol=1e-13)


def test_add_moves_by_its_share_of_the_length_towards_r():
    x, r = np.random.default_rng(4).normal(size=(2, 7, 3, 16))
    phi = np.linspace(0, 3, 21).reshape(7, 3)
    step = naive.add(x, r, phi) - x
    lengths, r_lengths = np.linalg.norm(x, axis=-1), np.linalg.norm(r, axis=-1)
    np.testing.assert_allclose(np.sum(step * r, -1), phi * lengths * r_lengths, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(step, axis=-1), phi * lengths, rtol=1e-12)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "gpt2"])
def test_noise_sites_come_in_order_with_their_shapes(name):
    config, calls = tiny.SPECS[name], []

    def record(site, layer, x, positions, query=None):
        calls.append((site, layer, x.shape, tuple(positions), query))
        return x

    logits(name, np.array([5, 6]), noise=record)
    H, D = (
        config.get("num_attention_heads") or config["n_head"],
        config.get("hidden_size") or config["n_embd"],
    )
    G, d, F = config.get("num_key_value_heads", H), D // H, config.get("intermediate_size", 4 * D)
    expected = []
    for i in range(config.get("num_hidden_layers") or config["n_layer"]):
        expected += [
            ("H", i, (2, D), (0, 1), None),
            ("Q", i, (2, H, d), (0, 1), None),
            ("pK", i, (2, G, d), (0, 1), None),
            ("K", i, (1, G, d), (0,), 0),
            ("V", i, (1, G, d), (0,), 0),
            ("K", i, (2, G, d), (0, 1), 1),
            ("V", i, (2, G, d), (0, 1), 1),
            ("A", i, (2, H, d), (0, 1), None),
            ("M", i, (2, F), (0, 1), None),
        ]
    assert calls == expected


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_every_site_reaches_the_logits_and_reads_leave_the_cache_clean(name):
    """Noise at one token of the last layer: reading K or V with noise moves that row and no later one."""
    ids, last = tiny.ids(name)[:9], tiny.SPECS[name].get("num_hidden_layers", 2) - 1
    rng, quiet = np.random.default_rng(1), logits(name, ids)
    for site in ("H", "Q", "pK", "K", "V", "A", "M"):

        def noise(at, layer, x, positions, query=None, site=site):
            if (at, layer) != (site, last) or query not in (None, 5):
                return x
            rows = x if query is not None else x[5:6]
            rows[:] = naive.rotate(rows, rng.random(rows.shape), np.full(rows.shape[:-1], 0.5))
            return x

        moved = np.abs(logits(name, ids, noise=noise) - quiet).max(-1) > 1e-9
        stays = site in ("Q", "K", "V", "A", "M")  # in the last layer only H and pK are seen by later readers
        assert moved.tolist() == [t == 5 or (t > 5 and not stays) for t in range(9)], site


# --- parts that a model cannot vouch for


def test_window_and_groups_of_attention():
    q, keys = np.zeros((4, 2)), np.zeros((6, 2, 2))
    values = np.arange(24.0).reshape(6, 2, 2)
    positions = np.array([5, 6, 0, 1, 2, 4])  # slots in any order, position 3 missing
    out = naive.attend(q, keys, values, 5, positions, window=4)
    np.testing.assert_allclose(out[:2], np.repeat(values[[0, 4, 5], 0].mean(0)[None], 2, 0))
    np.testing.assert_allclose(out[2:], np.repeat(values[[0, 4, 5], 1].mean(0)[None], 2, 0))


def test_hadamard_against_its_definition():
    """Sylvester's construction; what 256 does not divide is cut in runs of 32."""
    signs = np.ones((1, 1))
    while len(signs) < 256:
        signs = np.block([[signs, signs], [signs, -signs]])
    x = np.random.default_rng(3).normal(size=(2, 256 + 96))
    left = [part @ signs[:32, :32] / 32**0.5 for part in np.split(x[:, 256:], 3, 1)]
    expected = np.concatenate([x[:, :256] @ signs / 16, *left], 1)
    np.testing.assert_allclose(naive.hadamard(x), expected, atol=1e-12)
    np.testing.assert_allclose(naive.hadamard(naive.hadamard(x)), x, atol=1e-12)


def test_gelus():
    x = np.array([-3.0, -0.5, 0, 0.5, 3])
    np.testing.assert_allclose(
        naive.gelu(x), [-0.0040496941, -0.1542687694, 0, 0.3457312306, 2.9959503059], atol=1e-9
    )
    np.testing.assert_allclose(
        naive.gelu_tanh(x), [-0.00363739, -0.15428599, 0, 0.34571401, 2.99636261], atol=1e-8
    )
