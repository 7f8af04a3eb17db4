"""Chat templates: rendered as transformers renders them, and contained whatever they try."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from tinydrug.errors import BadModelFile, ConfigError, PromptError
from tinydrug.text import chat
from tinydrug.text.chat import TEMPLATES, named_template, render

GOLDEN = json.loads((Path(__file__).parent / "golden" / "text_chat.json").read_text("utf-8"))
USER = [{"role": "user", "content": "Hi"}]
TALK = [
    {"role": "system", "content": "S"},
    *USER,
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_equals_transformers(case):
    for name, prompt, expected in case["rendered"]:
        messages, options = GOLDEN["messages"][name], {"tokens": case["tokens"], "kwargs": GOLDEN["kwargs"]}
        if expected is None:
            with pytest.raises(PromptError, match="refuses these messages"):
                render(case["template"], messages, add_generation_prompt=prompt, **options)
        else:
            assert render(case["template"], messages, add_generation_prompt=prompt, **options) == expected


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("llama2", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nHi [/INST] Yo </s><s>[INST] Bye [/INST]"),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] S\n\nHi [/INST] Yo</s>[INST] Bye [/INST]"),
        (
            "zephyr",
            "<|system|>\nS</s>\n<|user|>\nHi</s>\n<|assistant|>\nYo</s>\n<|user|>\nBye</s>\n<|assistant|>\n",
        ),
    ],
)
def test_named_templates(name, expected):
    assert render(named_template(name), TALK, tokens=TOKENS) == expected


def test_unknown_name():
    with pytest.raises(ConfigError, match="alpaca.*chatml, llama2, llama3, mistral, zephyr"):
        named_template("alpaca")
    assert set(TEMPLATES) == {"chatml", "llama2", "llama3", "mistral", "zephyr"}


@pytest.mark.parametrize(
    "messages, message",
    [
        (None, "list"),
        ([], "list"),
        ("Hi", "list"),
        (["Hi"], r"messages\[0\]"),
        ([*USER, {"role": "user"}], r"messages\[1\]"),
        ([{"content": "Hi"}], r"messages\[0\]"),
        ([{"role": "user", "content": None}], "'content' is not text"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "'content' is not text"),
        ([{"role": 1, "content": "Hi"}], "'role' is not text"),
        ([{"role": "user", "content": "Hi", 3: "x"}], "3 is not text"),
        ([{"role": "user", "content": "Hi", "image": object()}], "'image' is not text"),
    ],
)
def test_malformed_messages(messages, message):
    with pytest.raises(PromptError, match=message):
        render("{{ messages }}", messages)


BROKEN = [
    ("{% if %}", "line 1"),
    ("\n\n{{ a b }}", "line 3"),
    ("{% include 'x' %}", "fails"),
    ("{% nonsense %}", "line 1"),
    ("{{ missing.field }}", "'missing' is undefined"),
    ("{{ messages[9].content }}", "fails"),
    ("{{ 1 + 'a' }}", "fails"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    # what the sandbox is for
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ messages[0].update(role='x') }}", "unsafe"),
    ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ("{{ namespace(__x=1) }}", "namespace attribute __x"),
    ("{% set ns = namespace() %}{% set ns._y = 2 %}", "namespace attribute _y"),
    # what would fill the memory
    ("{{ 'a' * 10**9 }}", "times"),
    ("{{ 10**9 * [1] }}", "times"),
    ("{{ 2 ** 100000 }}", "power"),
    ("{% for i in range(10**9) %}{% endfor %}", "fails"),
    ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than"),
]


@pytest.mark.parametrize("template, message", BROKEN)
def test_broken_templates(template, message):
    with pytest.raises(BadModelFile, match=message) as caught:
        render(template, USER)
    assert str(caught.value).startswith("chat template: ") and "\n" not in str(caught.value)


def test_template_size(monkeypatch):
    monkeypatch.setattr(chat, "MAX_TEMPLATE", 10)
    with pytest.raises(BadModelFile, match="longer than 10"):
        render("{{ 'longer' }}", USER)


def test_refusal_is_one_line():
    with pytest.raises(PromptError, match="refuses these messages: No system please$"):
        render("{{ raise_exception('No system\n  please') }}", USER)


def test_variables():
    assert (
        render("{{ a }}{{ b.c[0] }}{{ tools }}", USER, kwargs={"a": 1, "b": {"c": ["x"]}, "tools": "t"})
        == "1xt"
    )
    assert (
        render("{{ messages | length }}{{ add_generation_prompt }}", USER, kwargs={"messages": []}) == "1True"
    )
    assert render("{{ bos_token }}|{{ eos_token }}", USER) == "|"
    assert render("{{ '{0.__class__}|{0}'.format(1) }}", USER) == "|1"
    assert render("{{ strftime_now('%Y') }}", USER) in {
        str(datetime.now().year),
        str(datetime.now().year - 1),
    }
    assert render("{{ 2 ** 8 }}{{ 'ab' * 2 }}{{ 3 * [0] }}", USER) == "256abab[0, 0, 0]"
    for kwargs in ({"a": object()}, {"a": {1j: 2}}):
        with pytest.raises(PromptError, match="JSON"):
            render("", USER, kwargs=kwargs)


def test_messages_are_left_alone():
    messages = [dict(message) for message in TALK]
    render("{% for m in messages %}{% set m = 1 %}{% endfor %}", messages)
    assert messages == TALK


def test_a_template_is_compiled_once():
    assert chat._compiled(TEMPLATES["chatml"]) is chat._compiled(TEMPLATES["chatml"])
