"""Chat templates for training."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from families import BUNDLED, Family, tokenizer_of
from qlora_trainer.data.bundled_templates import REPLACEMENTS, TEMPLATES, bundled_template
from qlora_trainer.data.chat_template import ChatTemplate, TemplateSettings
from qlora_trainer.data.records import Chat, Message, Record
from qlora_trainer.data.tokenization import Tokenization, TokenizationOptions, render
from qlora_trainer.errors import ConfigurationError, DataError

pytestmark = pytest.mark.process

Make = Callable[..., Any]
FAMILIES = {family.name: family for family in BUNDLED}
SYSTEM, QUESTION, ANSWER = (
    Message("system", "Be brief."),
    Message("user", "Why?"),
    Message("assistant", "So."),
)
THOUGHT = Message("assistant", "So.", {"reasoning_content": "Hm."})
INLINE = Message("assistant", "<think>\nHm.\n</think>\n\nSo.")
CALL = Message(
    "assistant",
    "",
    {
        "tool_calls": [
            {"type": "function", "id": "abcdefghi", "function": {"name": "find", "arguments": {"word": "a"}}}
        ]
    },
)
RESULT = Message("tool", "Here.", {"name": "find", "tool_call_id": "abcdefghi"})
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
DAY = datetime.datetime(2026, 3, 4, tzinfo=datetime.UTC)


def _rendering(name: str, text: str | None = None) -> ChatTemplate:
    return ChatTemplate(tokenizer_of(FAMILIES[name]), TemplateSettings(text or TEMPLATES[name], clock=DAY))


PAIRS = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "So.<|im_end|>\n",
    ),
    "qwen3": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nHm.\n</think>\n\nSo.<|im_end|>\n",
    ),
    "qwen3-thinking": (
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n"
        ),
        "Hm.\n</think>\n\nSo.<|im_end|>\n",
    ),
    "qwen3-5": (
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n"
        ),
        "Hm.\n</think>\n\nSo.<|im_end|>\n",
    ),
    "qwen3-5-small": (
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n\n</think>\n\n"
        ),
        "So.<|im_end|>\n",
    ),
    "deepseek-r1": (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Why?<｜Assistant｜><think>\n",
        "Hm.\n</think>\n\nSo.<｜end▁of▁sentence｜>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        "So.<end_of_turn>\n",
    ),
    "glm-4": (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nWhy?<|assistant|>\n",
        "So.<|user|>",
    ),
    "glm-4-5": (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nWhy?<|assistant|>",
        "\n<think>Hm.</think>\nSo.<|user|>",
    ),
    "gpt-oss": (
        (
            "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge "
            "cutoff: 2024-06\nCurrent date: 2026-03-04\n\nReasoning: medium\n\n# Valid channels: analysis, "
            "commentary, final. Channel must be included for every message.<|end|><|start|>developer<|message|># "
            "Instructions\n\nBe brief.\n\n<|end|><|start|>user<|message|>Why?<|end|><|start|>assistant"
        ),
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>So.<|return|>",
    ),
    "granite": (
        (
            "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>"
            "Why?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
        ),
        "So.<|end_of_text|>\n",
    ),
    "llama-3": (
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>"
            "assistant<|end_header_id|>\n\n"
        ),
        "So.<|eot_id|>",
    ),
    "llama-3-1": (
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December "
            "2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "Why?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        "So.<|eot_id|>",
    ),
    "llama-3-2": (
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December "
            "2023\nToday Date: 04 Mar 2026\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "Why?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        "So.<|eot_id|>",
    ),
    "mistral": (
        "<s>[INST] Be brief.\n\nWhy?[/INST]",
        " So.</s>",
    ),
    "mistral-nemo": (
        "<s>[INST]Be brief.\n\nWhy?[/INST]",
        "So.</s>",
    ),
    "mistral-large": (
        "<s>[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST] Why?[/INST]",
        " So.</s>",
    ),
    "mistral-small": (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Why?[/INST]",
        "So.</s>",
    ),
    "olmo-2": (
        "<|endoftext|><|system|>\nBe brief.\n<|user|>\nWhy?\n<|assistant|>\n",
        "So.<|endoftext|>",
    ),
    "olmo-3": (
        (
            "<|im_start|>system\nBe brief. You do not currently have access to any functions. "
            "<functions></functions><|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        ),
        "<think>Hm.</think>So.<|im_end|>",
    ),
    "olmo-3-think": (
        (
            "<|im_start|>system\nBe brief. You do not currently have access to any functions. "
            "<functions></functions><|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>"
        ),
        "Hm.</think>So.<|im_end|>",
    ),
    "phi-3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n",
        "So.<|end|>\n<|endoftext|>",
    ),
    "phi-4-mini": (
        "<|system|>Be brief.<|end|><|user|>Why?<|end|><|assistant|>",
        "So.<|end|><|endoftext|>",
    ),
    "phi-4": (
        (
            "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Why?<|im_end|><|im_start|>"
            "assistant<|im_sep|>"
        ),
        "So.<|im_end|>",
    ),
    "plain": (
        "<s>System: Be brief.\n\nUser: Why?\n\nAssistant: ",
        "So.</s>\n\n",
    ),
    "smollm-3": (
        (
            "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 04 March 2026\n"
            "Reasoning Mode: /think\n\n## Custom Instructions\n\nBe brief.\n\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\n"
        ),
        "<think>\nHm.\n</think>\nSo.<|im_end|>\n",
    ),
}
"""What the families' own templates write of a system's words and a question when the model is asked, and of an answer
to it that is the last; with a thought where the family thinks. GLM's write no end; it is the mark that comes next."""


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_written_as_the_family_writes_it(name: str) -> None:
    """Where a family's own template is well defined the bundled one writes the same, byte for byte."""
    template = _rendering(name)
    asked, said = PAIRS[name]
    answer = THOUGHT if FAMILIES[name].thought else ANSWER

    assert template.render([SYSTEM, QUESTION], "", prompt=True)[0] == asked
    assert template.render([SYSTEM, QUESTION, answer], "")[0] == asked + said


@pytest.mark.parametrize(
    ("name", "call", "result"),
    [
        (
            "qwen3",
            (
                '<think>\n\n</think>\n\n<tool_call>\n{"name": "find", "arguments": {"word": "a"}}\n</tool_call>'
                "<|im_end|>\n"
            ),
            "<|im_start|>user\n<tool_response>\nHere.\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen3-5",
            (
                "\n</think>\n\n<tool_call>\n<function=find>\n<parameter=word>\na\n</parameter>\n</function>\n"
                "</tool_call><|im_end|>\n"
            ),
            "<|im_start|>user\n<tool_response>\nHere.\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n",
        ),
        (
            "glm-4-5",
            (
                "\n<think></think>\n<tool_call>find\n<arg_key>word</arg_key>\n<arg_value>a</arg_value>\n</tool_call>"
                "<|observation|>"
            ),
            "\n<tool_response>\nHere.\n</tool_response><|assistant|>",
        ),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "find", "arguments": {"word": "a"}, "id": "abcdefghi"}]</s>',
            '[TOOL_RESULTS] {"content": Here., "call_id": "abcdefghi"}[/TOOL_RESULTS]',
        ),
        (
            "mistral-nemo",
            '[TOOL_CALLS][{"name": "find", "arguments": {"word": "a"}, "id": "abcdefghi"}]</s>',
            '[TOOL_RESULTS]{"content": Here., "call_id": "abcdefghi"}[/TOOL_RESULTS]',
        ),
    ],
)
def test_a_call_of_a_tool_is_written_as_the_family_writes_it(name: str, call: str, result: str) -> None:
    """The call as the assistant says it, its result, and what the assistant is asked to go on with."""
    template = _rendering(name)
    asked = template.render([QUESTION], "", prompt=True)[0]

    assert template.render([QUESTION, CALL, RESULT], "", prompt=True)[0] == asked + call + result


def test_mistral_declares_tools_before_the_question() -> None:
    """As its own template does."""
    assert _rendering("mistral").render([QUESTION], "", tools=[TOOL], prompt=True)[0] == (
        '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]'
        "[/AVAILABLE_TOOLS][INST] Why?[/INST]"
    )


def test_smollm3_is_told_by_the_systems_words_whether_to_think() -> None:
    """Its own template takes /no_think and /system_override out of them."""
    template = _rendering("smollm-3")
    quiet = template.render([Message("system", "Be brief. /no_think"), QUESTION], "", prompt=True)[0]
    bare = template.render([Message("system", "Hello /system_override"), QUESTION], "", prompt=True)[0]

    assert "Reasoning Mode: /no_think\n\n## Custom Instructions\n\nBe brief.\n\n" in quiet
    assert quiet.endswith("<|im_start|>assistant\n<think>\n\n</think>\n")
    assert bare.startswith("<|im_start|>system\nHello<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize("name", ["gemma", "mistral", "mistral-nemo"])
def test_a_systems_words_are_not_lost_where_no_question_follows(name: str) -> None:
    """Families without a turn of the system have its words in the user's; before an answer they make one."""
    template = _rendering(name)
    asked = template.render([SYSTEM], "", prompt=True)[0]

    assert "Be brief." in asked
    assert template.render([SYSTEM, ANSWER], "")[0].startswith(asked)


def test_thinking_may_be_turned_off() -> None:
    """With enable_thinking off the empty thought is part of what the model is asked with, so it is not learned."""
    settings = TemplateSettings(TEMPLATES["qwen3"], {"enable_thinking": False})
    tokenizer = tokenizer_of(FAMILIES["qwen3"])
    [sample] = Tokenization(tokenizer, 1000, TokenizationOptions(settings)).samples(
        [Record("f", Chat((QUESTION, ANSWER)), b"")]
    )

    runs = render(sample.ids, sample.mask, tokenizer)
    assert [text for text, supervised in runs if supervised] == ["So.<|im_end|>"]


@pytest.mark.parametrize(
    ("marks", "name"),
    [
        *(
            (family.marks, name)
            for name, family in FAMILIES.items()
            if name in ("chatml", "gemma", "gpt-oss")
        ),
        *((family.marks, name) for name, family in FAMILIES.items() if name in ("llama-3", "phi-4", "glm-4")),
        ((*FAMILIES["granite"].marks, "<|end_of_text|>"), "granite"),
        (FAMILIES["mistral-small"].marks, "mistral-small"),
        (("<s>", "[INST]", "[/INST]"), "mistral-nemo"),
        (("<s>", "[INST]", "[/INST]", "▁the"), "mistral"),
        (("<s>", "<|im_end|>"), "plain"),
    ],
)
def test_a_base_model_gets_the_template_of_its_tokens(
    byte_tokenizer: Make, marks: tuple[str, ...], name: str
) -> None:
    """A tokenizer without a template shows by its tokens for which one it was made."""
    marks = (*marks, FAMILIES[name].eos) if name == "gpt-oss" else marks
    tokenizer = byte_tokenizer(None, marks=marks, eos=marks[-1])

    assert bundled_template("auto", tokenizer, DAY) == TEMPLATES[name]


OWN_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALWAYS_THINKING = OWN_THINKING.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
OWN_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif "
    "m.role == 'system' %}"
    "{{ m.content }}{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% "
    "endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
OWN_MISTRAL = (
    "{% set s = namespace(text='') %}{% if messages[0].role == 'system' %}{% set s.text = "
    "messages[0].content + '\n\n' %}"
    "{% endif %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ s.text if loop.last }}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% "
    "endif %}{% endfor %}"
)
OWN_GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("family", "own", "name"),
    [
        pytest.param("qwen3", OWN_THINKING, "qwen3", id="drops thoughts"),
        pytest.param("qwen3", ALWAYS_THINKING, "qwen3-thinking", id="begins them"),
        pytest.param(
            "qwen3",
            ALWAYS_THINKING.replace("m.content", "m.content | trim"),
            "qwen3-5",
            id="begins them and trims",
        ),
        pytest.param("deepseek-r1", OWN_R1, "deepseek-r1", id="splits at thoughts"),
        pytest.param("mistral", OWN_MISTRAL, "mistral", id="moves the system's words"),
        pytest.param(
            "mistral",
            OWN_MISTRAL.replace("[INST] ", "[INST]").replace("%} {{ m.content | trim", "%}{{ m.content"),
            "mistral-nemo",
            id="moves them, and has no spaces",
        ),
        pytest.param("glm-4", OWN_GLM, "glm-4", id="ends no turn"),
        pytest.param("chatml", TEMPLATES["chatml"], None, id="is good as it is"),
        pytest.param("qwen3", "Hello. " + OWN_THINKING, None, id="of another family"),
        pytest.param(
            "qwen3",
            OWN_THINKING.replace("assistant\n{% endif", "assistant\n\n{% endif"),
            None,
            id="asks otherwise",
        ),
        pytest.param("mistral", OWN_MISTRAL.replace("[/INST]", "[/INST] "), None, id="with other spaces"),
        pytest.param("chatml", "{{ raise_exception('no') }}", None, id="refuses all"),
    ],
)
def test_auto_replaces_a_template_that_writes_the_same(family: str, own: str, name: str | None) -> None:
    """A model gets a bundled template only where that writes plain conversations as its own does."""
    tokenizer = tokenizer_of(FAMILIES[family])
    tokenizer.chat_template = own

    assert bundled_template("auto", tokenizer, DAY) == (TEMPLATES[name] if name else None)


DECLARES = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "You have \"tools\" - use them:{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n' }}As you like."
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% elif not (tools and loop.first and m.role == 'system') %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls %}<tool_call>\n{{ c.function | tojson }}"
    "\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _own_and_auto(family: Family, own: str) -> tuple[ChatTemplate, ChatTemplate]:
    tokenizer = tokenizer_of(family)
    tokenizer.chat_template = own
    text = bundled_template("auto", tokenizer, DAY)
    assert text is not None
    return ChatTemplate(tokenizer, TemplateSettings(clock=DAY)), ChatTemplate(
        tokenizer, TemplateSettings(text, clock=DAY)
    )


def test_what_a_model_says_around_tools_is_taken_from_its_own_template() -> None:
    """The bundled template then declares tools word for word as the model's own does, whatever it says."""
    own, auto = _own_and_auto(FAMILIES["qwen3"], DECLARES)

    assert auto.source.endswith(TEMPLATES["qwen3"])
    for chat in ([QUESTION], [SYSTEM, QUESTION]):
        written = own.render(chat, "", tools=[TOOL], prompt=True)[0]
        assert 'You have "tools" - use them' in written
        assert auto.render(chat, "", tools=[TOOL], prompt=True)[0] == written


SMOLLM3_TOOLS = (
    "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n"
    "Today Date: {{ strftime_now('%d %B %Y') }}\nReasoning Mode: /think\n\n## Custom Instructions\n\n"
    "{{ messages[0].content if messages[0].role == 'system' else 'You are kind.' }}\n\n"
    "{% if GIVEN %}### Tools\n\nThese:\n{% for t in GIVEN %}{{ t | string }}\n{% endfor %}</these>\n\n<|im_end|>\n"
    "{% endif %}{% for m in messages %}{% if m.role != 'system' %}"
    "<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("given", ["xml_tools", "(xml_tools or tools)"])
def test_smollm3_declares_tools_as_its_own_template_does_and_writes_the_calls_that_it_drops(
    given: str,
) -> None:
    """Older releases of its own template know tools as xml_tools alone, which no server hands over."""
    known = FAMILIES["smollm-3"]
    tokenizer = tokenizer_of(known)
    tokenizer.chat_template = SMOLLM3_TOOLS.replace("GIVEN", given)
    text = bundled_template("auto", tokenizer, DAY)
    assert text is not None
    settings = TemplateSettings(text, clock=DAY)
    own = ChatTemplate(tokenizer, TemplateSettings(variables={"xml_tools": [TOOL]}, clock=DAY))

    for chat in ([QUESTION], [SYSTEM, QUESTION], [QUESTION, ANSWER, RESULT]):
        written = own.render(chat, "", prompt=True)[0]
        assert str(TOOL) in written
        assert ChatTemplate(tokenizer, settings).render(chat, "", tools=[TOOL], prompt=True)[0] == written
    chat = Chat((QUESTION, CALL, RESULT, ANSWER), (TOOL,))
    [sample] = Tokenization(tokenizer, 1000, TokenizationOptions(settings)).samples([Record("f", chat, b"")])
    learned = "".join(part for part, supervised in render(sample.ids, sample.mask, tokenizer) if supervised)
    assert learned == known.learned(chat)
    assert learned.startswith(
        '<tool_call>\n{"name": "find", "arguments": {"word": "a"}}\n</tool_call><|im_end|>'
    )


@pytest.mark.parametrize(
    ("chat", "tools", "why"),
    [
        ([QUESTION], [TOOL], "it never says which there are"),
        ([QUESTION, CALL], [], "ends no single call, and begins it otherwise than the model is asked"),
        ([QUESTION, ANSWER, RESULT], [], "no place for the result of a call"),
    ],
)
def test_deepseek_r1_says_why_it_has_no_tools(chat: list[Message], tools: list[Any], why: str) -> None:
    """The family's own template is not well defined there."""
    with pytest.raises(DataError, match=f"f: line 1: .*{why}"):
        _rendering("deepseek-r1").render(chat, "f: line 1", tools=tools)


OTHERWISE = {
    "declared otherwise": DECLARES.replace("tool | tojson", "tool.function | tojson"),
    "other results": DECLARES.replace("<tool_response>", "<result>"),
    "other calls": DECLARES.replace("<tool_call>", "<call>"),
}
# Of families whose bundled templates have no place for tools: what may be troublesome about their own ones.
DECLARED = "{% if tools %}{% for t in tools %}{{ t.function | tojson }}{% endfor %}{% endif %}"
OWN_WITH_TOOLS = {
    "glm-4": (
        "[gMASK]<sop>{% if tools %}<|system|>\nTools:" + DECLARED + "{% endif %}{% for m in messages %}"
        "{% if m.role == 'assistant' and m.tool_calls %}{% for c in m.tool_calls %}<|assistant|>\n"
        "{{ c.function.name }}\n"
        "{{ c.function.arguments | tojson }}{% endfor %}{% elif m.role == 'tool' %}<|observation|>\n{{ m.content }}"
        "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "olmo-3-think": (
        "{% set none_of_them = ' You do not currently have access to any functions. <functions></functions>' %}"
        "{% for m in messages %}<|im_start|>{{ 'environment' if m.role == 'tool' else m.role }}\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ '<think></think>' if loop.last and not m.tool_calls }}"
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ eos_token }}"
        "{% endgeneration %}{{ '\n' if add_generation_prompt or not loop.last }}{% else %}{{ m.content }}"
        "{% if m.role == 'system' %}{% if tools %}<functions>"
        + DECLARED
        + "</functions>{% else %}{{ none_of_them }}"
        "{% endif %}{% endif %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    ),
    "llama-3": (
        "\n  {{- bos_token }}"
        + DECLARED.replace("{{ t", "\n  {{ t")
        + "{% for m in messages %}<|start_header_id|>"
        "{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
        "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|eot_id|>{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}\n"
    ),
}


@pytest.mark.parametrize(
    ("family", "own"),
    [
        *(pytest.param(family, own, id=family) for family, own in OWN_WITH_TOOLS.items()),
        *(pytest.param("qwen3", own, id=name) for name, own in OTHERWISE.items()),
    ],
)
def test_conversations_with_tools_are_left_to_the_models_own_template(family: str, own: str) -> None:
    """Where a bundled one cannot write them: byte for byte what the own one writes; all else is the bundled one's."""
    tokenizer = tokenizer_of(FAMILIES[family])
    tokenizer.chat_template = own
    text = bundled_template(family, tokenizer, DAY)
    theirs, joined = (ChatTemplate(tokenizer, TemplateSettings(source, clock=DAY)) for source in (None, text))
    bundled = ChatTemplate(tokenizer, TemplateSettings(TEMPLATES[family], clock=DAY))
    with_tools = ([SYSTEM, QUESTION], [QUESTION, CALL, RESULT], [QUESTION, CALL, RESULT, ANSWER, QUESTION])

    for chat in with_tools:
        for tools in ([TOOL], []) if CALL in chat else ([TOOL],):
            written = theirs.render(chat, "", tools=tools, prompt=True)[0]
            assert joined.render(chat, "", tools=tools, prompt=True)[0] == written
            assert '"find"' in written or "find\n" in written
    for chat in ([QUESTION, ANSWER], [SYSTEM, QUESTION, ANSWER, QUESTION, ANSWER]):
        assert joined.render(chat, "")[0] == bundled.render(chat, "")[0]


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("glm-4", 'find\n{"word": "a"}<|observation|>'),
        ("llama-3", '{"name": "find", "arguments": {"word": "a"}}<|eot_id|>'),
    ],
)
def test_calls_that_the_own_template_writes_are_learned(family: str, call: str) -> None:
    """With what ends them, and the answer with the end that the own template may leave out of the last turn."""
    known = FAMILIES[family]
    tokenizer = tokenizer_of(known)
    tokenizer.chat_template = OWN_WITH_TOOLS[family]
    stops = tuple(tokenizer.convert_tokens_to_ids(list(known.stops)))
    settings = TemplateSettings(bundled_template(family, tokenizer, DAY), clock=DAY, stop_ids=stops)
    chat = Chat((QUESTION, CALL, RESULT, ANSWER, QUESTION, ANSWER), (TOOL,))
    [sample] = Tokenization(tokenizer, 1000, TokenizationOptions(settings)).samples([Record("f", chat, b"")])

    learned = [text for text, supervised in render(sample.ids, sample.mask, tokenizer) if supervised]
    assert [text.removeprefix("\n") for text in learned] == [call, f"So.{known.end}", f"So.{known.end}"]


@pytest.mark.parametrize(
    ("name", "own"),
    [
        pytest.param("deepseek-r1", OWN_R1, id="has no place for them either"),
        pytest.param("llama-3", OWN_WITH_TOOLS["glm-4"], id="is of another family"),
        pytest.param("chatml", DECLARES, id="writes the rest otherwise"),
    ],
)
def test_tools_that_no_template_of_the_family_writes_are_refused(name: str, own: str) -> None:
    """An own template that says otherwise what the bundled one says is no help with what that one cannot say."""
    tokenizer = tokenizer_of(FAMILIES[name])
    tokenizer.chat_template = own

    text = bundled_template(name, tokenizer, DAY)

    assert text == TEMPLATES[name]
    with pytest.raises(DataError, match=r"f: line 1: the .* no place for"):
        ChatTemplate(tokenizer, TemplateSettings(text)).render([QUESTION], "f: line 1", tools=[TOOL])


def test_what_a_model_says_in_place_of_a_systems_words_is_taken_from_its_own_template() -> None:
    """Also where the template is named; the day in it is that of the job's first attempt."""
    own = (
        "[SYSTEM_PROMPT]{{ messages[0].content if messages[0].role == 'system' "
        "else 'Be \"kind\" on ' + strftime_now('%d %b') }}[/SYSTEM_PROMPT]"
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'assistant' %}"
        "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_of(FAMILIES["mistral-small"])
    tokenizer.chat_template = "{{ bos_token }}" + own
    text = bundled_template("mistral-small", tokenizer, DAY)

    written = ChatTemplate(tokenizer, TemplateSettings(text)).render([QUESTION], "", prompt=True)[0]
    assert written == '<s>[SYSTEM_PROMPT]Be "kind" on 04 Mar[/SYSTEM_PROMPT][INST]Why?[/INST]'


def test_a_template_that_there_is_not_is_refused(byte_tokenizer: Make) -> None:
    """The error lists those that there are."""
    with pytest.raises(
        ConfigurationError, match=r"no bundled template is called 'qwen9'; there are chatml, .*qwen3"
    ):
        bundled_template("qwen9", byte_tokenizer(), DAY)


def test_the_documentation_lists_every_template_and_what_it_can_do() -> None:
    """Each with thoughts and tools where the table of conversations has them, and whether `auto` takes it."""
    page = Path(__file__).parents[3] / "docs/conversations.md"
    table = page.read_text().partition("| Bundled template |")[2].partition("\n\n")[0]
    rows = [
        [cell.strip() for cell in line.replace("\\|", "!").split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith("| `")
    ]

    assert sorted(row[0].strip("`") for row in rows) == sorted(TEMPLATES)
    for name, _, thoughts, tools, replaces in rows:
        family = FAMILIES[name.strip("`")]
        assert bool(thoughts) == (family.thought is not None), name
        assert bool(tools) == (family.calls is not None), name
        assert bool(replaces) == (family.name in REPLACEMENTS), name
