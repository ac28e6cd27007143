"""Chat templates within limits."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from families import FAMILIES, Family
from qlora_trainer.data.chat_template import ChatTemplate, TemplateSettings
from qlora_trainer.data.records import Message
from qlora_trainer.data.template_limits import compiled, render
from qlora_trainer.errors import DataError

pytestmark = pytest.mark.process

Make = Callable[..., Any]
HELLO = [Message("user", "hello " * 10)]
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{{ BODY }}{% endfor %}{% endfor %}"
STEPS, TEXT, WIDE = "takes more than 500000 steps", "puts together far more text", "pads, indents or wraps"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        pytest.param(NESTED.replace("{{ BODY }}", ""), STEPS, id="loops without end"),
        pytest.param(NESTED.replace("{{ BODY }}", "x"), STEPS, id="that write"),
        pytest.param(
            "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(80) }}",
            STEPS,
            id="macros that call themselves twice",
        ),
        pytest.param("{{ 'x' * 10 ** 12 }}", TEXT, id="a text repeated"),
        pytest.param("{{ [0] * 10 ** 12 }}", TEXT, id="a list repeated"),
        pytest.param(
            "{% set n = namespace(s='xx') %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
            TEXT,
            id="a text doubled by +",
        ),
        pytest.param(
            "{% set n = namespace(s='xx') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            TEXT,
            id="by ~",
        ),
        pytest.param(
            "{% set n = namespace(s='x') %}{% for a in range(99) %}"
            "{% set n.s = n.s | replace('x', 'xx') %}{% endfor %}",
            TEXT,
            id="by a filter",
        ),
        pytest.param(
            "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s.replace('x', 'xx') %}{% endfor %}",
            TEXT,
            id="by a method",
        ),
        pytest.param(
            "{% set n = namespace(s='xx') %}{% for a in range(99) %}{% set n.s = n.s.join([n.s] * 9) %}{% endfor %}",
            TEXT,
            id="by a join",
        ),
        pytest.param(
            "{% set n = namespace(s=[1]) %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
            TEXT,
            id="a list doubled",
        ),
        pytest.param("{{ 9 ** (9 ** 9) }}", "raises a number to a power", id="a power"),
        pytest.param("{{ 'x'.center(10 ** 10) }}", WIDE, id="a padding"),
        pytest.param("{{ 'x' | center(10000000000) }}", WIDE, id="a padding by a filter"),
        pytest.param("{{ 'x' | indent(10000000000, true) }}", WIDE, id="an indent"),
        pytest.param("{{ '%9999999999d' % 1 }}", WIDE, id="a format"),
        pytest.param("{{ '%9999999999d' | format(1) }}", WIDE, id="a format by a filter"),
        pytest.param("{{ '{:9999999999}'.format(1) }}", WIDE, id="a format by a method"),
        pytest.param("{{ messages | tojson(indent=10000000000) }}", WIDE, id="an indent of JSON"),
    ],
)
def test_what_would_run_or_grow_without_end_is_stopped(byte_tokenizer: Make, template: str, why: str) -> None:
    """Within seconds and little memory, by a sentence that names record and reason."""
    began = time.monotonic()
    with pytest.raises(DataError, match=f"^f: line 3: the chat template {why}.*, and was stopped$"):
        ChatTemplate(byte_tokenizer(template), TemplateSettings()).render(HELLO, "f: line 3")

    assert time.monotonic() - began < 100  # steps are counted, so this is a matter of the machine alone


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__class__.__init__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__.__class__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ('%s' | attr('__class__')) }}{{ ''['__class__'] }}{{ lipsum.__globals__['os'] }}",
        "{% set _ = messages.append(1) %}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    ],
)
def test_a_template_reaches_nothing_but_its_data(byte_tokenizer: Make, template: str) -> None:
    """What leads from data to Python's own objects, or changes the data, is refused or is nothing."""
    try:
        text, _ = ChatTemplate(byte_tokenizer(template), TemplateSettings()).render(HELLO, "f: line 3")
    except DataError as error:
        assert str(error).startswith("f: line 3: the chat template refuses the conversation with")  # noqa: PT017
    else:
        assert "class" not in text
        assert "root" not in text


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_it_renders_what_transformers_renders(family: Family) -> None:
    """The limits change no text and no span."""
    messages = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo."},
        {"role": "user", "content": "é\n"},
    ]
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    marked = "{% generation %}" in family.template
    [theirs], spans = render_jinja_template(
        [messages],
        chat_template=family.template,
        add_generation_prompt=True,
        return_assistant_tokens_mask=marked,
        **variables,
    )

    text, ours = render(
        compiled(family.template),
        100,
        marked=marked,
        messages=messages,
        tools=None,
        add_generation_prompt=True,
        **variables,
    )

    assert text == theirs
    assert [ours] == (spans if marked else [[]])


def test_a_long_conversation_is_within_the_limits(byte_tokenizer: Make) -> None:
    """4,000 turns of 1,000 characters, by a template that looks at every turn from each."""
    template = (
        "{% set n = namespace(s='') %}{% for m in messages %}{% set n.last = true %}"
        "{% for other in messages[loop.index:][:100] %}{% set n.last = false %}{% endfor %}"
        "{{ m.role ~ ': ' ~ m.content + '\n' }}{% endfor %}"
    )
    messages = [Message("user", "x" * 1000)] * 4000

    text, _ = ChatTemplate(byte_tokenizer(template), TemplateSettings()).render(messages, "")

    assert len(text) == 4000 * 1007
