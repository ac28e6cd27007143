"""A conversation as the text that the model reads."""

import datetime
from collections.abc import Callable
from typing import Any

import pytest

from qlora_trainer.data.chat_template import ChatTemplate, TemplateSettings
from qlora_trainer.data.records import Message
from qlora_trainer.errors import ConfigurationError, DataError

pytestmark = pytest.mark.process

Make = Callable[..., Any]
HELLO = [Message("user", "hello")]
SAYS = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"


def test_an_end_of_turn_beyond_the_vocabulary_ends_nothing(byte_tokenizer: Make) -> None:
    """As generation_config.json of a damaged model names one."""
    ends = [
        ChatTemplate(byte_tokenizer(SAYS), TemplateSettings(stop_ids=stop_ids)).end_tokens
        for stop_ids in ((), (10**6,))
    ]

    assert ends[0] == ends[1]


def test_a_template_is_told_the_time_that_is_set(byte_tokenizer: Make) -> None:
    """Whenever it is rendered, and whatever another template of the same text was told."""
    source = "{{ strftime_now('%Y-%m-%d %H:%M') }} " + SAYS
    days = [datetime.datetime(2026, 1, day, 23, 59, tzinfo=datetime.UTC) for day in (30, 31)]
    templates = [ChatTemplate(byte_tokenizer(), TemplateSettings(source, clock=day)) for day in days]

    assert [template.render(HELLO, "")[0] for template in (*templates, templates[0])] == [
        "2026-01-30 23:59 user=hello;",
        "2026-01-31 23:59 user=hello;",
        "2026-01-30 23:59 user=hello;",
    ]
    assert templates[0].digest() != templates[1].digest()


def test_a_template_that_asks_for_no_time_is_the_same_on_every_day(byte_tokenizer: Make) -> None:
    """Only what can change the text counts."""
    digests = {
        ChatTemplate(byte_tokenizer(SAYS), TemplateSettings(clock=day)).digest()
        for day in (datetime.datetime.min, datetime.datetime.max)
    }

    assert len(digests) == 1
    assert ChatTemplate(byte_tokenizer(SAYS + " "), TemplateSettings()).digest() not in digests


def test_variables_reach_the_template(byte_tokenizer: Make) -> None:
    """Those of the job, with those of the tokenizer."""
    source = "{{ bos_token }}{% if not thinking %}no {% endif %}" + SAYS
    template = ChatTemplate(byte_tokenizer(), TemplateSettings(source, {"thinking": False}))

    assert template.render(HELLO, "")[0] == "<s>no user=hello;"


def test_a_variable_that_the_template_does_not_use_is_refused(byte_tokenizer: Make) -> None:
    """A slip in its name must not pass for a setting."""
    with pytest.raises(
        ConfigurationError, match=r"dataset.chatTemplateKwargs.thinkng: the chat template has no"
    ):
        ChatTemplate(byte_tokenizer(), TemplateSettings("{{ thinking }}", {"thinkng": True}))


@pytest.mark.parametrize("value", [True, False, 3, "brief", 'it\'s "so"\n\\', "é\u2028"])
def test_the_text_that_travels_has_the_jobs_variables_as_defaults(byte_tokenizer: Make, value: Any) -> None:
    """Who renders it without them gets what was trained, its first line break included; who sets them, theirs."""
    source = "\n{{ style }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(byte_tokenizer(), TemplateSettings(source, {"style": value}))
    alone = ChatTemplate(byte_tokenizer(), TemplateSettings(template.portable))
    other = ChatTemplate(byte_tokenizer(), TemplateSettings(template.portable, {"style": "mine"}))

    assert alone.render(HELLO, "") == template.render(HELLO, "")
    assert other.render(HELLO, "")[0] == "\nmine|hello"
    assert alone.portable == template.portable


def test_templates_without_a_default_are_named(byte_tokenizer: Make) -> None:
    """A tokenizer with named templates says which there are to choose from."""
    tokenizer = byte_tokenizer({"tool_use": SAYS, "rag": SAYS})

    with pytest.raises(
        DataError, match="has the chat templates rag, tool_use, and none that is called default"
    ):
        ChatTemplate(tokenizer, TemplateSettings())


def test_conversations_with_tools_have_a_template_of_their_own(byte_tokenizer: Make) -> None:
    """Where the tokenizer has one that is called tool_use."""
    template = ChatTemplate(
        byte_tokenizer({"default": SAYS, "tool_use": "{{ tools | length }} " + SAYS}), TemplateSettings()
    )

    assert template.render(HELLO, "")[0] == "user=hello;"
    assert template.render(HELLO, "", tools=({"type": "function"},))[0] == "1 user=hello;"


def test_a_template_of_the_job_that_is_no_template_is_the_jobs_fault(byte_tokenizer: Make) -> None:
    """The error names the field and the place."""
    with pytest.raises(ConfigurationError, match=r"dataset.chatTemplate is not valid: .*line|tag|block"):
        ChatTemplate(byte_tokenizer(), TemplateSettings("{% for %}")).render(HELLO, "")
