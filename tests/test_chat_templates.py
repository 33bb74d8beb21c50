"""Chat templates at the endpoint: the same text as in Transformers, or a sentence, within bounds."""

from collections.abc import Sequence
from typing import Any

import pytest

from serving import templates as served
from serving.errors import InputError
from serving.templates import ChatTemplate
from tasks.common.text import templates

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS: list[dict[str, str]] = [
    {"role": "system", "content": "Be <brief> & 'exact'."},
    {"role": "user", "content": '  Ünïcode "quotes"\n'},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "and now?"},
]
TEMPLATES = {
    **templates.NAMED,
    "generation": "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'} | tojson }}",
    "undefined tools": "{% if tools %}tools{% endif %}{% if tools is not none %}T{% endif %}{{ undefined_name }}"
    "{% if documents is defined and documents %}D{% endif %}{{ messages[0].content }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro turn(m) %}[{{ m.role }}]{{ m.content.strip() }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "white space": "  {%- for m in messages %}\n    {{ m.content }}\n  {% endfor %}\n"
    "{% if add_generation_prompt %}\n A\n{% endif %}",
    "slices": "{{ messages[1:][0].content | trim | upper }}{{ messages[-1]['content'].split(' ')[0] }}{{ bos_token }}",
}  # fmt: skip


def reference(template: str, messages: Sequence[dict[str, str]]) -> str:
    """Return what Transformers renders."""
    from transformers.utils.chat_template_utils import render_jinja_template

    [text], _ = render_jinja_template([list(messages)], chat_template=template, add_generation_prompt=True, **TOKENS)
    return str(text)


@pytest.mark.parametrize("name", TEMPLATES)
def test_endpoint_renders_what_transformers_renders(name: str) -> None:
    assert ChatTemplate(TEMPLATES[name], TOKENS).render(TURNS) == reference(TEMPLATES[name], TURNS)


def test_fixed_date_is_that_of_transformers_too() -> None:
    """After the date is fixed, the day on which a conversation is rendered does not matter."""
    fixed = templates.fix_dates("{{ strftime_now('%d %B %Y') }}: {{ messages[0].content }}", "a folder")
    assert (
        ChatTemplate(fixed, TOKENS).render(TURNS) == reference(fixed, TURNS) == f"26 July 2024: {TURNS[0]['content']}"
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system turns') }}", "no system turns"),
        ("{{ messages[9].content.x }}", "no element 9|undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable|Immutable|access"),
    ],
)
def test_failure_of_a_template_is_a_sentence(template: str, reason: str) -> None:
    with pytest.raises(InputError, match=rf"(?i)rejects this conversation: .*({reason})") as failure:
        ChatTemplate(template, TOKENS).render(TURNS)
    assert failure.value.status == 400


UNBOUNDED = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ 'A' * 10000000 }}",
    "{{ ('A' * 4000000) * 4000000 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ '%99999999d' % 1 }}",
    "{{ 'x' | center(99999999) }}",
    "{{ 'x'.center(99999999) }}",
    "{{ '{:99999999}'.format(1) }}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% macro f(s, n) %}{% if n %}{{ f(s ~ s, n - 1) }}{% endif %}{% endmacro %}{{ f('aaaaaaaa', 60) }}",
]


@pytest.mark.parametrize("template", UNBOUNDED)
def test_template_without_bound_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "MAX_SECONDS", 0.2)
    with pytest.raises(InputError, match=r"rejects this conversation: it (computes|makes)") as failure:
        ChatTemplate(template, TOKENS).render(TURNS)
    assert failure.value.status == 500


def test_trace_of_a_debugger_is_restored() -> None:
    import sys

    seen: list[Any] = []
    before = sys.gettrace()

    def trace(*arguments: Any) -> None:
        seen.append(arguments)

    sys.settrace(trace)
    try:
        ChatTemplate(templates.NAMED["chatml"], TOKENS).render(TURNS)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
