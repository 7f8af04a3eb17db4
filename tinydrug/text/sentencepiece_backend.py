"""The back end for tokenizer.model and for GGUF's SentencePiece vocabularies: the sentencepiece library."""

import re
from dataclasses import dataclass

from tinydrug.errors import BadModelFile
from tinydrug.text.tokenizers_backend import BYTE_TOKEN, GUARD, any_of, unguard

SPACE = "\u2581"
NO_DUMMY_PREFIX = bytes([0x1A, 2, 0x18, 0])  # normalizer_spec { add_dummy_prefix: false }


@dataclass(frozen=True)
class AddedToken:
    """A token found in the text before SentencePiece sees it; `lstrip`, `rstrip`: with spaces beside it."""

    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def pattern(self) -> str:
        """The regular expression that matches it."""
        word = re.escape(self.content)
        word = rf"(?<!\w){word}(?!\w)" if self.single_word else word
        return r"\s*" * self.lstrip + word + r"\s*" * self.rstrip


class SentencePieceBackend:
    """A SentencePiece model with its added tokens; `path` names it in messages. BadModelFile if damaged.

    The model's control tokens and those whose text is in `special` are found in the text like added ones.
    `legacy`: all text between such tokens gets the leading space, as in llama.cpp and the first Llamas; else
    only the start of the whole text does. `prefix_space` False: none does.
    """

    byte_level = False

    def __init__(
        self, model: bytes, path, *, added: dict[int, AddedToken], special=(), legacy=True, prefix_space=True
    ):
        self._model, self._pieces = _load(model, path)
        self._continued = self._model
        if not (legacy and prefix_space):
            # protobuf merges messages that follow each other, so this overrides one field of the model
            self._continued, _ = _load(model + NO_DUMMY_PREFIX, path)
        if not prefix_space:
            self._model = self._continued
        self.strip = int(self._model.normalize("a") != "a")
        reserved = self._model.is_control, self._model.is_unknown
        own = {
            i for i, piece in enumerate(self._pieces) if piece in special or any(is_(i) for is_ in reserved)
        }
        self._added = {i: AddedToken(self._pieces[i]) for i in sorted(own)} | added
        self._id_of = {token.content: token_id for token_id, token in self._added.items()}
        self.special_ids = frozenset(token_id for token_id, token in self._added.items() if token.special)
        self.specials = any_of(token.content for token in self._added.values() if token.special)
        self.size = max(len(self._pieces), *(token_id + 1 for token_id in self._added))
        self._any_added = _alternatives(self._added.values())
        self._not_special = _alternatives(token for token in self._added.values() if not token.special)

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids without BOS or EOS; `special`: the text of special tokens inside is recognised, unless it is
        guarded."""
        ids, position = [], 0
        for match in (self._any_added if special else self._not_special).finditer(text):
            if special and text[match.start() - 1 : match.start()] == GUARD:
                continue
            ids += self._encode_between(text, position, match.start())
            token_id = self._id_of.get(match[0])
            ids.append(self._id_of[match[0].strip()] if token_id is None else token_id)
            position = match.end()
        return ids + self._encode_between(text, position, len(text))

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling, None for an id that it does not have."""
        if token_id in self._added:
            return self._added[token_id].content
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else None

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling."""
        token_id = self._id_of.get(token, self._model.piece_to_id(token))
        return token_id if self.token(token_id) == token else None

    def piece(self, token_id: int) -> str | bytes:
        """What an id adds to a text: text, or a byte that may be part of a character. Unknown id: nothing."""
        token = self.token(token_id) or ""
        if byte := BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(byte[1])
        return token.replace(SPACE, " ")

    def _encode_between(self, text: str, start: int, end: int) -> list[int]:
        """Ids of text[start:end], which holds no added token but guarded ones."""
        piece = unguard(self.specials, text[start:end])
        return (self._model if start == 0 else self._continued).encode(piece) if piece else []


def _load(model: bytes, path):
    """(processor, its pieces)."""
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=model)
        pieces = processor.id_to_piece([*range(processor.piece_size())])
    except (RuntimeError, UnicodeDecodeError) as error:
        raise BadModelFile(path, f"not a SentencePiece model: {' '.join(str(error).split())}") from None
    if not pieces:
        raise BadModelFile(path, "an empty SentencePiece model")
    return processor, pieces


def _alternatives(tokens) -> re.Pattern:
    """Any of the tokens, the longest where several match; no token matches nothing."""
    longest_first = sorted(tokens, key=lambda token: -len(token.content))
    return re.compile("|".join(token.pattern for token in longest_first) or "(?!)")
