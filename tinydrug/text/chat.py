"""Chat templates: messages to one prompt, by sandboxed Jinja with the semantics of Hugging Face's transformers."""

import functools
import json
from datetime import datetime

from tinydrug.errors import BadModelFile, ConfigError, PromptError

MAX_TEMPLATE = 1 << 20  # characters; the longest published ones are a twentieth of that
MAX_RENDERED = 16 << 20  # characters


def render(
    template: str, messages, *, add_generation_prompt: bool = True, tokens: dict | None = None, kwargs: dict | None = None
) -> str:
    """The prompt of a conversation, BOS included if the template writes it.

    `messages`: a list of objects of text, each with "role" and "content". `tokens`: the tokenizer's special tokens by
    name. `kwargs`: further variables for the template, JSON values. A template is not trusted: it reaches no Python
    object, and both it and its output are limited in size.

    PromptError (malformed messages, or the template refuses them), BadModelFile (the template is wrong).
    """
    messages = _checked(messages)
    variables = {"tools": None, "documents": None, **(tokens or {}), **_plain(kwargs or {})}
    variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
    ...
