"""Streaming: pushes and flush are the decoded text, cut at sound places; stop strings, however text comes."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from tinydrug.errors import ConfigError
from tinydrug.formats.checkpoint import open_checkpoint
from tinydrug.text.detokenizer import Detokenizer, StopStrings
from tinydrug.text.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
SMILE = "😀"


@functools.cache
def fixture(kind):
    """The tokenizer of a fixture: "bpe" or "spm" as files, or with "gguf" before it as GGUF metadata."""
    checkpoint = SimpleNamespace(path=Path(kind), folder=None, config={}, generation_config={}, metadata=None)
    if kind.startswith("gguf "):
        golden = json.loads((GOLDEN / "text_gguf.json").read_text("utf-8"))
        checkpoint.metadata = golden[f"{kind.removeprefix('gguf ')}_metadata"] | {
            "tokenizer.ggml.pre": "smollm"
        }
    else:
        checkpoint.folder = GOLDEN / "text" / kind
    return load_tokenizer(checkpoint)


@functools.cache
def reference_decoder(kind):
    """What the tokenizers library decodes tokens with."""
    if kind.endswith("bpe"):
        return tokenizers.Tokenizer.from_file(str(GOLDEN / "text" / "bpe" / "tokenizer.json")).decoder
    strip = decoders.Strip(content=" ", left=1)
    return decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )


def stream(tokenizer, ids, **options):
    detokenizer = Detokenizer(tokenizer, **options)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def ids_of(tokenizer):
    """Lists of ids: any, and many bytes among them, which make whole and broken characters."""
    text_bytes = st.text("aé한😀\n ", max_size=4).map(lambda text: tokenizer.encode(text, bos=False))
    one = st.integers(0, tokenizer.vocab_size + 3).map(lambda token_id: [token_id])
    few = st.integers(0, 262).map(lambda token_id: [token_id])  # bytes and special tokens lie here
    return st.lists(st.one_of(text_bytes, one, few), max_size=20).map(lambda lists: sum(lists, []))


@pytest.mark.parametrize("kind", ["bpe", "spm", "gguf bpe", "gguf spm"])
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_stream_equals_the_libraries_decoders(kind, data):
    tokenizer, skip = fixture(kind), data.draw(st.booleans())
    ids = data.draw(ids_of(tokenizer))
    known = [i for i in ids if i < tokenizer.vocab_size and not (skip and i in tokenizer.special_ids)]
    expected = reference_decoder(kind).decode([tokenizer.backend.token(i) for i in known])
    assert "".join(stream(tokenizer, ids, skip_special=skip)) == expected
    assert tokenizer.decode(ids, skip_special=skip) == expected


@pytest.mark.parametrize("model", ["smollm2", "stories260k"])
def test_stream_of_the_real_models(request, model):
    tokenizer = load_tokenizer(open_checkpoint(request.getfixturevalue(model)))

    @settings(max_examples=100, deadline=None)
    @given(ids_of(tokenizer))
    def check(ids):
        assert "".join(stream(tokenizer, ids)) == tokenizer.backend._tokenizer.decode(ids)

    check()


@pytest.mark.parametrize("kind", ["bpe", "spm", "gguf bpe", "gguf spm"])
@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_sound_text_streams_soundly(kind, text):
    tokenizer = fixture(kind)
    parts = stream(tokenizer, tokenizer.encode(text, special=False))
    assert "".join(parts) == (text.replace("\u2581", " ") if "spm" in kind else text)
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


def test_half_characters_wait():
    bpe, spm = fixture("bpe"), fixture("spm")
    smile = [spm.backend.token_id(f"<0x{byte:02X}>") for byte in SMILE.encode()]
    a = spm.backend.token_id("\u2581a")
    assert stream(bpe, bpe.encode(SMILE + "a", bos=False)) == ["", "", SMILE, "a", ""]
    # a byte-fallback run ends where the next token is no byte, or in the flush
    assert stream(spm, [a, *smile, a]) == ["a", "", "", "", "", SMILE + " a", ""]
    assert stream(spm, [a, *smile]) == ["a", "", "", "", "", SMILE]
    # one broken character spoils its run, as in Hugging Face's decoder; in byte-level BPE only itself
    assert stream(spm, [a, *smile, smile[0], a])[-2:] == ["\ufffd" * 5 + " a", ""]
    cut = bpe.encode(SMILE, bos=False)[:-1]
    assert "".join(stream(bpe, [*cut, *bpe.encode("a", bos=False)])) == "\ufffda"
    assert stream(bpe, cut)[-1] == "\ufffd"


def test_space_at_the_start():
    spm = fixture("spm")
    ids = spm.encode("the a", bos=False)
    assert "".join(stream(spm, ids)) == "the a"
    assert "".join(stream(spm, ids, continues=True)) == " the a"
    assert "".join(stream(spm, [1, *ids])) == "the a"
    assert "".join(stream(spm, [1, *ids], skip_special=False)) == "<s> the a"


def stopped(text, stops):
    """Character by character: (text before the first stop string to be complete, whether there is one)."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(map(len, met))], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("ab\n", max_size=5), max_size=10),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings(parts, stops):
    stopper, shown, hit = StopStrings(stops), "", False
    for count, part in enumerate(parts, 1):
        text, hit = stopper.push(part)
        shown += text
        seen = "".join(parts[:count])
        if hit:
            assert stopper.push("more") == ("", True)
            break
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        longest = max(
            (
                n
                for n in range(len(seen) + 1)
                if any(s[:n] == seen[len(seen) - n :] for s in stops if n < len(s))
            ),
            default=0,
        )
        assert len(held) == longest  # no more than what may become a stop string
    shown += stopper.flush()
    assert (shown, hit) == stopped("".join(parts), stops)
    assert stopper.flush() == ""


@pytest.mark.parametrize("stops", [[""], ["a", ""], [5], [None]])
def test_bad_stop_strings(stops):
    with pytest.raises(ConfigError, match="stop"):
        StopStrings(stops)
