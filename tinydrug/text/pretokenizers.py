"""How byte-level BPE cuts text before it merges, by the names that GGUF files give (tokenizer.ggml.pre).

The patterns are those of the models' own tokenizer.json, from which llama.cpp's are adapted.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PreTokenizer:
    """Patterns that cut the text, one after the other; each match and each rest is then merged on its own.

    `ignore_merges`: a piece that is a token is that token, whatever its merges say. `add_bos`: the default.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{PUNCTUATION}|{SPACES}"
QWEN2_PATTERN = rf"{CONTRACTION}|{WORD}|\p{{N}}|{PUNCTUATION}|{SPACES}"
SEED_CODER_PATTERN = rf"{CONTRACTION}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
TEKKEN_PATTERN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
GPT4O_PATTERN = (
    rf"{CASED[0]}{CONTRACTION}?|{CASED[1]}{CONTRACTION}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)
DEEPSEEK3_PATTERN = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"
)

GPT2 = PreTokenizer((GPT2_PATTERN,))
DIGITS = PreTokenizer((r"\p{N}", GPT2_PATTERN))
DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]"))
LLAMA3 = PreTokenizer((LLAMA3_PATTERN,), ignore_merges=True, add_bos=True)
TEKKEN = PreTokenizer((TEKKEN_PATTERN,), ignore_merges=True, add_bos=True)
QWEN2 = PreTokenizer((QWEN2_PATTERN,))
GPT4O = PreTokenizer((GPT4O_PATTERN,))
DEEPSEEK_CODER = PreTokenizer(
    ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
)
DEEPSEEK3 = PreTokenizer((r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK3_PATTERN))

PRE_TOKENIZERS = {
    "default": DEFAULT,
    "gpt-2": GPT2,
    "phi-2": GPT2,
    "mpt": GPT2,
    "olmo": GPT2,
    "jais": GPT2,
    "trillion": GPT2,
    "exaone4": GPT2,
    "gigachat": GPT2,
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "command-r": DIGITS,
    "codeshell": DIGITS,
    "exaone": DIGITS,
    "minerva-7b": DIGITS,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "llama-bpe": LLAMA3,
    "falcon3": LLAMA3,
    "falcon-h1": LLAMA3,
    "pixtral": LLAMA3,
    "midm-2.0": LLAMA3,
    "lfm2": LLAMA3,
    "dbrx": PreTokenizer((LLAMA3_PATTERN,)),
    "smaug-bpe": PreTokenizer((LLAMA3_PATTERN,)),
    "tekken": TEKKEN,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "megrez": QWEN2,
    "stablelm2": QWEN2,
    "hunyuan": QWEN2,
    "seed-coder": PreTokenizer((SEED_CODER_PATTERN,)),
    "gpt-4o": GPT4O,
    "llama4": GPT4O,
    "kanana2": GPT4O,
    "deepseek-coder": DEEPSEEK_CODER,
    "deepseek-v3": DEEPSEEK3,
}
