"""Which of the trainer's own chat templates a job gets: the one that it names, or the one that fits its model."""

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_trainer.data.chat_template import ChatTemplate, TemplateSettings
from qlora_trainer.data.family_templates import TEMPLATES as TEMPLATES
from qlora_trainer.data.records import Message
from qlora_trainer.errors import ConfigurationError, TrainerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
Make = Callable[[str], ChatTemplate]
"""The chat template of a text, for the model's tokenizer."""

REPLACEMENTS = (
    "qwen3",
    "qwen3-thinking",
    "qwen3-5",
    "qwen3-5-small",
    "deepseek-r1",
    "gemma",
    "glm-4",
    "glm-4-5",
    "gpt-oss",
    "mistral",
    "mistral-nemo",
    "olmo-3-think",
    "smollm-3",
)
"""The templates that `auto` gives to models that have one of their own: these families' own cannot be masked, refuse
conversations without need, or leave things out of them."""
_MARKS: dict[str, tuple[str, ...]] = {
    "gpt-oss": ("<|start|>", "<|channel|>", "<|message|>", "<|return|>"),
    "phi-4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "granite": ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    "glm-4-5": ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<think>"),
    "glm-4": ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
    "mistral-small": ("[INST]", "[/INST]", "[SYSTEM_PROMPT]"),
    "mistral": ("[INST]", "[/INST]", "▁the"),
    "mistral-nemo": ("[INST]", "[/INST]"),
    "plain": (),
}
"""The tokens by which a tokenizer without a template shows for which one it was made; the first that fits is taken."""


def bundled_template(name: str, tokenizer: "PreTrainedTokenizerBase", began: datetime.datetime) -> str | None:
    """The text of a bundled template; None where `auto` leaves a model its own.

    Args:
        name: of it, or `auto`.
        tokenizer: the model's.
        began: when the job's first attempt did. What the model's own template says of the date is of then.

    Raises:
        ConfigurationError: there is none of this name.
    """
    if name != AUTO and name not in TEMPLATES:
        raise ConfigurationError(
            f"dataset.chatTemplate: no bundled template is called {name!r}; there are {', '.join(TEMPLATES)}, {AUTO}"
        )
    if tokenizer.chat_template is None:
        known = tokenizer.get_vocab()
        fitting = (fit for fit, marks in _MARKS.items() if known.keys() >= {*marks})
        return TEMPLATES[next(fitting) if name == AUTO else name]
    try:
        own = ChatTemplate(tokenizer, TemplateSettings(clock=began))
    except TrainerError:  # several, and none for conversations
        return None if name == AUTO else TEMPLATES[name]

    def template(text: str) -> ChatTemplate:
        return ChatTemplate(tokenizer, TemplateSettings(text, clock=began))

    for candidate in REPLACEMENTS if name == AUTO else (name,):
        text = borrowed(TEMPLATES[candidate], own, template)
        if _writes_the_same(own, template(text)):
            return _with_own_for_tools(text, own, template)
        if name != AUTO:
            return text
    return None


_SYSTEM, _QUESTION, _ANSWER = (
    Message("system", "Be brief."),
    Message("user", "Is it?"),
    Message("assistant", "No."),
)
_WORD = "apple"
_CALL = Message(
    "assistant",
    "",
    {
        "tool_calls": [
            {
                "type": "function",
                "id": "abcdefghi",
                "function": {"name": "look_up", "arguments": {"word": _WORD}},
            }
        ]
    },
)
_RESULT = Message("tool", "A fruit.", {"name": "look_up", "tool_call_id": "abcdefghi"})
_PARAMETERS = {"type": "object", "properties": {"word": {"type": "string", "description": "a word"}}}
_TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": _PARAMETERS}}
    for name in ("look_up", "forget")
]


def _writes_the_same(own: ChatTemplate, other: ChatTemplate) -> bool:
    """Whether two templates write the same wherever the first is well defined, but for what the second is there for."""
    prompts = [(_written(own, chat, prompt=True), _written(other, chat, prompt=True)) for chat in _PROMPTS]
    if not any(mine for mine, _ in prompts) or any(mine not in (None, theirs) for mine, theirs in prompts):
        return False
    asked = prompts[0][1] or ""
    mine, theirs = (_written(template, [_QUESTION, _ANSWER]) for template in (own, other))
    if not _same_turn(mine, theirs, other, thinks="<think>" in asked):
        return False
    # Of tools either both write the same, or the other one refuses them.
    mine, theirs = (_written(template, [_QUESTION], _TOOLS, prompt=True) for template in (own, other))
    return mine is None or theirs in (None, mine) or _TOOLS[0]["function"]["name"] not in mine


_PROMPTS = ([_QUESTION], [_SYSTEM, _QUESTION], [Message("user", " Is it?\n ")])


def _same_turn(mine: str | None, theirs: str | None, other: ChatTemplate, *, thinks: bool) -> bool:
    """Whether two texts end with the same turn of the assistant.

    An own template may leave out what ends the last turn, and an empty thought where the prompt has begun one.
    """
    if mine is None or theirs is None:
        return mine is None
    if thinks:
        mine, theirs = (re.sub(r"<think>\s*</think>\s*", "", text) for text in (mine, theirs))
    return mine == theirs or (
        theirs.startswith(mine) and other.special.fullmatch(theirs[len(mine) :]) is not None
    )


def _written(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    prompt: bool = False,
) -> str | None:
    """What a template writes of a conversation; None of one that it refuses."""
    try:
        return template.render(messages, "", tools=tools, prompt=prompt)[0]
    except TrainerError:
        return None


def borrowed(text: str, own: ChatTemplate, template: Make) -> str:
    """A bundled template with the words that the model's own template says at the places that are open in it.

    They are taken over only where the two then write the same. The result depends on the model's template no more.
    """
    for names, tools in ((("default_system",), []), (("tools_intro", "tools_outro"), _TOOLS[:1])):
        if names[0] not in text:
            continue
        if tools and re.search(r"\bxml_tools\b", own.source):  # SmolLM3's name for them
            own = template("{%- set xml_tools = tools %}" + own.source)
        marks = {name: f"\x01{name}\x01" for name in names}
        marked = template(_assignments(marks) + text)
        theirs = _written(marked, [_QUESTION], tools, prompt=True)
        mine = _written(own, [_QUESTION], tools, prompt=True)
        if theirs is None or mine is None:
            continue
        pattern = re.escape(theirs)
        for name, mark in marks.items():
            pattern = pattern.replace(re.escape(mark), f"(?P<{name}>.*?)")
        found = re.fullmatch(pattern, mine, re.DOTALL)
        if found is None or not any(found.groupdict().values()):
            continue
        filled = _assignments(found.groupdict()) + text
        if not tools or _same_with_tools(own, template(filled)):
            text = filled
    return text


def _same_with_tools(own: ChatTemplate, other: ChatTemplate) -> bool:
    """Whether two templates write tools, a call of one and its result alike."""
    for chat in _PROMPTS:
        mine, theirs = (_written(template, chat, _TOOLS, prompt=True) for template in (own, other))
        if mine is None or mine != theirs:
            return False
    mine, theirs = (_written(template, [_QUESTION, _CALL], _TOOLS) for template in (own, other))
    # Where the own one leaves calls out the other one is free to write them.
    leaves_out = mine is not None and _WORD not in mine
    if not leaves_out and not _same_turn(mine, theirs, other, thinks=True):
        return False
    # Behind the call: what comes before it may have a thought that the own template drops.
    said = _ANSWER if leaves_out else _CALL
    results = [
        _written(template, [_QUESTION, said, _RESULT], _TOOLS, prompt=True) for template in (own, other)
    ]
    if None in results:
        return False
    behind = said.content or _WORD
    mine, theirs = (str(text).rpartition(behind)[2] for text in results)
    return mine == theirs


_IF_TOOLS = """\
{%- set about = namespace(tools=tools) %}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.tool_calls %}
        {%- set about.tools = true %}
    {%- endif %}
{%- endfor %}
{%- if about.tools %}{{- '' }}"""
# The expression at either end keeps white space of the model's own template from the blocks beside it.
_ENDED = """{{ '' }}
{%- if not add_generation_prompt and messages[-1].role == 'assistant' and not messages[-1].tool_calls %}
    {{- END }}
{%- endif %}"""
_ELSE = "{{ '' }}{%- else %}\n"
_END = "\n{%- endif %}"


def _with_own_for_tools(text: str, own: ChatTemplate, template: Make) -> str:
    """A bundled template that leaves conversations with tools to the model's own one.

    As it is where it has a place for tools itself, and where the own one has none.
    """
    answered = [_QUESTION, _ANSWER]
    chats = ([_QUESTION], [_SYSTEM, _QUESTION], [_QUESTION, _CALL])
    bundled = template(text)
    if any(_written(bundled, chat, _TOOLS) is not None for chat in chats):
        return text
    # Without markers: they would say of all conversations that nothing but what they are around is learned.
    unmarked = re.sub(
        r"\{%(-?)\s*(end)?generation\s*(-?)%\}",
        lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}",
        own.source_with_tools.removesuffix("\n"),  # which no template writes
    )
    shorter, longer = (_written(each, answered) or "" for each in (own, bundled))
    end = longer.removeprefix(shorter) if longer.startswith(shorter) else ""  # what an own one may leave out
    ended = _ENDED.replace("END", ascii(end)) if end else ""
    joined = template(_IF_TOOLS + unmarked + ended + _ELSE + text + _END)
    declares = False
    for chat, prompt in [*((chat, prompt) for chat in chats for prompt in (True, False)), (answered, False)]:
        mine, theirs = (_written(each, chat, _TOOLS, prompt=prompt) for each in (own, joined))
        if mine is not None and chat is answered:
            mine += end
        if mine != theirs:
            return text
        declares = declares or all(tool["function"]["name"] in (mine or "") for tool in _TOOLS)
    return joined.source if declares else text


def _assignments(variables: Mapping[str, str]) -> str:
    """The beginning of a template that sets variables. ASCII: Python and Jinja read such literals alike."""
    return "".join(f"{{%- set {name} = {value!a} %}}\n" for name, value in variables.items())
