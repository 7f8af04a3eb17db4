"""The back end for tokenizer.json and for byte-level GGUF vocabularies: Hugging Face's tokenizers library."""

import json
import re
import threading
from collections.abc import Iterable
from functools import cached_property

from tinydrug.errors import UnsupportedModel

BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
GUARD = "\ufdd0"  # a noncharacter. What would be a special token is text like any other after it
DECODERS = re.compile("ByteLevel|(Replace )*(ByteFallback )?Fuse( Strip)?")


class TokenizersBackend:
    """A `tokenizers.Tokenizer`; `source` names it in messages. UnsupportedModel for an unknown decoder."""

    def __init__(self, tokenizer, source):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self.size = tokenizer.get_vocab_size()
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.specials = any_of(added[token_id].content for token_id in self.special_ids)
        self._read_decoder(source)

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids without BOS or EOS; `special`: the text of special tokens inside is recognised, unless it is
        guarded."""
        if special and GUARD in text:
            twin, id_of = self._guarded_twin
            ids = twin.encode(unguard(self.specials, text, GUARD), add_special_tokens=False).ids
            return [id_of.get(i, i) for i in ids]
        with self._lock:  # a switch of the shared tokenizer
            self._tokenizer.encode_special_tokens = not special
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling, None for an id that it does not have."""
        return self._tokenizer.id_to_token(token_id) if token_id >= 0 else None

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling."""
        return self._tokenizer.token_to_id(token)

    def piece(self, token_id: int) -> str | bytes:
        """What an id adds to a text: text, or bytes that may be part of a character. Unknown ids: nothing."""
        token = self.token(token_id) or ""
        if self.byte_level:
            try:
                return bytes(self._byte_of[char] for char in token)
            except KeyError:  # an added token, written as it is
                return token.encode()
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._byte_fallback and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        return token

    @cached_property
    def _guarded_twin(self):
        """The same tokenizer with special tokens spelt behind a guard, and our ids of its added tokens."""
        state = json.loads(self._tokenizer.to_str())
        for token in state["added_tokens"]:
            token["content"] = GUARD * token["special"] + token["content"]
        twin = type(self._tokenizer).from_str(json.dumps(state))
        return twin, {twin.token_to_id(token["content"]): token["id"] for token in state["added_tokens"]}

    def _read_decoder(self, source) -> None:
        """How ids become text: by byte-level BPE's alphabet, or as Llama's vocabularies do it."""
        decoder = self._tokenizer.decoder
        state = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "None"}
        stages = state["decoders"] if state["type"] == "Sequence" else [state]
        kinds = " ".join(stage["type"] for stage in stages)
        replace = [stage for stage in stages if stage["type"] == "Replace"]
        strip = [stage for stage in stages if stage["type"] == "Strip"]
        if (
            not DECODERS.fullmatch(kinds)
            or any("String" not in stage["pattern"] for stage in replace)
            or any(stage["content"] != " " or stage["stop"] for stage in strip)
        ):
            raise UnsupportedModel(f"{source}: unknown decoder {kinds}: known are {DECODERS.pattern}")
        self.byte_level = kinds == "ByteLevel"
        self.strip = sum(stage["start"] for stage in strip)
        self._replacements = [(stage["pattern"]["String"], stage["content"]) for stage in replace]
        self._byte_fallback = "ByteFallback" in kinds
        self._byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}


def any_of(contents: Iterable[str]) -> re.Pattern:
    """Any of these texts, the longest where several match; none matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)")


def unguard(specials: re.Pattern, text: str, mark: str = "") -> str:
    """`text` without its guards, and with a mark before each special token that has none."""
    either = re.compile(f"({GUARD}?)({specials.pattern})")
    return either.sub(lambda match: match[2] if match[1] else mark + match[2], text)


def byte_alphabet() -> str:
    """The 256 printable characters that stand for bytes in byte-level BPE (GPT-2's bytes_to_unicode)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))
