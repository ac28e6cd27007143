"""Chat templates for training: for models whose own cannot be masked, and for base models that have none.

Each writes what the family's own template writes of a question, of what precedes it and of an answer to it, where that
is well defined. It differs where the own one writes a turn otherwise once others follow it (drops a thought, moves the
system's words), or refuses a conversation without need: there a turn is written as it was when it was the last, so that
every prompt is a beginning of the whole. None has a place for tools: what a family says around them is its own text.
"""

from typing import TYPE_CHECKING

from qlora_trainer.data.chat_template import ChatTemplate, TemplateSettings
from qlora_trainer.data.records import Message
from qlora_trainer.errors import ConfigurationError, TrainerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"

_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# What a thinking model says: the thought is a key of the message, or stands in its content.
_THOUGHT = """\
{%- macro thought_and_answer(message) %}
    {%- set thought = (message.reasoning_content or '') | string %}
    {%- set answer = message.content %}
    {%- if not thought and '</think>' in answer %}
        {%- set thought = (answer.split('</think>') | first).split('<think>') | last %}
        {%- set answer = answer.split('</think>') | last %}
    {%- endif %}
    {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}
{%- endmacro %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + thought_and_answer(message) + '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- raise_exception('this template has no place for tools') }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
"""

_QWEN3 = (
    _THOUGHT
    + """\
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
)

_QWEN3_THINKING = (
    _THOUGHT
    + """\
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}
"""
)

# Gemma has no turn of the system: its words stand before those of the user.
_GEMMA = """\
{{- bos_token }}
{%- set before = namespace(text='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set before.text = before.text + message.content + '\\n\\n' %}
    {%- elif message.role == 'assistant' %}
        {{- '<start_of_turn>model\\n' + message.content | trim + '<end_of_turn>\\n' }}
    {%- elif message.role == 'user' %}
        {{- '<start_of_turn>user\\n' + before.text + message.content | trim + '<end_of_turn>\\n' }}
        {%- set before.text = '' %}
    {%- else %}
        {{- raise_exception('this template has no place for tools') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""

# For a tokenizer without marks for turns: words, which a base model can read, and its end of text behind answers.
_PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- 'Assistant: ' + message.content + eos_token + '\\n\\n' }}
    {%- else %}
        {{- message.role | capitalize + ': ' + message.content + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant: ' }}
{%- endif %}
"""

TEMPLATES = {
    "chatml": _CHATML,
    "qwen3": _QWEN3,
    "qwen3-thinking": _QWEN3_THINKING,
    "gemma": _GEMMA,
    "plain": _PLAIN,
}
"""By the names that dataset.chatTemplate has for them."""

_REPLACEMENTS = ("qwen3", "qwen3-thinking", "gemma")
"""The templates that `auto` gives to models that have one of their own."""
_MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "plain": (),
}
"""The tokens by which a tokenizer without a template shows for which one it was made; the first that fits is taken."""


def bundled_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The text of a bundled template; None where `auto` leaves a model its own.

    Raises:
        ConfigurationError: there is none of this name.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name != AUTO:
        raise ConfigurationError(
            f"dataset.chatTemplate: no bundled template is called {name!r}; there are {', '.join(TEMPLATES)}, {AUTO}"
        )
    if tokenizer.chat_template is None:
        known = tokenizer.get_vocab()
        return next(TEMPLATES[name] for name, marks in _MARKS.items() if known.keys() >= {*marks})
    own = _specimens(ChatTemplate(tokenizer, TemplateSettings()))
    for text in (TEMPLATES[name] for name in _REPLACEMENTS):
        other = _specimens(ChatTemplate(tokenizer, TemplateSettings(text)))
        if any(own) and all(mine in (None, theirs) for mine, theirs in zip(own, other, strict=True)):
            return text
    return None


_SYSTEM, _QUESTION, _ANSWER = (
    Message("system", "Be brief."),
    Message("user", "Is it?"),
    Message("assistant", "No."),
)


def _specimens(template: ChatTemplate) -> list[str | None]:
    """What a template writes of plain conversations; None of one that it refuses."""
    texts: list[str | None] = []
    for messages, prompt in (
        ([_QUESTION], True),
        ([_SYSTEM, _QUESTION], True),
        ([_QUESTION, _ANSWER], False),
    ):
        try:
            texts.append(template.render(messages, "", prompt=prompt)[0])
        except TrainerError:
            texts.append(None)
    return texts
