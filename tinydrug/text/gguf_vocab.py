"""The tokenizer inside a GGUF file: a byte-level BPE vocabulary ("gpt2") or a SentencePiece one ("llama")."""

import logging
from reprlib import repr as short

from tinydrug.errors import BadModelFile, UnsupportedModel
from tinydrug.text.pretokenizers import PRE_TOKENIZERS
from tinydrug.text.sentencepiece_backend import AddedToken, SentencePieceBackend
from tinydrug.text.sentencepiece_proto import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, sentencepiece_model
from tinydrug.text.tokenizer import Tokenizer
from tinydrug.text.tokenizers_backend import TokenizersBackend

NAMED = {  # name in templates -> key of its id
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the format
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
# Control tokens that end a turn whatever eos_token_id says: it may be the base model's, and this the chat's.
TURN_ENDS = (
    "</s>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
)

logger = logging.getLogger("tinydrug")


def gguf_tokenizer(path, metadata: dict, eos_ids: frozenset[int]) -> Tokenizer:
    """The tokenizer of GGUF metadata; `eos_ids` from elsewhere are added to its own.

    BadModelFile (fields missing or inconsistent), UnsupportedModel (tokenizer model or pre-tokenizer).
    """
    fields = _Fields(path, metadata)
    model = fields.text("model")
    if model not in MODELS:
        known = ", ".join(MODELS)
        raise UnsupportedModel(f"{path}: unknown tokenizer.ggml.model {short(model)}: known are {known}")
    backend, add_bos = MODELS[model](fields)
    named = {name: token_id for name, key in NAMED.items() if (token_id := fields.token_id(key)) is not None}
    bos_id, eos_id = named.get("bos_token"), named.get("eos_token")
    turn_ends = {named.get("eos_token"), fields.token_id("eot_token_id"), fields.token_id("eom_token_id")}
    turn_ends |= {token_id for token_id in backend.special_ids if fields.tokens[token_id] in TURN_ENDS}
    return Tokenizer(
        backend=backend,
        bos_id=bos_id,
        eos_ids=eos_ids | (turn_ends - {None}),
        prefix=(bos_id,) if fields.flag("add_bos_token", add_bos) and bos_id is not None else (),
        suffix=(eos_id,) if fields.flag("add_eos_token", False) and eos_id is not None else (),
        special_tokens={name: fields.tokens[token_id] for name, token_id in named.items()},
        chat_templates=_chat_templates(path, metadata),
        source=fields.source(),
    )


def _byte_level(fields: "_Fields") -> tuple[TokenizersBackend, bool]:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    name = fields.text("pre")
    if name is None:
        logger.warning("%s: no tokenizer.ggml.pre: an old file; words may be cut wrongly", fields.path)
        name = "default"
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModel(f"{fields.path}: unknown tokenizer.ggml.pre {short(name)}: known are {known}")
    pre = PRE_TOKENIZERS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in fields.array("merges", str)]
    try:
        model = models.BPE(vocab=fields.ids, merges=merges, ignore_merges=pre.ignore_merges)
    except Exception as error:  # tokenizers raises nothing narrower
        raise BadModelFile(fields.path, f"tokenizer.ggml.merges: {' '.join(str(error).split())}") from None
    tokenizer = tokenizers.Tokenizer(model)
    cuts = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre.patterns]
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, alphabet])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token, normalized=False, special=kind != USER_DEFINED)
            for token, kind in zip(fields.tokens, fields.types, strict=True)
            if kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ]
    )
    return TokenizersBackend(tokenizer, fields.path), pre.add_bos


def _sentencepiece(fields: "_Fields") -> tuple[SentencePieceBackend, bool]:
    scores = fields.array("scores", int, float, length=len(fields.tokens))
    unknown = fields.token_id("unknown_token_id") or 0
    types = [CONTROL if kind == UNKNOWN else kind for kind in fields.types]
    types[unknown] = UNKNOWN  # SentencePiece wants exactly one
    try:
        proto = sentencepiece_model(fields.tokens, scores, types)
    except OverflowError:
        raise BadModelFile(fields.path, "tokenizer.ggml.scores: a score is larger than any float32") from None
    added = {
        token_id: AddedToken(token, special=False)
        for token_id, (token, kind) in enumerate(zip(fields.tokens, fields.types, strict=True))
        if kind == USER_DEFINED
    }
    prefix_space = fields.flag("add_space_prefix", True)
    return SentencePieceBackend(proto, fields.path, added=added, prefix_space=prefix_space), True


def _chat_templates(path, metadata: dict) -> dict[str, str]:
    """Name -> template: tokenizer.chat_template is "default", tokenizer.chat_template.NAME are the others."""
    key = "tokenizer.chat_template"
    found = {"default": metadata[key]} if key in metadata else {}
    found |= {name[len(key) + 1 :]: metadata[name] for name in metadata if name.startswith(key + ".")}
    for name, template in found.items():
        if not isinstance(template, str):
            raise BadModelFile(path, f"{key} {name}: not a text")
    return found


class _Fields:
    """The tokenizer.ggml fields of a file, checked as they are asked for."""

    def __init__(self, path, metadata: dict):
        self.path, self.metadata = path, metadata
        self.tokens = self.array("tokens", str)
        self.ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        if not self.tokens or len(self.ids) != len(self.tokens):
            twice = [token for token_id, token in enumerate(self.tokens) if self.ids[token] != token_id]
            reason = f"{short(twice[0])} stands twice" if twice else "empty"
            raise BadModelFile(path, f"tokenizer.ggml.tokens: {reason}")
        self.types = [NORMAL] * len(self.tokens)
        if "tokenizer.ggml.token_type" in metadata:
            self.types = self.array("token_type", int, length=len(self.tokens))
        if not 0 <= min(self.types) <= max(self.types) <= 6:
            raise BadModelFile(path, "tokenizer.ggml.token_type: a type is not 0 to 6")

    def array(self, key: str, *kinds: type, length: int | None = None) -> list:
        """A list of values of these kinds, of this length."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or not {*map(type, value)} <= {*kinds}:
            raise BadModelFile(self.path, f"tokenizer.ggml.{key}: missing, or not the list that it should be")
        if length is not None and len(value) != length:
            raise BadModelFile(self.path, f"tokenizer.ggml.{key}: {len(value)} values for {length} tokens")
        return value

    def text(self, key: str) -> str | None:
        """A text, None if the file has none."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and not isinstance(value, str):
            raise BadModelFile(self.path, f"tokenizer.ggml.{key}: expected a text, got {short(value)}")
        return value

    def token_id(self, key: str) -> int | None:
        """The id of a named token, None if the file names none."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and not (type(value) is int and 0 <= value < len(self.tokens)):
            n = len(self.tokens)
            raise BadModelFile(self.path, f"tokenizer.ggml.{key}: {short(value)} is no id of {n} tokens")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean field."""
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if type(value) is not bool:
            raise BadModelFile(self.path, f"tokenizer.ggml.{key}: expected true or false, got {short(value)}")
        return value

    def source(self) -> list:
        """Everything that the vocabulary is made of."""
        keys = ("model", "pre", "add_space_prefix", "tokens", "merges", "scores", "token_type")
        return [self.metadata.get(f"tokenizer.ggml.{key}") for key in keys]


MODELS = {"gpt2": _byte_level, "llama": _sentencepiece}
