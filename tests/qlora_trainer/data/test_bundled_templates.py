"""Chat templates for training."""

from collections.abc import Callable
from typing import Any

import pytest

from qlora_trainer.data.bundled_templates import TEMPLATES, bundled_template
from qlora_trainer.data.chat_template import ChatTemplate, TemplateSettings
from qlora_trainer.data.records import Chat, Message, Record
from qlora_trainer.data.tokenization import Tokenization, TokenizationOptions, render
from qlora_trainer.errors import ConfigurationError

pytestmark = pytest.mark.process

Make = Callable[..., Any]
CHATML = ("<s>", "<|im_start|>", "<|im_end|>")
GEMMA = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>")
SYSTEM, QUESTION, ANSWER = (
    Message("system", "Be brief."),
    Message("user", "Why?"),
    Message("assistant", "So."),
)
THOUGHT = Message("assistant", "So.", {"reasoning_content": "Hm."})
INLINE = Message("assistant", "<think>\nHm.\n</think>\n\nSo.")


def _of(name: str, byte_tokenizer: Make) -> Any:
    """A tokenizer with the marks of a template."""
    if name == "gemma":
        return byte_tokenizer(None, marks=GEMMA, eos="<eos>")
    if name == "plain":
        return byte_tokenizer(None, marks=("<s>", "</s>"), eos="</s>")
    return byte_tokenizer(None, marks=CHATML)


# What the families' own templates write of these conversations.
@pytest.mark.parametrize(
    ("name", "messages", "prompt", "text"),
    [
        (
            "chatml",
            [SYSTEM, QUESTION, ANSWER, QUESTION],
            True,
            (
                "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
                "<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
            ),
        ),
        (
            "qwen3",
            [SYSTEM, QUESTION, ANSWER],
            False,
            (
                "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
                "<|im_start|>assistant\n<think>\n\n</think>\n\nSo.<|im_end|>\n"
            ),
        ),
        ("qwen3", [QUESTION], True, "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"),
        (
            "qwen3-thinking",
            [QUESTION],
            True,
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        ),
        (
            "gemma",
            [SYSTEM, Message("user", " Why? "), ANSWER, QUESTION],
            True,
            (
                "<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\nSo.<end_of_turn>\n"
                "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
            ),
        ),
        (
            "plain",
            [SYSTEM, QUESTION, ANSWER],
            False,
            "<s>System: Be brief.\n\nUser: Why?\n\nAssistant: So.</s>\n\n",
        ),
        *(
            (
                name,
                [QUESTION, said],
                False,
                "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\nHm.\n</think>\n\nSo.<|im_end|>\n",
            )
            for name in ("qwen3", "qwen3-thinking")
            for said in (THOUGHT, INLINE)
        ),
    ],
)
def test_a_conversation_is_written_as_the_family_writes_it(
    byte_tokenizer: Make, name: str, messages: list[Message], prompt: bool, text: str
) -> None:
    """Where a family's own template is well defined the bundled one writes the same, byte for byte."""
    template = ChatTemplate(_of(name, byte_tokenizer), TemplateSettings(TEMPLATES[name]))

    assert template.render(messages, "", prompt=prompt)[0] == text


def test_thinking_may_be_turned_off(byte_tokenizer: Make) -> None:
    """With enable_thinking off the empty thought is part of what the model is asked with, so it is not learned."""
    settings = TemplateSettings(TEMPLATES["qwen3"], {"enable_thinking": False})
    chat = Chat((QUESTION, ANSWER))
    [sample] = Tokenization(_of("qwen3", byte_tokenizer), 1000, TokenizationOptions(settings)).samples(
        [Record("f", chat, b"")]
    )

    runs = render(sample.ids, sample.mask, _of("qwen3", byte_tokenizer))
    assert [text for text, supervised in runs if supervised] == ["So.<|im_end|>"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "messages",
    [
        (QUESTION, ANSWER),
        (SYSTEM, QUESTION, ANSWER, QUESTION, ANSWER),
        (QUESTION, SYSTEM, QUESTION, ANSWER, ANSWER, QUESTION),
        (ANSWER, QUESTION, Message("assistant", "\n  indented\n")),
        (QUESTION, THOUGHT, QUESTION, THOUGHT),
        (QUESTION, INLINE, QUESTION, ANSWER),
    ],
)
def test_every_turn_is_learned_with_its_end(
    byte_tokenizer: Make, name: str, messages: tuple[Message, ...]
) -> None:
    """Whatever the order of turns, every bundled template can be masked; those without thoughts refuse them."""
    tokenizer = _of(name, byte_tokenizer)
    thoughts = name.startswith("qwen3")
    if not thoughts:
        messages = tuple(Message(message.role, message.content) for message in messages)
    tokenization = Tokenization(tokenizer, 1000, TokenizationOptions(TemplateSettings(TEMPLATES[name])))
    [sample] = tokenization.samples([Record("f", Chat(messages), b"")])

    learned = [text for text, supervised in render(sample.ids, sample.mask, tokenizer) if supervised]
    end = {"gemma": "<end_of_turn>", "plain": "</s>"}.get(name, "<|im_end|>")
    answers = [
        message.content.split("</think>")[-1].strip() for message in messages if message.role == "assistant"
    ]
    assert len(learned) == len(answers)
    for text, answer in zip(learned, answers, strict=True):
        assert text.endswith(end)
        assert text.removesuffix(end).strip().endswith(answer)


@pytest.mark.parametrize(
    ("marks", "name"), [(CHATML, "chatml"), (GEMMA, "gemma"), (("<s>", "<|im_end|>"), "plain")]
)
def test_a_base_model_gets_the_template_of_its_tokens(
    byte_tokenizer: Make, marks: tuple[str, ...], name: str
) -> None:
    """A tokenizer without a template shows by its tokens for which one it was made."""
    tokenizer = byte_tokenizer(None, marks=marks, eos=marks[-1])

    assert bundled_template("auto", tokenizer) == TEMPLATES[name]


OWN_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("own", "name"),
    [
        pytest.param(OWN_THINKING, "qwen3", id="drops thoughts"),
        pytest.param(
            OWN_THINKING.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
            "qwen3-thinking",
            id="begins them",
        ),
        pytest.param(TEMPLATES["chatml"], None, id="is good as it is"),
        pytest.param("Hello. " + OWN_THINKING, None, id="of another family"),
        pytest.param("{{ raise_exception('no') }}", None, id="refuses all"),
    ],
)
def test_auto_replaces_a_template_that_writes_the_same(
    byte_tokenizer: Make, own: str, name: str | None
) -> None:
    """A model gets a bundled template only where that writes plain conversations as its own does."""
    assert bundled_template("auto", byte_tokenizer(own)) == (TEMPLATES[name] if name else None)


def test_a_template_that_there_is_not_is_refused(byte_tokenizer: Make) -> None:
    """The error lists those that there are."""
    with pytest.raises(
        ConfigurationError, match=r"no bundled template is called 'qwen9'; there are chatml, qwen3"
    ):
        bundled_template("qwen9", byte_tokenizer())
