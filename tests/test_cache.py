"""The ring-buffer cache: how many slots are enough, and going back, starting over and running out of room."""

import numpy as np
import pytest
import tiny
from engines import cached, edited, feed, logits, runtime, session

from tinydrug.engine.cache import RingCache, slots_needed
from tinydrug.errors import ContextOverflow, PromptError
from tinydrug.formats.config import Fields
from tinydrug.kernels.attention import BLOCK
from tinydrug.models import llama

WINDOW = 16  # of the spec mistral-window


def long_ids(n: int, name: str = "cache") -> list[int]:
    return (3 + tiny.counter_hash(name, n) % np.uint64(tiny.VOCAB - 4)).astype(int).tolist()


@pytest.fixture(scope="module")
def run(runtimes):
    """run(name, **options) -> a runtime, built once."""

    def make(name="mistral-window", **options):
        return runtimes(name, **options)

    return make


# --- slots


@pytest.mark.parametrize(
    ("n_ctx", "window", "chunk", "rewind", "slots"),
    [
        (1000, None, 512, 420, 1024),  # without a window every position stays
        (64, None, 1, 0, 64),
        (65, None, 1, 0, 128),
        (4096, 16, 49, 0, 64),  # 16 + 49 - 1
        (4096, 16, 50, 0, 128),
        (4096, 16, 1, 49, 64),  # a rewind needs what a chunk does
        (4096, 16, 1, 50, 128),
        (4096, 16, 512, 420, 576),
        (100, 4096, 512, 420, 128),  # a context shorter than the window
    ],
)
def test_slots(n_ctx, window, chunk, rewind, slots):
    assert slots_needed(n_ctx, window, chunk, rewind) == slots


@pytest.mark.parametrize(
    ("kind", "given", "window"),
    [
        ("mistral", {}, 4096),  # as transformers has it, where the field is absent
        ("mistral", {"sliding_window": None}, None),  # null is no window
        ("mistral", {"sliding_window": 16}, 16),
        ("llama", {"sliding_window": 16}, None),
    ],
)
def test_the_window_a_config_asks_for(kind, given, window):
    sizes = {"hidden_size": 64, "num_attention_heads": 16, "num_hidden_layers": 1, "intermediate_size": 64}
    config = llama.config(Fields({"model_type": kind, "vocab_size": 96} | sizes | given, "config.json"), {})
    assert config.sliding_window == window
    assert (config.n_kv_heads, config.max_seq_len) == ((8, 131072) if kind == "mistral" else (16, 2048))


def test_memory(run):
    model = run("llama-head12", n_ctx=100, cell="f16")
    cache = model.new_cache()
    L, G, d = 2, 3, 32  # heads of 12 lie in 32
    assert cache.keys.shape == (L, G, 128 // 16, d, 16) and cache.values.shape == (L, G, 128, d)
    assert cache.keys.nbytes + cache.values.nbytes == RingCache.nbytes(model.config, 128, "f16") == 49152 * 2
    assert cache.keys.ctypes.data % 64 == cache.values.ctypes.data % 64 == 0


def lookback(model, ids, piece: int, slots: int) -> np.ndarray:
    """Logits with rings of so many slots, whatever the model needs."""
    before, model.slots = model.slots, slots
    try:
        return logits(model, ids, piece=piece)
    finally:
        model.slots = before


@pytest.mark.parametrize("chunk", [49, 50, 113, 114])
def test_the_ring_is_as_large_as_it_must_be(chunk, run):
    """One block fewer overwrites what the first token of a chunk still sees; more changes nothing."""
    ids, model = long_ids(400), run(n_ctx=512, chunk=chunk)
    exact, needed = logits(run(n_ctx=512, chunk=512), ids), model.slots
    assert needed == -(-(WINDOW + chunk - 1) // BLOCK) * BLOCK
    np.testing.assert_array_equal(lookback(model, ids, chunk, needed), exact)
    np.testing.assert_array_equal(lookback(model, ids, chunk, needed + BLOCK), exact)
    if needed > BLOCK:
        assert (lookback(model, ids, chunk, needed - BLOCK) != exact).any()


# --- going back


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "gpt2"])
def test_rewind_within_the_context(name, run):
    ids, model = long_ids(40), run(name)
    sequence, exact = session(model), logits(model, ids)
    feed(sequence, ids)
    for back in (1, 3, 40, 0, 17):
        sequence.rewind(back)
        assert sequence.pos == 40 - back and sequence.ids == ids[: 40 - back]
        if back:
            np.testing.assert_array_equal(feed(sequence, ids[40 - back :], 5), exact[40 - back :])


def test_rewind_forgets_another_continuation(run):
    ids, other, model = long_ids(40), long_ids(20, "other"), run(n_ctx=512, chunk=64, rewind_every=20)
    sequence = session(model)
    feed(sequence, ids[:25])
    feed(sequence, other[:15])
    sequence.rewind(15)
    np.testing.assert_array_equal(feed(sequence, ids[25:]), logits(model, ids)[25:])


@pytest.mark.parametrize("back", [-1, 41, 1000])
def test_rewind_of_what_is_not_there(back, run):
    sequence = session(run("llama-gqa"))
    feed(sequence, long_ids(40))
    with pytest.raises(ValueError, match=f"cannot rewind {back} of 40"):
        sequence.rewind(back)
    assert sequence.pos == 40


def test_a_wrapped_ring_rewinds_exactly_or_refuses(run):
    """64 slots and a window of 16 let 49 tokens go back, 15 positions before them being needed."""
    ids, model = long_ids(300), run(n_ctx=512, chunk=40)
    assert model.slots == 64
    exact = logits(model, ids)
    for written in (64, 65, 130, 300):
        for back in (1, 48, 49, 50, 63):
            sequence = session(model)
            feed(sequence, ids[:written], 40)
            if back <= 49 or written <= 64:
                sequence.rewind(back)
                again = feed(sequence, ids[written - back : written], 7)
                np.testing.assert_array_equal(again, exact[written - back : written])
            else:
                with pytest.raises(ValueError, match="no longer hold"):
                    sequence.rewind(back)
                assert sequence.pos == written
                sequence.rewind(written)  # to nothing: always possible
                np.testing.assert_array_equal(feed(sequence, ids[:20]), exact[:20])


def test_what_was_once_overwritten_stays_lost(run):
    """Two rewinds of 49 are not one of 98: the slots of the first are not brought back by the second."""
    ids, model = long_ids(200), run(n_ctx=512, chunk=40)
    sequence = session(model)
    feed(sequence, ids, 40)
    sequence.rewind(49)
    with pytest.raises(ValueError, match="no longer hold"):
        sequence.rewind(1)
    feed(sequence, ids[151:160])
    with pytest.raises(ValueError, match="no longer hold"):
        sequence.rewind(10)
    sequence.rewind(9)
    np.testing.assert_array_equal(feed(sequence, ids[151:]), logits(model, ids)[151:])


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
def test_any_history_equals_a_fresh_sequence(name, run):
    """Feeding, going back and sobering up in random order: what is left is what these tokens give."""
    model, rng = run(name, n_ctx=512, chunk=24, rewind_every=30), np.random.default_rng(5)
    exact = {}
    for _ in range(25):
        sequence = session(model, "H:0.3,K:0.4,V:0.5,drift:0.3,diffusion:0.2", 1)
        for _ in range(12):
            action = rng.integers(5)
            if action < 3:
                drugged = "all" if action == 0 else "none"
                feed(sequence, long_ids(int(rng.integers(1, 40)), f"{rng.integers(3)}"), 24, drugged)
            elif action == 3 and sequence.pos:
                back = int(rng.integers(1, min(sequence.pos, 40) + 1))
                try:
                    sequence.rewind(back)
                except ValueError:
                    assert name == "mistral-window"
            else:
                calls = iter([False, *[True] * 99])
                left = sequence.sober_up(lambda calls=calls: next(calls), chunk=16)
                assert 0 <= left <= sequence.pos
        assert sequence.sober_up() == 0 and sequence.dirty == 0
        ids, more = tuple(sequence.ids), long_ids(10, "more")
        exact = logits(model, [*ids, *more])[len(ids) :]
        np.testing.assert_array_equal(feed(sequence, more), exact)


def test_a_sobered_cache_is_bit_for_bit_one_never_drugged(run):
    ids, model = long_ids(40), run("llama-gqa")
    quiet, noisy = session(model), session(model, "H:0.5,pK:0.5,V:0.5,sink=3", 1)
    feed(quiet, ids), feed(noisy, ids[:10]), feed(noisy, ids[10:30], drugged="all"), feed(noisy, ids[30:])
    assert noisy.dirty == 20
    assert any((a != b).any() for a, b in zip(cached(quiet), cached(noisy), strict=True))
    assert noisy.sober_up() == 0 and noisy.dirty == 0
    for clean, sobered in zip(cached(quiet), cached(noisy), strict=True):
        np.testing.assert_array_equal(sobered, clean)


# --- starting over, and no room


def test_reset(run):
    model = run("llama-gqa")
    sequence = session(model, "V:0.5", 1)
    feed(sequence, long_ids(30), drugged="all")
    assert sequence.moved.any()
    sequence.reset()
    assert sequence.pos == 0 and not sequence.moved.any() and sequence.dirty == 0
    np.testing.assert_array_equal(feed(sequence, long_ids(20)), logits(model, long_ids(20)))


def test_what_overflowed_once_does_not_spoil_what_comes_after(tiny_model, tmp_path):
    """Token 7 overflows an f16 cache. Its row, still in memory, must then add nothing, and not 0 * inf."""

    def loud(tensors):
        embedding = tensors["model.embed_tokens.weight"].copy()
        embedding[7] = 0
        embedding[7, 0] = 1  # rms_norm makes it sqrt(32) whatever its size; the projection then overflows
        value = tensors["model.layers.0.self_attn.v_proj.weight"].copy()
        value[:, 0] = 1e5
        embedding[8:, 0] = 0
        return tensors | {
            "model.embed_tokens.weight": embedding,
            "model.layers.0.self_attn.v_proj.weight": value,
        }

    model = runtime(edited(tiny_model("llama-mha"), tmp_path, loud), cell="f16")
    ids = [9, 10, 11, 12, 13]
    exact = logits(model, ids)
    assert np.isfinite(exact).all()
    sequence = session(model)
    feed(sequence, ids)
    assert not np.isfinite(feed(sequence, [7])).all()
    sequence.rewind(3)
    np.testing.assert_array_equal(feed(sequence, ids[3:]), exact[3:])
    feed(sequence, [7])
    sequence.reset()
    np.testing.assert_array_equal(feed(sequence, ids, 1), exact)
    model.close()


@pytest.mark.parametrize("fed", [0, 10, 16])
def test_overflow_names_both_numbers(fed, run):
    model = run("llama-gqa", n_ctx=16)
    sequence = session(model)
    if fed:
        feed(sequence, long_ids(fed))
    with pytest.raises(ContextOverflow, match="the prompt has 17 tokens, the context holds 16") as raised:
        sequence.feed(long_ids(17 - fed))
    assert (raised.value.n_prompt, raised.value.n_ctx) == (17, 16)
    assert sequence.pos == fed
    if fed < 16:
        feed(sequence, long_ids(16)[fed:])  # to the last slot


@pytest.mark.parametrize("token", [-1, 96, 2**40])
def test_ids_beyond_the_vocabulary_are_refused(token, run):
    sequence = session(run("llama-gqa", n_ctx=16))
    with pytest.raises(PromptError, match=f"token id {token} is not between 0 and 95"):
        sequence.feed([5, token])
    assert sequence.pos == 0


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "gpt2"])
@pytest.mark.parametrize(
    ("fed", "keep", "kept"), [(16, 0, 8), (16, 4, 10), (15, 4, 9), (16, 15, 15), (9, 0, 4)]
)
def test_context_shift_is_a_fresh_prompt_of_what_is_kept(name, fed, keep, kept, run):
    """The first `keep` tokens and the later half of the rest, rounded down."""
    ids, model = long_ids(32), run(name, n_ctx=16)
    sequence = session(model)
    feed(sequence, ids[:fed])
    sequence.shift(keep)
    expected = ids[:keep] + ids[fed - (kept - keep) : fed]
    assert sequence.ids == expected and len(expected) == kept
    np.testing.assert_array_equal(feed(sequence, ids[31:]), logits(model, [*expected, ids[31]])[-1:])


def test_a_shift_that_makes_no_room_is_refused(run):
    """Else the next token would be written beyond the memory of the context."""
    sequence = session(run("llama-gqa", n_ctx=16))
    feed(sequence, long_ids(16))
    with pytest.raises(ValueError, match="16"):
        sequence.shift(16)
