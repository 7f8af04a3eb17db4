"""The tokenizer files of a model folder: tokenizer.json or tokenizer.model, and what configures them."""

import hashlib
import json
from pathlib import Path
from reprlib import repr as short

from tinydrug.errors import BadModelFile, UnsupportedModel
from tinydrug.text.sentencepiece_backend import AddedToken, SentencePieceBackend
from tinydrug.text.tokenizer import Tokenizer
from tinydrug.text.tokenizers_backend import TokenizersBackend

MAX_BYTES = 256 << 20  # of one file; the largest tokenizers are a tenth of that
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # unless a file says otherwise
TEXT = None  # its place in a post-processor's template
FLAGS = ("special", "lstrip", "rstrip", "single_word")  # of an added token
SETTINGS = ("legacy", "add_prefix_space", "added_tokens_decoder")  # that decide which ids a text gets
MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")  # transformers 4 and 5


def folder_tokenizer(path, folder: Path | None, config: dict, eos_ids: frozenset[int]) -> Tokenizer:
    """The tokenizer of the model at `path`. tokenizer.json is preferred: it says everything about itself.

    `config` names BOS and EOS where no tokenizer file does; `eos_ids` are added to the tokenizer's own.
    BadModelFile (missing or damaged files), UnsupportedModel (a kind of tokenizer that is not known here).
    """
    file = next((folder / name for name in FILES if (folder / name).exists()), None) if folder else None
    if file is None:
        raise BadModelFile(folder or path, f"no tokenizer: expected {' or '.join(FILES)}")
    options = _Options(folder)
    content = _read(file)
    backend, prefix, suffix = FILES[file.name](file, content, options)
    for name in ("bos_token", "eos_token"):
        token_id = config.get(f"{name}_id")
        token = backend.token(token_id) if type(token_id) is int else None
        if token is not None:
            options.named.setdefault(name, token)
    named = {name: token for name, token in options.named.items() if token is not None}
    named_ids = {name: backend.token_id(token) for name, token in named.items()}
    return Tokenizer(
        backend=backend,
        bos_id=named_ids.get("bos_token"),
        eos_ids=eos_ids | ({named_ids.get("eos_token")} - {None}),
        prefix=prefix,
        suffix=suffix,
        special_tokens=named,
        chat_templates=options.chat_templates(),
        source=[file.name, hashlib.sha256(content).hexdigest(), options.settings],
    )


def _tokenizer_json(file: Path, content: bytes, options: "_Options"):
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises nothing narrower
        raise BadModelFile(file, f"not a tokenizer: {' '.join(str(error).split())}") from None
    if options.get("clean_up_tokenization_spaces", bool, False) and type(tokenizer.model).__name__ != "BPE":
        raise UnsupportedModel(
            f"{file}: clean_up_tokenization_spaces is for WordPiece; set it to false in tokenizer_config.json"
        )
    already = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    tokenizer.add_special_tokens(
        [
            tokenizers.AddedToken(token, normalized=False)
            for token in sorted(options.special - already)
            if tokenizer.token_to_id(token) is not None  # one more would have no row in the model's embedding
        ]
    )
    return TokenizersBackend(tokenizer, file), *_ends(file, tokenizer.post_processor)


def _ends(file: Path, processor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a post-processor of the tokenizers library puts before and after a text."""
    state = json.loads(processor.__getstate__()) if processor else {"type": "ByteLevel"}
    prefix, suffix = (), ()
    for stage in state["processors"] if state["type"] == "Sequence" else [state]:
        if stage["type"] == "TemplateProcessing":
            ids = {name: tuple(token["ids"]) for name, token in stage["special_tokens"].items()}
            names = [
                part["SpecialToken"]["id"] if "SpecialToken" in part else TEXT for part in stage["single"]
            ]
            if TEXT not in names or not {*names} <= {TEXT, *ids}:
                raise BadModelFile(file, "its post_processor names tokens that it does not define")
            text = names.index(TEXT)
            prefix = sum((ids[name] for name in names[:text]), ()) + prefix
            suffix += sum((ids[name] for name in names[text + 1 :]), ())
        elif stage["type"] != "ByteLevel":
            raise UnsupportedModel(f"{file}: unknown kind of post_processor {stage['type']}")
    return prefix, suffix


def _tokenizer_model(file: Path, content: bytes, options: "_Options"):
    backend = SentencePieceBackend(
        content,
        file,
        added=options.added,
        special=options.special,
        legacy=options.get("legacy", bool, True),
        prefix_space=options.get("add_prefix_space", bool, True),
    )
    for name, token in LLAMA_NAMES.items():
        if backend.token_id(token) is not None:
            options.named.setdefault(name, token)
    ends = []
    for name, default in (("bos", True), ("eos", False)):
        token = options.named.get(f"{name}_token")
        token_id = backend.token_id(token) if token is not None else None
        wanted = options.get(f"add_{name}_token", bool, default) and token_id is not None
        ends.append((token_id,) if wanted else ())
    return backend, *ends


class _Options:
    """tokenizer_config.json and special_tokens_map.json; null stands for a field that is not there.

    `named`: "bos_token" -> its text, or None where a file says that there is none. `added`: the
    added_tokens_decoder; only without one does the map count, as in transformers. `special`: texts of the
    tokens that decoding skips. `settings`: the fields that decide which ids a text gets.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._fields = _read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in self._fields:
            self._fields |= _read_json(folder / "special_tokens_map.json")
        self.named = {name: self._text(name, self._fields[name]) for name in NAMES if name in self._fields}
        self.added = {
            self._id(token_id): self._added_token(fields)
            for token_id, fields in self.get("added_tokens_decoder", dict, {}).items()
        }
        more = next((self._fields[name] for name in MORE_SPECIAL if self._fields.get(name)), [])
        more = list(more.values()) if isinstance(more, dict) else more
        if not isinstance(more, list):
            raise self._bad(MORE_SPECIAL[0], more)
        self.special = {token.content for token in self.added.values() if token.special}
        self.special |= {self._text(MORE_SPECIAL[0], token) for token in more} | {*self.named.values()}
        self.special.discard(None)
        self.settings = {name: self._fields.get(name) for name in SETTINGS}

    def get(self, name: str, kind: type, default):
        """A field of this kind."""
        value = self._fields.get(name)
        if value is not None and not isinstance(value, kind):
            raise self._bad(name, value)
        return default if value is None else value

    def chat_templates(self) -> dict[str, str]:
        """Name -> template. Files beat tokenizer_config.json; the model's usual one is called "default"."""
        value = self._fields.get("chat_template") or {}
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            value = {entry.get("name"): entry.get("template") for entry in value}
        templates = {"default": value} if isinstance(value, str) else value
        texts = [*templates, *templates.values()] if isinstance(templates, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise self._bad("chat_template", value)
        more = sorted((self._folder / "additional_chat_templates").glob("*.jinja"))
        files = {"default": self._folder / "chat_template.jinja"} | {file.stem: file for file in more}
        return templates | {name: _read_text(file) for name, file in files.items() if file.exists()}

    def _id(self, text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise self._bad("added_tokens_decoder", text)
        return int(text)

    def _added_token(self, fields) -> AddedToken:
        if not isinstance(fields, dict):
            raise self._bad("added_tokens_decoder", fields)
        content = self._text("added_tokens_decoder", fields)
        flags = {name: fields.get(name, False) for name in FLAGS}
        if not content or not all(isinstance(flag, bool) for flag in flags.values()):
            raise self._bad("added_tokens_decoder", fields)
        return AddedToken(content, **flags)

    def _text(self, name: str, value) -> str | None:
        """A token is its text, or an object with its text as "content"."""
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None and not isinstance(text, str):
            raise self._bad(name, value)
        return text

    def _bad(self, name: str, value) -> BadModelFile:
        return BadModelFile(self._folder / "tokenizer_config.json", f"{name}: {short(value)} makes no sense")


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise BadModelFile(file, f"larger than {MAX_BYTES >> 20} MiB: not a tokenizer file")
        return file.read_bytes()
    except OSError as error:
        raise BadModelFile(file, f"cannot be read: {error.strerror}") from None


def _read_text(file: Path) -> str:
    try:
        return _read(file).decode()
    except UnicodeDecodeError:
        raise BadModelFile(file, "not UTF-8") from None


def _read_json(file: Path) -> dict:
    """The object in a file, an empty one if there is no file."""
    text = _read_text(file) if file.exists() else "{}"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadModelFile(file, f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadModelFile(file, f"holds {short(value)}, not an object")
    return value


FILES = {"tokenizer.json": _tokenizer_json, "tokenizer.model": _tokenizer_model}
