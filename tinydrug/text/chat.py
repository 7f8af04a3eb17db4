"""Chat templates: a conversation to one prompt, by sandboxed Jinja with the semantics of transformers."""

import functools
import json
from collections.abc import Callable
from datetime import datetime
from reprlib import repr as short

from tinydrug.errors import BadModelFile, ConfigError, PromptError

MAX_TEMPLATE = 1 << 20  # characters; the longest published ones are a twentieth of that
MAX_RENDERED = 16 << 20  # characters


def render(
    template: str,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = True,
    tokens: dict[str, str] | None = None,
    kwargs: dict | None = None,
    guard: Callable[[str], str] = str,
) -> str:
    """The prompt of a conversation, with BOS if the template writes it.

    `messages` are objects of text, each with "role" and "content"; `tokens` the tokenizer's special_tokens;
    `kwargs` more variables for the template, as JSON values; `guard` is applied to each text of the messages,
    so that a tokenizer can tell it from what the template writes. Templates are not trusted: they reach no
    Python object, and they and what they write are limited in size (but not in time).

    PromptError (malformed messages, or the template refuses them), BadModelFile (the template is broken).
    """
    variables = {"tools": None, "documents": None} | (tokens or {}) | _plain(kwargs or {})
    variables |= {"messages": _checked(messages, guard), "add_generation_prompt": add_generation_prompt}
    try:
        parts, size = [], 0
        for part in _compiled(template).generate(variables):
            parts.append(part)
            size += len(part)
            if size > MAX_RENDERED:
                raise BadModelFile("chat template", f"writes more than {MAX_RENDERED} characters")
    except (PromptError, BadModelFile):
        raise
    except Exception as error:  # a template can fail in any way that Python can
        raise BadModelFile("chat template", f"fails: {_one_line(error)}") from None
    return "".join(parts)


def named_template(name: str) -> str:
    """The template for --chat-template NAME. ConfigError lists the names."""
    if name not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise ConfigError(f"chat template {short(name)}: known are {known}", field="chat_template")
    return TEMPLATES[name]


def _checked(messages, guard) -> list[dict[str, str]]:
    """A copy of the messages, of plain text only."""
    if not isinstance(messages, list | tuple) or not messages:
        raise PromptError(f"messages: expected a list of objects, got {short(messages)}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise PromptError(f'messages[{index}]: expected an object with "role" and "content"')
        for name, value in message.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise PromptError(f"messages[{index}]: {short(name)} is not text")
    return [{str(name): guard(value) for name, value in message.items()} for message in messages]


def _plain(kwargs: dict) -> dict:
    try:
        return json.loads(json.dumps(kwargs))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"chat template arguments must be JSON values: {_one_line(error)}") from None


@functools.lru_cache(maxsize=16)
def _compiled(template: str):
    from jinja2 import TemplateSyntaxError

    if len(template) > MAX_TEMPLATE:
        raise BadModelFile("chat template", f"longer than {MAX_TEMPLATE} characters")
    try:
        return _environment().from_string(template)
    except TemplateSyntaxError as error:
        raise BadModelFile("chat template", f"line {error.lineno}: {_one_line(error)}") from None
    except RecursionError:
        raise BadModelFile("chat template", "nested too deeply") from None


@functools.cache
def _environment():
    """What templates find: transformers' filters, globals and tags, and no way out (after its version 5)."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context, operator, left, right):
            # short expressions that would make huge values
            for one, other in ((left, right), (right, left)):
                if operator == "*" and isinstance(one, str | list | tuple) and isinstance(other, int):
                    if len(one) * other > MAX_RENDERED:
                        raise SecurityError(f"a sequence {other} times")
            if operator == "**" and not -99 <= right <= 99:
                raise SecurityError(f"a power of {right}")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """{% generation %}: marks what the assistant said, for training; here just its content."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class SafeNamespace(Namespace):
        """Without names that begin with an underscore, which Python gives a meaning."""

        def __init__(*args, **kwargs):  # a template may pass self=
            for name in dict(*args[1:], **kwargs):
                check_name(name)
            Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name, value):
            check_name(name)
            Namespace.__setitem__(self, name, value)

    def check_name(name):
        if str(name).startswith("_"):
            raise SecurityError(f"namespace attribute {name}")

    class SafeDict:
        """dict without its attributes, which lead to Python's classes."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args):
            return dict.fromkeys(*args)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message):
        raise PromptError(f"the chat template refuses these messages: {_one_line(message)}")

    def strftime_now(pattern):
        return datetime.now().strftime(pattern)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": SafeNamespace,
        "dict": SafeDict(),
    }
    return environment


def _one_line(error) -> str:
    return " ".join(str(error).split()) or type(error).__name__


CHATML = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

LLAMA3 = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

ZEPHYR = r"""
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}
"""

# Llama 2 and Mistral have no system role: its text opens the first user message. Turns must alternate.
ALTERNATING = r"""
{%- set system = messages[0]['content'] if messages and messages[0]['role'] == 'system' else none %}
{%- set turns = messages if system is none else messages[1:] %}
{%- for message in turns %}
    {%- if message['role'] != ('user', 'assistant')[loop.index0 % 2] %}
        {{- raise_exception('roles must alternate user/assistant, after at most one system message') }}
    {%- endif %}
"""

LLAMA2 = (
    ALTERNATING
    + r"""
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' }}
        {{- '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system is not none }}
        {{- message['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
)

MISTRAL = (
    "{{- bos_token }}"
    + ALTERNATING
    + r"""
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' }}
        {{- system + '\n\n' if loop.first and system is not none }}
        {{- message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
)

TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL, "zephyr": ZEPHYR}
