"""Tokenizers: ids as in transformers, sentencepiece and llama.cpp; BOS, EOS, special tokens; bad files."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydrug.errors import BadModelFile, ConfigError, PromptError, TinydrugError, UnsupportedModel
from tinydrug.formats.checkpoint import open_checkpoint
from tinydrug.text import folder_vocab
from tinydrug.text.pretokenizers import PRE_TOKENIZERS
from tinydrug.text.sentencepiece_backend import AddedToken, SentencePieceBackend
from tinydrug.text.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
LICENSE = (GOLDEN.parent.parent / "LICENSE").read_text()
IDS = json.loads((GOLDEN / "text_ids.json").read_text("utf-8"))
GGUF = json.loads((GOLDEN / "text_gguf.json").read_text("utf-8"))
REAL = json.loads((GOLDEN / "text_real.json").read_text("utf-8"))
TEXTS = IDS["texts"]


def load(folder=None, metadata=None, config=None, generation_config=None):
    checkpoint = SimpleNamespace(
        path=folder or Path("model.gguf"),
        folder=folder,
        config=config or {},
        generation_config=generation_config or {},
        metadata=metadata,
    )
    return load_tokenizer(checkpoint)


def digest(ids):
    return {"n": len(ids), "sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest()}


def gguf(kind="bpe", **fields):
    """GGUF metadata of a fixture's vocabulary, with some tokenizer.ggml fields replaced (None: left out)."""
    metadata = dict(GGUF[f"{kind}_metadata"]) | ({"tokenizer.ggml.pre": "gpt-2"} if kind == "bpe" else {})
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return {key: value for key, value in metadata.items() if value is not None}


@pytest.fixture
def folder(tmp_path):
    """folder(kind, **fields) -> a copy of a fixture, with these fields in its tokenizer_config.json."""

    def make(kind="bpe", **fields):
        path = tmp_path / "model"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(GOLDEN / "text" / kind, path)
        config = json.loads((path / "tokenizer_config.json").read_text()) | fields
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        return path

    return make


# --- the same ids as the libraries that define them ---


@pytest.mark.parametrize("kind", ["bpe", "legacy", "not legacy"])
def test_folder_equals_transformers(folder, kind):
    golden = IDS["bpe"] if kind == "bpe" else IDS["spm"][kind]
    tokenizer = load(folder("bpe") if kind == "bpe" else folder("spm", legacy=kind == "legacy"))
    for text, ids, decoded in zip(TEXTS, golden["texts"], golden["decoded"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == decoded
    mixed = zip(golden["mixed"], golden["mixed_decoded"], golden["mixed_decoded_special"], strict=True)
    for case, decoded, with_special in mixed:
        assert [tokenizer.bos_id, *tokenizer.encode(case["text"], bos=False)] == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == decoded
        assert tokenizer.decode(case["ids"], skip_special=False) == with_special
    assert digest(tokenizer.encode(LICENSE)) == golden["license"]


@pytest.mark.parametrize("name", GGUF["cuts"])
def test_pre_tokenizers_equal_llama_cpp(name):
    assert load(metadata=gguf(pre=name)).encode(GGUF["text"], bos=False) == GGUF["cuts"][name]


def test_every_pre_tokenizer_has_golden_ids():
    assert set(PRE_TOKENIZERS.values()) == {PRE_TOKENIZERS[name] for name in GGUF["cuts"]}


def test_words_that_no_merge_makes():
    tokens, types = (
        GGUF["bpe_metadata"]["tokenizer.ggml.tokens"],
        GGUF["bpe_metadata"]["tokenizer.ggml.token_type"],
    )
    fields = {"tokens": [*tokens, "zebra"], "token_type": [*types, 1], "add_bos_token": False}
    assert load(metadata=gguf(pre="llama-bpe", **fields)).encode("zebra") == [801]
    assert 801 not in load(metadata=gguf(pre="dbrx", **fields)).encode("zebra")


TYPED = ["{}", "say {}", "{} {}!", " {}a{}", "a<|im_<{}"]


@pytest.mark.parametrize("text", TYPED)
@pytest.mark.parametrize("kind", ["bpe", "spm", "spm not legacy", "gguf bpe", "gguf spm"])
def test_special_tokens_that_someone_types_are_text(kind, text, folder):
    """Between markers of a template: the ids of the markers, and between them those of the plain text."""
    name = kind.split()[0]
    given = {"metadata": gguf(kind.split()[-1])} if name == "gguf" else {"folder": folder(name)}
    if kind == "spm not legacy":
        given = {"folder": folder("spm", legacy=False)}
    tokenizer = load(**given)
    special = [tokenizer.backend.token(i) for i in sorted(tokenizer.special_ids)]
    for token, mark in zip(special, special[1:] + special[:1], strict=True):
        typed = text.format(token, token)
        ids = tokenizer.encode(f"{mark}{tokenizer.guard(typed)}{mark}\n", bos=False)
        plain = tokenizer.encode(f"{mark}{typed.replace(token, 'x')}{mark}\n", bos=False)
        assert [i for i in ids if i in tokenizer.special_ids] == [plain[0]] * 2 == [ids[0]] * 2
        inner = ids[1 : ids.index(ids[0], 1)]
        if kind == "spm not legacy":  # text after a marker gets no space in front, so no ids to compare with
            assert b"".join(map(tokenizer.token_bytes, inner)).decode() == typed
        else:
            assert inner == tokenizer.encode(typed, bos=False, special=False)
    assert tokenizer.guard("no token <|nor this") == "no token <|nor this"


def test_user_defined_tokens_are_not_special():
    for tokenizer, token_id in ((load(metadata=gguf()), 800), (load(metadata=gguf("spm")), 4)):
        assert tokenizer.encode("<tool>", bos=False, special=False) == [token_id]
        assert tokenizer.decode([token_id]) == "<tool>"


def test_gguf_sentencepiece_equals_llama_cpp():
    tokenizer = load(metadata=gguf("spm"))
    for text, ids in zip(TEXTS, GGUF["spm"], strict=True):
        assert tokenizer.encode(text, bos=False) == ids, text
    for special, cases in ((True, GGUF["spm_mixed"]), (False, GGUF["spm_inert"])):
        for case in cases:
            assert tokenizer.encode(case["text"], bos=False, special=special) == case["ids"], case["text"]


def test_gguf_equals_the_files_it_was_made_from(folder):
    for kind in ("bpe", "spm"):
        of_folder, of_gguf = load(folder(kind)), load(metadata=gguf(kind, add_bos_token=True))
        assert of_gguf.encode(LICENSE) == of_folder.encode(LICENSE)
        for text in TEXTS:
            ids = of_folder.encode(text)
            assert of_gguf.encode(text) == ids
            assert of_gguf.decode(ids) == of_folder.decode(ids)


def test_smollm2_equals_llama_cpp(smollm2, shared):
    tokenizer, golden = load_tokenizer(open_checkpoint(smollm2)), REAL["smollm2"]
    for text, ids in zip(TEXTS, golden["texts"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text
    for special, cases in ((True, golden["mixed"]), (False, golden["inert"])):
        for case in cases:
            assert tokenizer.encode(case["text"], special=special) == case["ids"], case["text"]
    assert digest(tokenizer.encode(LICENSE)) == golden["license"]
    assert tokenizer.prefix == () and tokenizer.eos_ids == {0, 2}
    if shared:
        wikitext = (shared / "text" / "wikitext2-valid.txt").read_text("utf-8")[:9000]
        assert digest(tokenizer.encode(wikitext)) == golden["wikitext"]


def test_stories260k_equals_transformers_and_sentencepiece(stories260k, shared, tmp_path):
    tokenizer, golden = load_tokenizer(open_checkpoint(stories260k)), REAL["stories_json"]
    wikitext = (shared / "text" / "wikitext2-valid.txt").read_text("utf-8")[:9000]
    for text, ids, decoded in zip(TEXTS, golden["texts"], golden["decoded"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == decoded
    for case, decoded in zip(golden["mixed"], golden["mixed_decoded"], strict=True):
        assert [1, *tokenizer.encode(case["text"], bos=False)] == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == decoded
    assert digest(tokenizer.encode(wikitext)) == golden["wikitext"]
    assert tokenizer.bos_id == 1 and tokenizer.eos_ids == {2}

    shutil.copy(stories260k / "tokenizer.model", tmp_path)
    tokenizer, golden = load(tmp_path), REAL["stories_model"]
    for text, ids in zip(TEXTS, golden["texts"], strict=True):
        assert tokenizer.encode(text) == ids, text
    assert digest(tokenizer.encode(wikitext, special=False)) == golden["wikitext"]  # it has many a <unk>
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


# --- BOS, EOS, special tokens ---


@pytest.mark.parametrize(
    "text, bos, special, expected",
    [
        ("a", None, True, [0, 66]),
        ("a", True, True, [0, 66]),
        ("a", False, True, [66]),
        ("<|begin|>a", None, True, [0, 66]),
        ("<|begin|>a", True, True, [0, 66]),
        ("<|begin|>a", False, True, [0, 66]),
        ("<|begin|><|begin|>", True, True, [0, 0]),
        ("", None, True, [0]),
        ("", False, True, []),
        ("<tool>", False, False, [800]),
    ],
)
def test_bos(folder, text, bos, special, expected):
    assert load(folder()).encode(text, bos=bos, special=special) == expected


def test_special_text_can_be_inert(folder):
    for tokenizer, text in ((load(folder()), "<|begin|>"), (load(folder("spm")), "</s>")):
        ids = tokenizer.encode(f"x{text}y", bos=False, special=False)
        assert not tokenizer.special_ids & {*ids}
        assert tokenizer.decode(ids) == f"x{text}y"
        assert tokenizer.special_ids & {*tokenizer.encode(f"x{text}y", bos=False)}


@pytest.mark.parametrize(
    "kind, fields, prefix, suffix",
    [
        ("spm", {}, (1,), ()),
        ("spm", {"add_bos_token": False}, (), ()),
        ("spm", {"add_eos_token": True}, (1,), (2,)),
        ("spm", {"bos_token": None}, (), ()),
        ("bpe", {"add_bos_token": False}, (0,), ()),  # tokenizer.json speaks for itself
    ],
)
def test_bos_rule_of_a_folder(folder, kind, fields, prefix, suffix):
    tokenizer = load(folder(kind, **fields))
    assert (tokenizer.prefix, tokenizer.suffix) == (prefix, suffix)
    assert tokenizer.encode("a")[-1] == (suffix or tokenizer.encode("a", bos=False))[-1]


@pytest.mark.parametrize(
    "kind, fields, prefix, suffix",
    [
        ("bpe", {}, (), ()),
        ("bpe", {"pre": "llama-bpe"}, (0,), ()),
        ("bpe", {"pre": "llama-bpe", "add_bos_token": False}, (), ()),
        ("bpe", {"add_bos_token": True, "add_eos_token": True}, (0,), (1,)),
        ("bpe", {"add_bos_token": True, "bos_token_id": None}, (), ()),
        ("spm", {}, (1,), ()),
        ("spm", {"add_bos_token": False}, (), ()),
    ],
)
def test_bos_rule_of_gguf(kind, fields, prefix, suffix):
    tokenizer = load(metadata=gguf(kind, **fields))
    assert (tokenizer.prefix, tokenizer.suffix) == (prefix, suffix)


def test_no_bos_to_add():
    with pytest.raises(ConfigError, match="no BOS"):
        load(metadata=gguf(bos_token_id=None)).encode("a", bos=True)


def test_eos_ids_are_united(folder):
    assert load(folder()).eos_ids == {1}
    assert load(folder(), config={"eos_token_id": [5, 6]}, generation_config={"eos_token_id": 7}).eos_ids == {
        1,
        5,
        6,
        7,
    }
    assert load(metadata=gguf(eos_token_id=9, eot_token_id=5, eom_token_id=6)).eos_ids == {
        1,
        5,
        6,
        9,
    }  # 1: <|end|>
    assert load(metadata=gguf("spm", eos_token_id=None)).eos_ids == {2}  # </s>
    with pytest.raises(ConfigError, match="eos_token_id"):
        load(folder(), config={"eos_token_id": "2"})


def test_names_of_special_tokens(folder):
    path = folder(bos_token={"content": "<|begin|>"}, pad_token=None)
    assert load(path).special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (path / "special_tokens_map.json").write_text(
        '{"bos_token": "<|end|>", "unk_token": {"content": "<tool>"}}'
    )
    tokenizer = load(path)
    assert tokenizer.special_tokens == {"bos_token": "<|end|>", "eos_token": "<|end|>", "unk_token": "<tool>"}
    assert tokenizer.bos_id == 1 and 800 in tokenizer.special_ids  # named tokens are special
    (path / "tokenizer_config.json").write_text("{}")
    (path / "special_tokens_map.json").unlink()
    assert load(path).bos_id is None
    tokenizer = load(path, config={"bos_token_id": 0, "eos_token_id": 1})
    assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


def test_pieces(folder):
    bpe, spm = load(folder()), load(folder("spm"))
    assert bpe.vocab_size == 801 and spm.vocab_size == 561
    assert [bpe.token_bytes(i) for i in bpe.encode("é a", bos=False)] == [b"\xc3", b"\xa9", b" a"]
    assert bpe.token_text(bpe.encode("é", bos=False)[0]) == "\ufffd"
    assert [spm.token_bytes(i) for i in spm.encode("q", bos=False)] == [b" ", b"q"]
    assert spm.token_bytes(5 + 0xE2) == b"\xe2"
    for tokenizer in (bpe, spm):
        assert tokenizer.token_bytes(10**6) == tokenizer.token_bytes(-1) == b""
        assert tokenizer.decode([10**6, -1]) == ""


def test_added_tokens_take_the_space_they_ask_for():
    added = {
        600: AddedToken("<left>", lstrip=True),
        601: AddedToken("<right>", rstrip=True),
        602: AddedToken("word", single_word=True),
        603: AddedToken("<tool><tool>", special=False),
    }
    model = (GOLDEN / "text" / "spm" / "tokenizer.model").read_bytes()
    backend = SentencePieceBackend(model, "tokenizer.model", added=added)
    a = backend.encode("a", True)
    assert backend.encode("a  <left>a", True) == [*a, 600, *a]
    assert backend.encode("a<right> \n a", True) == [*a, 601, *a]
    assert backend.encode("word", True) == [602]
    assert 602 not in backend.encode("words", True)
    assert backend.encode("<tool><tool>", False) == [603]


def test_no_space_prefix(folder):
    with_space, without = load(folder("spm")), load(folder("spm", add_prefix_space=False))
    assert with_space.encode("the", bos=False) == [with_space.backend.token_id("\u2581the")]
    assert without.decode(without.encode(" the a</s> the")) == " the a the"
    assert without.encode(" the", bos=False) == with_space.encode("the", bos=False)
    assert load(metadata=gguf("spm", add_space_prefix=False)).encode(" the", bos=False) == with_space.encode(
        "the", bos=False
    )


# --- chat templates, fingerprint ---


def test_chat_template_precedence(folder):
    assert load(folder()).chat_template is None
    path = folder(chat_template="config")
    assert load(path).chat_template == "config"
    path = folder(chat_template=[{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}])
    assert load(path).chat_templates == {"default": "d", "rag": "r"}
    (path / "chat_template.jinja").write_text("file")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("é", encoding="utf-8")
    assert load(path).chat_templates == {"default": "file", "rag": "r", "tool_use": "é"}
    metadata = gguf() | {
        "tokenizer.chat_template": "g",
        "tokenizer.chat_template.rag": "r",
        "tokenizer.chat_templates": ["rag"],
    }
    assert load(metadata=metadata).chat_templates == {"default": "g", "rag": "r"}


def test_fingerprint(folder):
    same = {load(folder()).fingerprint(), load(folder()).fingerprint()}
    assert len(same) == 1 and len(same.pop()) == 64
    tokenizers = [
        load(folder()),
        load(folder("spm")),
        load(folder("spm", legacy=False)),
        load(folder("spm", add_bos_token=False)),
    ]
    tokenizers += [load(metadata=gguf()), load(metadata=gguf(pre="smollm")), load(metadata=gguf("spm"))]
    assert len({tokenizer.fingerprint() for tokenizer in tokenizers}) == len(tokenizers)


# --- bad input ---


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_text_that_is_not_unicode(folder, kind):
    with pytest.raises(PromptError, match="character 2"):
        load(folder(kind)).encode("ab\udc80")


BAD_FILES = [
    ("tokenizer.json", b"", "tokenizer.json"),
    ("tokenizer.json", b"{}", "tokenizer.json"),
    ("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE"', "tokenizer.json"),
    ("tokenizer.json", b"\xff\xfe", "tokenizer.json"),
    ("tokenizer_config.json", b"[]", "tokenizer_config.json"),
    ("tokenizer_config.json", b"{", "tokenizer_config.json"),
    ("tokenizer_config.json", b'{"a": "\xff"}', "tokenizer_config.json"),
    ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json"),
    ("tokenizer_config.json", b'{"bos_token": 3}', "bos_token"),
    ("tokenizer_config.json", b'{"bos_token": {"content": 3}}', "bos_token"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": []}', "added_tokens_decoder"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "added_tokens_decoder"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": {"content": ""}}}', "added_tokens_decoder"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": "a"}}', "added_tokens_decoder"),
    (
        "tokenizer_config.json",
        b'{"added_tokens_decoder": {"5": {"content": "a", "special": 1}}}',
        "added_tokens",
    ),
    ("tokenizer_config.json", b'{"additional_special_tokens": "a"}', "additional_special_tokens"),
    ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "chat_template"),
    ("special_tokens_map.json", b"null", "special_tokens_map.json"),
    ("chat_template.jinja", b"\xff", "chat_template.jinja"),
]


@pytest.mark.parametrize("name, content, message", BAD_FILES)
def test_bad_files(folder, name, content, message):
    path = folder()
    (path / name).write_bytes(content)
    with pytest.raises(BadModelFile, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x0a", None], ids=["empty", "text", "cut", "half"])
def test_bad_sentencepiece_files(folder, content):
    path = folder("spm") / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:4000] if content is None else content)
    with pytest.raises(BadModelFile, match="tokenizer.model"):
        load(path.parent)


def test_missing_and_oversized_files(tmp_path, folder, monkeypatch):
    with pytest.raises(BadModelFile, match="tokenizer.json or tokenizer.model"):
        load(tmp_path)
    with pytest.raises(BadModelFile, match="no tokenizer"):
        load(None, metadata={})
    monkeypatch.setattr(folder_vocab, "MAX_BYTES", 1000)
    with pytest.raises(BadModelFile, match="tokenizer.json: larger"):
        load(folder())


@pytest.mark.parametrize(
    "section, value, error",
    [
        ("decoder", None, UnsupportedModel),
        ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}, UnsupportedModel),
        (
            "decoder",
            {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
            UnsupportedModel,
        ),
        (
            "decoder",
            {
                "type": "Sequence",
                "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 1}],
            },
            UnsupportedModel,
        ),
        (
            "decoder",
            {
                "type": "Sequence",
                "decoders": [{"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}, {"type": "Fuse"}],
            },
            UnsupportedModel,
        ),
        (
            "post_processor",
            {"type": "BertProcessing", "sep": ["<|end|>", 1], "cls": ["<|begin|>", 0]},
            UnsupportedModel,
        ),
        (
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "[B]", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {},
            },
            BadModelFile,
        ),
    ],
)
def test_tokenizer_json_of_unknown_kinds(folder, section, value, error):
    path = folder() / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {section: value}))
    with pytest.raises(error, match="tokenizer.json"):
        load(path.parent)


BAD_GGUF = [
    ({"model": "t5"}, UnsupportedModel, "gpt2, llama"),
    ({"model": None}, UnsupportedModel, "tokenizer.ggml.model"),
    ({"pre": "nonsense"}, UnsupportedModel, "smollm"),
    ({"pre": 5}, BadModelFile, "tokenizer.ggml.pre"),
    ({"model": ["gpt2"]}, BadModelFile, "tokenizer.ggml.model"),
    ({"tokens": []}, BadModelFile, "empty"),
    ({"tokens": "abc"}, BadModelFile, "tokens"),
    ({"tokens": ["a", 1]}, BadModelFile, "tokens"),
    ({"tokens": ["a", "b", "a"]}, BadModelFile, "'a' stands twice"),
    ({"token_type": [1]}, BadModelFile, "1 values for 801"),
    ({"token_type": [7] * 801}, BadModelFile, "token_type"),
    ({"merges": None}, BadModelFile, "merges"),
    ({"merges": ["a"]}, BadModelFile, "merges"),
    ({"merges": ["zz qq"]}, BadModelFile, "merges"),
    ({"bos_token_id": 801}, BadModelFile, "bos_token_id"),
    ({"eos_token_id": -1}, BadModelFile, "eos_token_id"),
    ({"eot_token_id": "1"}, BadModelFile, "eot_token_id"),
    ({"add_bos_token": 1}, BadModelFile, "add_bos_token"),
]
BAD_GGUF_SPM = [
    ({"scores": None}, BadModelFile, "scores"),
    ({"scores": [0.0]}, BadModelFile, "1 values for 560"),
    ({"scores": [1e300] * 560}, BadModelFile, "scores"),
    ({"tokens": [""] + [f"t{i}" for i in range(559)]}, BadModelFile, "SentencePiece"),
    ({"add_space_prefix": "yes"}, BadModelFile, "add_space_prefix"),
]


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_bad_gguf(kind):
    for fields, error, message in BAD_GGUF if kind == "bpe" else BAD_GGUF_SPM:
        with pytest.raises(error, match=message) as caught:
            load(metadata=gguf(kind, **fields))
        assert "model.gguf" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(BadModelFile, match="chat_template"):
        load(metadata=gguf(kind) | {"tokenizer.chat_template": 5})


def test_gguf_without_types_and_pre(caplog):
    tokenizer = load(metadata=gguf(pre=None, token_type=None))
    assert "tokenizer.ggml.pre" in caplog.text
    assert tokenizer.special_ids == set()
    assert tokenizer.decode(tokenizer.encode(LICENSE)) == LICENSE


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["bpe/tokenizer.json", "spm/tokenizer.model"]), st.data())
def test_damaged_files_raise_nothing_else(tmp_path_factory, name, data):
    content = bytearray((GOLDEN / "text" / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged")
    (path / Path(name).name).write_bytes(
        content[: data.draw(st.sampled_from([len(content), len(content) // 2]))]
    )
    try:
        tokenizer = load(path)
    except TinydrugError:
        return
    tokenizer.decode(tokenizer.encode("some text <|end|> 12"))


# --- in use ---


def test_threads_share_a_tokenizer(folder):
    tokenizer = load(folder())
    expected = {special: tokenizer.encode("<|end|>" + LICENSE, special=special) for special in (True, False)}
    wrong = []

    def work(special):
        for _ in range(5):
            if tokenizer.encode("<|end|>" + LICENSE, special=special) != expected[special]:
                wrong.append(special)

    threads = [threading.Thread(target=work, args=(index % 2 == 0,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_import_is_light():
    modules = ("tokenizer", "folder_vocab", "gguf_vocab", "chat", "detokenizer")
    heavy = {"tokenizers", "sentencepiece", "jinja2", "numpy"}
    imports = "; ".join(f"import tinydrug.text.{name}" for name in modules)
    code = f"import sys; {imports}; print({heavy} & {{*sys.modules}})"
    root = GOLDEN.parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout == "set()\n"
