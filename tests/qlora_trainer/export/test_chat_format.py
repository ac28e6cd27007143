"""Chat templates as plain text around turns."""

from typing import Any

import jinja2
import pytest

from qlora_trainer.export.chat_format import chat_format, without_generation_marks

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + CHATML
)
INSTRUCTIONS = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no system') }}{% endif %}"
    "{% endfor %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}"


class Renderer:
    """What of a tokenizer runs templates."""

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        *,
        chat_template: str,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str:
        """The text of a conversation."""
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        return environment.from_string(chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, raise_exception=refuse
        )


CONVERSATIONS = [
    [("user", "Hi")],
    [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")],
    [("system", "Be brief"), ("user", "Hi")],
]


@pytest.mark.parametrize(
    ("template", "system"),
    [
        pytest.param(CHATML, True, id="ChatML"),
        pytest.param(WITH_DEFAULT, True, id="with a message of its own"),
        pytest.param(INSTRUCTIONS, False, id="instructions, without a system"),
    ],
)
def test_the_format_writes_what_the_template_writes(template: str, *, system: bool) -> None:
    """For every conversation that the template takes."""
    renderer: Any = Renderer()

    found = chat_format(renderer, template)

    assert found is not None
    assert ("system" in found.turns) == system
    for conversation in CONVERSATIONS[: 3 if system else 2]:
        written = [{"role": role, "content": text} for role, text in conversation]
        assert found.render(conversation) == renderer.apply_chat_template(
            written, chat_template=template, tokenize=False, add_generation_prompt=True
        )


@pytest.mark.parametrize(
    "template",
    [pytest.param(NUMBERED, id="each turn differs"), pytest.param("{{ nothing.at.all }}", id="broken")],
)
def test_a_template_that_is_no_plain_text_around_turns_has_no_format(template: str) -> None:
    """Better none than one that is nearly right."""
    assert chat_format(Renderer(), template) is None


@pytest.mark.parametrize(
    "mark", ["{% generation %}|{% endgeneration %}", "{%- generation -%}|{%- endgeneration -%}"]
)
def test_marks_of_what_is_learned_are_taken_out_and_nothing_else(mark: str) -> None:
    """Only transformers knows them; blanks around them stay or go as they did."""
    before, after = mark.split("|")
    template = f"a\n{before}\n b {after}\nc"

    plain = without_generation_marks(template)

    assert "generation" not in plain
    expected = template.replace("endgeneration", "endif").replace("generation", "if true")
    assert plain == expected
    assert without_generation_marks(CHATML) == CHATML
