"""A tokenizer: text to token ids and back, with the model's own rules for BOS, EOS and special tokens."""

import hashlib
import json
from dataclasses import dataclass, field

from tinydrug.errors import ConfigError, PromptError
from tinydrug.text.detokenizer import Detokenizer
from tinydrug.text.tokenizers_backend import GUARD


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary (`backend`) and what the model adds to it; safe to use from several threads.

    `prefix` and `suffix` are what the model's own rule puts around a text, mostly BOS and nothing.
    `special_tokens` are the named ones as templates know them ("bos_token": "<s>"); `chat_templates` has
    "default" if the model is a chat model; `source` is what the vocabulary was made of, as JSON values.
    """

    backend: object = field(repr=False)
    bos_id: int | None
    eos_ids: frozenset[int]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    special_tokens: dict[str, str]
    chat_templates: dict[str, str] = field(repr=False)
    source: object = field(repr=False)

    def encode(self, text: str, *, bos: bool | None = None, special: bool = True) -> list[int]:
        """Ids of `text`. `bos`: put BOS in front, or do not; None: the model's own rule. Never a second BOS.

        `special`: "<|im_end|>" in the text is that token, else it is characters like any other.
        PromptError for text that is not Unicode, ConfigError for a BOS that the model does not have.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt is not valid Unicode: lone surrogate at character {error.start}"
            ) from None
        prefix, suffix = (self.prefix, self.suffix) if bos is None else ((), ())
        if bos:
            if self.bos_id is None:
                raise ConfigError("bos: this model has no BOS token", field="bos")
            prefix = (self.bos_id,)
        ids = self.backend.encode(text, special)
        return [*(() if tuple(ids[: len(prefix)]) == prefix else prefix), *ids, *suffix]

    def guard(self, text: str) -> str:
        """`text` with a guard before each special token in it: `encode` takes these for text, as it does all
        that someone types."""
        return self.backend.specials.sub(lambda match: GUARD + match[0], text)

    def decode(self, ids, *, skip_special: bool = True) -> str:
        """The text of `ids`, as Hugging Face's decode gives it; ids outside the vocabulary add nothing."""
        detokenizer = Detokenizer(self, skip_special=skip_special)
        return "".join([*map(detokenizer.push, ids), detokenizer.flush()])

    def piece(self, token_id: int) -> str | bytes:
        """What one id adds to a text: text, or bytes where it may be part of a character."""
        return self.backend.piece(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """`piece` in UTF-8."""
        piece = self.piece(token_id)
        return piece if isinstance(piece, bytes) else piece.encode()

    def token_text(self, token_id: int) -> str:
        """One id for the eye: its text, with U+FFFD for parts of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; a model may have more rows than that."""
        return self.backend.size

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that decoding skips."""
        return self.backend.special_ids

    @property
    def byte_level(self) -> bool:
        """Whether every piece is bytes."""
        return self.backend.byte_level

    @property
    def strip(self) -> int:
        """How many leading spaces decoding drops."""
        return self.backend.strip

    @property
    def chat_template(self) -> str | None:
        """The model's default chat template, None for a model that has none."""
        return self.chat_templates.get("default")

    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text gets, as hexadecimal digits."""
        rules = [self.source, self.prefix, self.suffix, sorted(self.eos_ids), sorted(self.special_ids)]
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()


def load_tokenizer(checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint: the one inside a GGUF file, else the files of its folder.

    BadModelFile (missing or damaged files), UnsupportedModel (a kind of tokenizer that is not known here).
    """
    eos_ids = config_eos_ids(checkpoint.config) | config_eos_ids(checkpoint.generation_config)
    if "tokenizer.ggml.tokens" in (checkpoint.metadata or {}):
        from tinydrug.text.gguf_vocab import gguf_tokenizer

        return gguf_tokenizer(checkpoint.path, checkpoint.metadata, eos_ids)
    from tinydrug.text.folder_vocab import folder_tokenizer

    return folder_tokenizer(checkpoint.path, checkpoint.folder, checkpoint.config, eos_ids)


def config_eos_ids(config: dict) -> frozenset[int]:
    """eos_token_id of a config: one id, a list of them, or nothing. ConfigError for anything else."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ConfigError(f"eos_token_id: expected an id or a list of ids, got {value!r:.80}", "eos_token_id")
    return frozenset(i for i in ids if i >= 0)
