"""Writes the tokenizer and chat fixtures and golden values from transformers, sentencepiece and llama.cpp.

    python tests/golden/make_text.py --llama-tokenize BIN --smollm2 GGUF --stories FOLDER --wikitext FILE

Needs transformers beside the package. BIN is llama.cpp's llama-tokenize, the independent witness for GGUF
vocabularies; FOLDER holds stories260k; FILE is WikiText-2's validation text. What it writes is committed.
"""

import argparse
import hashlib
import io
import json
import subprocess
import tempfile
from pathlib import Path

import gguf
import jinja2
import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers.tokenization_utils_base import generate_merges

from tinydrug.text.chat import TEMPLATES
from tinydrug.text.pretokenizers import PRE_TOKENIZERS

GOLDEN = Path(__file__).parent
WIKITEXT = 9000  # characters, some 2,000 tokens
LICENSE = GOLDEN.parent.parent / "LICENSE"
TEXTS = [
    "",
    "a",
    "Hello, world!",
    "Once upon a time, there was a little girl named Lily.",
    "don't can't I'LL we've SHE'D they're 'tis it’s ſ'ſ",
    "1 22 333 4444 55555 3.14159 1,000,000 ٣٤ ½ Ⅷ ²",
    " one leading space",
    "two  spaces,   three,    four  ",
    "tabs\tand\nnewlines\n\nand\r\nboth\n \n  \n\t\tend\n\n\n",
    "def f(x: int) -> str:\n    return f'{x!r}' if x >= 0 else \"neg\"  # why?\n",
    '{"key": [1, 2.5, null], "b": "\\u00e9"}',
    "Grüße aus Köln, Ελληνικά, Привет, мир! Zażółć gęślą jaźń",
    "日本語のテキスト、中文文本。한국어 텍스트",
    "ไทย हिन्दी বাংলা العربية עברית",
    "e\u0301 combining, \u200d joiner, \u00a0 no-break, \u3000 wide, \u00ad soft, \ufeff mark",
    "😀 🚀🚀 👩\u200d👩\u200d👧 🇫🇷 ❤\ufe0f",
    "\x00\x01\x7f control \ufffd replacement",
    "\u2581 lower block \u2581\u2581",
    "camelCase XMLHttpRequest snake_case ABCdef ABC123def",
    "!!! ... --- *** ((([[[{{{ <|x|> </x> http://example.com/a?b=c&d=e#f",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + " " * 40 + "b",
    "In a hole in the ground there lived a hobbit. Not a nasty, dirty, wet hole.",
]
SPECIAL_TEXTS = ["{0}", "{0}a", "a{0}b", " {0} {1} ", "{0}{0}user\n{1}x {1}\n", "{0}é{1}😀  {0}"]
MESSAGES = {
    "one": [{"role": "user", "content": "Hello <there> & 'you'"}],
    "turns": [
        {"role": "user", "content": " What is 2+2? "},
        {"role": "assistant", "content": "Four.\n"},
        {"role": "user", "content": "Sure?\n\n```py\nprint(2+2)\n```"},
    ],
    "system": [
        {"role": "system", "content": "Be brief. Sei höflich 😀"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ],
    "wrong order": [{"role": "assistant", "content": "I first"}, {"role": "user", "content": "No"}],
}
# Each uses something of transformers' Jinja that plain Jinja has not, or decides otherwise.
CHAT_TEMPLATES = TEMPLATES | {
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",  # noqa: E501
    "white space": """
{% for message in messages %}
    {% if message.role == 'user' %}
    U: {{ message.content }}
      {%- else %}
  {{ message.content }}
    {% endif %}

{% endfor %}
    {# a comment #}
  end {{ add_generation_prompt }}
""",
    "namespace": """{% set ns = namespace(n=0, last='') %}
{% for message in messages %}{% set ns.n = ns.n + 1 %}{% set ns.last = message.role %}{% endfor %}
{{ ns.n }} {{ ns.last }} {{ tools is none }} {{ documents is defined }} {{ missing is defined }}{{ missing }}
""",
    "loop controls": """{% for message in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}
{{ loop.index }}: {{ message.content[:5] }}{% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}""",
    "json": """{{ messages | tojson }}
{{ messages | tojson(indent=2) }}
{{ {'z': 1, 'a': 'é'} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}
{{ eos_token }}
{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}{% endfor %}""",
    "macro": """{% macro turn(role, text) -%}<{{ role }}>{{ text | trim }}</{{ role }}>{%- endmacro %}
{{ bos_token }}{% for m in messages %}{{ turn(m['role'], m['content']) }}{% endfor %}{{ kind | upper }}""",
}


def train_bpe() -> tokenizers.Tokenizer:
    """A byte-level BPE whose merges run over words, digits and line ends, so that its ids show every cut."""
    corpus = [LICENSE.read_text(), *TEXTS * 30]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=10,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return tokenizer


def train_spm() -> bytes:
    """A SentencePiece BPE model with the settings of Llama's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*LICENSE.read_text().splitlines(), *TEXTS * 3]),
        model_writer=model,
        model_type="bpe",
        vocab_size=560,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        control_symbols=["[CONTROL]"],
        user_defined_symbols=["<tool>"],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def llama_spm_by_transformers(model: sentencepiece.SentencePieceProcessor, added: dict, legacy: bool):
    """transformers' Llama tokenizer over this model's pieces; legacy as LlamaConverter makes it."""
    pieces = [model.id_to_piece(i) for i in range(model.piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = generate_merges(vocab, {piece: model.get_score(i) for i, piece in enumerate(pieces)})
    fast = transformers.LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True)
    if legacy:
        fast.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        fast.backend_tokenizer.pre_tokenizer = None
    fast.add_tokens([tokenizers.AddedToken(**fields, normalized=False) for fields in added.values()])
    return fast


def bpe_metadata(tokenizer: tokenizers.Tokenizer) -> dict:
    """The fixture's vocabulary as GGUF has it, but for the pre-tokenizer."""
    state = json.loads(tokenizer.to_str())
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    special = {token["content"]: token["special"] for token in state["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [{True: 3, False: 4, None: 1}[special.get(token)] for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def spm_metadata(model: sentencepiece.SentencePieceProcessor) -> dict:
    def kind(i):
        return next(
            (n for n, yes in ((2, model.is_unknown), (3, model.is_control), (6, model.is_byte)) if yes(i)), 1
        )

    pieces = [model.id_to_piece(i) for i in range(model.piece_size())]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(model.piece_size())],
        "tokenizer.ggml.token_type": [4 if piece == "<tool>" else kind(i) for i, piece in enumerate(pieces)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


class LlamaTokenize:
    """llama.cpp's own tokenizer, asked through its command."""

    def __init__(self, command: Path, folder: Path):
        self.command, self.folder = command, folder

    def write(self, metadata: dict) -> Path:
        """A GGUF file with this vocabulary and no tensors."""
        path = self.folder / "vocab.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in metadata.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_string(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    def ids(self, path: Path, text: str, special: bool = True, bos: bool = False) -> list[int]:
        if not text:
            return []  # the command refuses an empty prompt
        file = self.folder / "text"
        file.write_bytes(text.encode())
        options = ["--ids", "--no-escape", "--log-disable"]
        options += [] if bos else ["--no-bos"]
        options += [] if special else ["--no-parse-special"]
        run = subprocess.run(
            [self.command, "-m", path, "-f", file, *options], capture_output=True, check=True
        )
        return json.loads(run.stdout)


def make_bpe() -> dict:
    """Fixture text/bpe, and what transformers makes of it."""
    folder = GOLDEN / "text" / "bpe"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(train_bpe().to_str() + "\n", encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
    return by_transformers(
        transformers.AutoTokenizer.from_pretrained(folder), ["<|begin|>", "<|end|>", "<tool>"]
    )


def make_spm() -> dict:
    """Fixture text/spm, and what transformers makes of its pieces."""
    folder = GOLDEN / "text" / "spm"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_spm())
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    contents = ["<unk>", "<s>", "</s>", "[CONTROL]", "<tool>"]
    added = {
        str(i): {"content": content, "special": content != "<tool>"} for i, content in enumerate(contents)
    }
    added |= {str(model.piece_size()): {"content": "<extra>", "special": True}}
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": added, "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
    special = ["<s>", "<tool>", "<extra>"]
    found = {"legacy": by_transformers(llama_spm_by_transformers(model, added, True), special)}
    found["not legacy"] = by_transformers(llama_spm_by_transformers(model, added, False), special)
    newer = found["not legacy"]
    for index, text in enumerate(TEXTS):
        if text.startswith((" ", "\u2581")):  # Metaspace gives no second space here, SentencePiece always did
            newer["texts"][index] = [1, *model.encode(text)]
            newer["decoded"][index] = text.replace("\u2581", " ")
    kept = [index for index, case in enumerate(newer["mixed"]) if not case["text"].startswith(" ")]
    for key in ("mixed", "mixed_decoded", "mixed_decoded_special"):
        newer[key] = [newer[key][index] for index in kept]
    return found


def by_transformers(tokenizer, special: list[str]) -> dict:
    """Ids with the tokenizer's own BOS, and decoded text, for TEXTS, SPECIAL_TEXTS and the licence."""
    mixed = [text.format(*pair) for pair in (special[:2], special[1:]) for text in SPECIAL_TEXTS]
    ids = [tokenizer.encode(text) for text in TEXTS]
    mixed_ids = [tokenizer.encode(text) for text in mixed]
    return {
        "texts": ids,
        "decoded": [tokenizer.decode(one, skip_special_tokens=True) for one in ids],
        "mixed": [{"text": text, "ids": one} for text, one in zip(mixed, mixed_ids, strict=True)],
        "mixed_decoded": [tokenizer.decode(one, skip_special_tokens=True) for one in mixed_ids],
        "mixed_decoded_special": [tokenizer.decode(one, skip_special_tokens=False) for one in mixed_ids],
        "license": digest(tokenizer.encode(LICENSE.read_text())),
    }


def make_gguf(llama: LlamaTokenize) -> dict:
    """What llama.cpp makes of both fixtures told as GGUF, the byte-level one with every pre-tokenizer."""
    text = "\n".join(TEXTS)
    bpe = tokenizers.Tokenizer.from_file(str(GOLDEN / "text" / "bpe" / "tokenizer.json"))
    distinct = {pre: name for name, pre in reversed(PRE_TOKENIZERS.items())}
    cuts = {}
    for name in sorted(distinct.values()):
        path = llama.write(bpe_metadata(bpe) | {"tokenizer.ggml.pre": name})
        if name in ("gpt-4o", "tekken"):
            # llama.cpp has no combining marks in these two, the models have
            of_model = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            cuts[name] = of_model.encode(text, add_special_tokens=False)
            assert of_model.encode(LICENSE.read_text(), add_special_tokens=False) == llama.ids(
                path, LICENSE.read_text()
            )
        else:
            cuts[name] = llama.ids(path, text)
    model = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "text" / "spm" / "tokenizer.model"))
    path = llama.write(spm_metadata(model))
    mixed = [text.format("<s>", "<tool>") for text in SPECIAL_TEXTS]
    return {
        "bpe_metadata": bpe_metadata(bpe),
        "text": text,
        "cuts": cuts,
        "spm_metadata": spm_metadata(model),
        "spm": [llama.ids(path, text) for text in TEXTS],
        "spm_mixed": [{"text": text, "ids": llama.ids(path, text)} for text in mixed],
        "spm_inert": [{"text": text, "ids": llama.ids(path, text, special=False)} for text in mixed],
    }


def make_real(llama: LlamaTokenize, smollm2: Path, stories: Path, wikitext: str) -> dict:
    """Ids of the two real models: SmolLM2 by llama.cpp, stories260k by transformers and sentencepiece."""
    special = ["<|im_start|>", "<|im_end|>"]
    mixed = [text.format(*special) for text in SPECIAL_TEXTS]
    fast = transformers.AutoTokenizer.from_pretrained(stories)
    model = sentencepiece.SentencePieceProcessor(model_file=str(stories / "tokenizer.model"))
    return {
        "smollm2": {
            "texts": [llama.ids(smollm2, text, bos=True) for text in TEXTS],
            "mixed": [{"text": text, "ids": llama.ids(smollm2, text, bos=True)} for text in mixed],
            "inert": [
                {"text": text, "ids": llama.ids(smollm2, text, special=False, bos=True)} for text in mixed
            ],
            "license": digest(llama.ids(smollm2, LICENSE.read_text(), bos=True)),
            "wikitext": digest(llama.ids(smollm2, wikitext, bos=True)),
        },
        "stories_json": by_transformers(fast, ["<s>", "</s>", "<unk>"])
        | {"wikitext": digest(fast.encode(wikitext))},
        "stories_model": {
            "texts": [[1, *model.encode(text)] for text in TEXTS],
            "wikitext": digest([1, *model.encode(wikitext)]),
        },
    }


def digest(ids: list[int]) -> dict:
    return {"n": len(ids), "sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest()}


def make_chat(smollm2: Path) -> dict:
    """Every template over every conversation, rendered by transformers' apply_chat_template."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=train_bpe(), **names)
    real = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    templates = [(name, plain, template) for name, template in CHAT_TEMPLATES.items()]
    templates += [("smollm2", real, real.chat_template)]
    cases = []
    for name, tokenizer, template in templates:
        rendered = []
        for conversation, messages in MESSAGES.items():
            for prompt in (True, False):
                options = {"tokenize": False, "add_generation_prompt": prompt, "kind": "é"}
                try:
                    text = tokenizer.apply_chat_template(messages, chat_template=template, **options)
                except jinja2.TemplateError:  # the template refuses the conversation
                    text = None
                rendered.append([conversation, prompt, text])
        named = {key: text for key, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
        cases.append({"name": name, "template": template, "tokens": named, "rendered": rendered})
    return {"messages": MESSAGES, "kwargs": {"kind": "é"}, "cases": cases}


def write(name: str, value) -> None:
    (GOLDEN / name).write_text(
        json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    for name in ("llama-tokenize", "smollm2", "stories", "wikitext"):
        options.add_argument(f"--{name}", type=Path, required=True)
    options = options.parse_args()
    wikitext = options.wikitext.read_text(encoding="utf-8")[:WIKITEXT]
    with tempfile.TemporaryDirectory() as folder:
        llama = LlamaTokenize(options.llama_tokenize, Path(folder))
        write("text_ids.json", {"texts": TEXTS, "bpe": make_bpe(), "spm": make_spm()})
        write("text_gguf.json", make_gguf(llama))
        write("text_real.json", make_real(llama, options.smollm2, options.stories, wikitext))
    write("text_chat.json", make_chat(options.smollm2))


if __name__ == "__main__":
    main()
