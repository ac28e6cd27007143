"""Families of chat models for tests: their templates, small tokenizers with their tokens, and what they should learn.

The templates are the trainer's own, and small models of what is troublesome about others: written here, none copied.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_trainer.data.family_templates import TEMPLATES
from qlora_trainer.data.records import Chat, Message

BREAKS = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("ĊĊ", "Ċ"), (".", "Ċ"), (">", "Ċ"), ("Ċ", "Ġ"), (":", "Ġ"), ("ĊĊ", "ĠĠ")]
"""Merges that join what a prompt ends with to what an answer begins with, or an answer's end to what follows it."""


def tokenizer_of(family: "Family") -> Any:
    """A fast tokenizer of a family's kind, with its special tokens and its template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [
        AddedToken(mark, special=True, normalized=False, rstrip=mark in family.rstrip)
        for mark in dict.fromkeys((*family.marks, family.eos, *family.stops))
    ]
    if family.kind == "bytes":
        words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in BREAKS)]
        core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, BREAKS))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
    else:  # as sentencepiece: a space before the text, and bytes for what is unknown
        letters = [f"<0x{i:02X}>" for i in range(256)] + ["▁", *map(chr, range(33, 127))]
        merges = [("▁", "▁"), ("▁", "t"), ("▁t", "h"), ("▁th", "e")]
        words = ["<unk>", *letters, *("".join(pair) for pair in merges)]
        core = Tokenizer(
            models.BPE(
                {word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True
            )
        )
        if family.kind == "sentencepiece":
            core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    core.add_special_tokens(special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=family.bos or family.marks[0], eos_token=family.eos
    )
    made.chat_template = family.template
    return made


def _as_it_is(text: str) -> str:
    return text


def _strip(text: str) -> str:
    return text.strip()


def _without_first_breaks(text: str) -> str:
    return text.lstrip("\n")


def _on_a_line(text: str) -> str:
    return "\n" + text.strip() if text.strip() else ""


NO_TOOLS = {"tools": "no place for|leaves tools"} | dict.fromkeys(
    ("call", "two calls"), "call|no place for|markers are around|leaves this turn"
)
ALONE = dict.fromkeys(("assistant first", "assistant alone"), r"messages\[0\] is the assistant's")
NO_THOUGHTS = dict.fromkeys(
    ("reasoning", "two thoughts", "unlike turns"), "leaves the reasoning_content of this turn out"
)
NOT_ALTERNATING = dict.fromkeys(
    (
        "two systems",
        "system in the middle",
        "assistant first",
        "assistant alone",
        "two users",
        "two answers",
        "call",
        "two calls",
    ),
    "refuses the conversation",
)


@dataclass(frozen=True)
class Family:
    """A chat template, its tokenizer, and what is right to learn with it."""

    name: str
    template: str
    marks: tuple[str, ...]
    """Special tokens; the first is bos_token."""
    end: str
    """What ends a turn of the assistant."""
    last_end: str = ""
    """What ends the last one, where that is something else."""
    eos: str = "<|endoftext|>"
    bos: str = ""
    stops: tuple[str, ...] = ()
    """Tokens of generation_config.json's eos_token_id, besides."""
    kind: str = "bytes"
    """`bytes`, `sentencepiece` (a space before any text) or `metaspace` (before a first one)."""
    rstrip: tuple[str, ...] = ()
    """Marks that take white space behind them along."""
    trim: Callable[[str], str] = _as_it_is
    """An answer, as the template writes it."""
    thought: str | None = None
    """What is learned of a thought, `{}`; None: thoughts have no place, and in a content are a part of it."""
    trim_thought: Callable[[str], str] = _strip
    """A thought, as the template writes it."""
    no_thought: str = ""
    """What is learned before an answer without one."""
    calls: Callable[[Message, str], str] | None = None
    """Calls of tools behind an answer, and what ends the turn."""
    inline: bool = True
    """Whether it tells a thought in a content from the answer."""
    late: bool = False
    """Whether it writes thoughts only behind the last question."""
    unasked: bool = False
    """Whether it writes nothing before an answer that comes first: so its first character cannot be predicted."""
    hides_others: bool = False
    """Whether of what comes before an answer it writes the turns of the user alone."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Shape (`*`: any) -> what the refusal says."""

    def learned(self, chat: Chat) -> str:
        """What is right to learn of a conversation: each of the assistant's turns with what ends it.

        It ends with the last of them for the template, too: what nobody learns is not written.
        """
        last = max(
            i
            for i, message in enumerate(chat.messages)
            if message.role == "assistant" and message.trained is not False
        )
        asked = max(
            (i for i, message in enumerate(chat.messages[:last]) if message.role == "user"), default=0
        )
        turns = [
            self._said(message, early=self.late and i < asked)
            for i, message in enumerate(chat.messages)
            if message.role == "assistant" and message.trained is not False
        ]
        if self.last_end:
            turns[-1] = turns[-1].removesuffix(self.end) + self.last_end
        return "".join(turns)[self.begins_with_answer(chat) :]

    def begins_with_answer(self, chat: Chat) -> bool:
        """Whether nothing is written before the first answer, whose first token thus cannot be learned."""
        first = next(i for i, message in enumerate(chat.messages) if message.role == "assistant")
        before = chat.messages[:first]
        hidden = self.hides_others and all(message.role != "user" for message in before)
        return self.unasked and (not before or hidden)

    def _said(self, message: Message, *, early: bool) -> str:
        thought, answer = message.extra.get("reasoning_content", ""), message.content
        if self.thought is not None and self.inline and not thought and "</think>" in answer:
            thought, answer = answer.removeprefix("<think>").split("</think>")
        if self.thought is None or early:
            said = "" if early else self.no_thought
        else:
            said = self.thought.replace("{}", self.trim_thought(thought)) if thought else self.no_thought
        if self.calls and message.extra.get("tool_calls"):
            return said + self.calls(message, self.trim(answer))
        return said + self.trim(answer) + self.end


def _functions(message: Message) -> list[dict[str, Any]]:
    return [call["function"] for call in message.extra["tool_calls"]]


def _json_calls(between: str) -> Callable[[Message, str], str]:
    """Calls as Qwen's and Hermes' templates write them."""

    def write(message: Message, answer: str) -> str:
        calls = [
            f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
            for call in _functions(message)
        ]
        return answer + between * bool(answer) + "\n".join(calls) + "<|im_end|>"

    return write


def _tagged_calls(message: Message, answer: str) -> str:
    calls = []
    for call in _functions(message):
        lines = "".join(
            f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in call["arguments"].items()
        )
        calls.append(f"<tool_call>\n<function={call['name']}>\n{lines}</function>\n</tool_call>")
    return answer + "\n\n" * bool(answer) + "\n".join(calls) + "<|im_end|>"


def _glm_calls(message: Message, answer: str) -> str:
    calls = ""
    for call in _functions(message):
        lines = "".join(
            f"<arg_key>{name}</arg_key>\n<arg_value>{value}</arg_value>\n"
            for name, value in call["arguments"].items()
        )
        calls += f"\n<tool_call>{call['name']}\n{lines}</tool_call>"
    return answer + calls + "<|observation|>"


def _mistral_calls(space: str) -> Callable[[Message, str], str]:
    def write(message: Message, answer: str) -> str:
        calls = [
            json.dumps(call["function"] | {"id": call["id"]}, ensure_ascii=False)
            for call in message.extra["tool_calls"]
        ]
        return f"[TOOL_CALLS]{space}[{', '.join(calls)}]</s>"

    return write


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GLM = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>")
MISTRAL = ("<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PHI3 = ("<s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
THOUGHT = "<think>\n{}\n</think>\n\n"
QUIET = "<think>\n\n</think>\n\n"


def _bundled(name: str, marks: tuple[str, ...], end: str, **more: Any) -> Family:
    return Family(name, TEMPLATES[name], marks, end, **more)


DECLARED = {"tools": "has a place for tools only with"}
PLAIN = NO_TOOLS | NO_THOUGHTS

BUNDLED = [
    _bundled("chatml", CHATML, "<|im_end|>", refuses=PLAIN | {"tools": "the record has tools"}),
    _bundled(
        "qwen3",
        CHATML,
        "<|im_end|>",
        trim=_without_first_breaks,
        thought=THOUGHT,
        no_thought=QUIET,
        calls=_json_calls("\n"),
        refuses=DECLARED,
    ),
    _bundled(
        "qwen3-thinking",
        CHATML,
        "<|im_end|>",
        trim=_without_first_breaks,
        thought=THOUGHT[8:],
        no_thought=QUIET[8:],
        calls=_json_calls("\n"),
        refuses=DECLARED,
    ),
    _bundled(
        "qwen3-5",
        CHATML,
        "<|im_end|>",
        trim=_strip,
        thought=THOUGHT[8:],
        no_thought=QUIET[8:],
        calls=_tagged_calls,
        refuses=DECLARED,
    ),
    _bundled(
        "qwen3-5-small",
        CHATML,
        "<|im_end|>",
        trim=_strip,
        thought="",
        calls=_tagged_calls,
        refuses=DECLARED
        | dict.fromkeys(("reasoning", "two thoughts", "inline thought", "unlike turns"), "enable_thinking"),
    ),
    _bundled(
        "deepseek-r1",
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        trim=_without_first_breaks,
        thought=THOUGHT[8:],
        no_thought=QUIET[8:],
        refuses=NO_TOOLS,
    ),
    _bundled(
        "gemma",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        eos="<eos>",
        trim=_strip,
        kind="metaspace",
        refuses=PLAIN,
    ),
    _bundled("glm-4", GLM, "<|user|>", stops=("<|user|>", "<|observation|>"), refuses=PLAIN),
    _bundled(
        "glm-4-5",
        GLM,
        "<|user|>",
        stops=("<|user|>", "<|observation|>"),
        trim=_on_a_line,
        thought="\n<think>{}</think>",
        no_thought="\n<think></think>",
        calls=_glm_calls,
        refuses=DECLARED,
    ),
    _bundled(
        "gpt-oss",
        ("<|startoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
        "<|return|>",
        eos="<|return|>",
        stops=("<|call|>",),
        trim=_without_first_breaks,
        thought="<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
        no_thought="<|channel|>final<|message|>",
        refuses=NO_TOOLS,
    ),
    _bundled(
        "granite",
        ("<|start_of_role|>", "<|end_of_role|>"),
        "<|end_of_text|>",
        eos="<|end_of_text|>",
        refuses=PLAIN,
    ),
    _bundled("llama-3", LLAMA, "<|eot_id|>", trim=_strip, refuses=PLAIN),
    _bundled("llama-3-1", LLAMA, "<|eot_id|>", eos="<|eot_id|>", trim=_strip, refuses=PLAIN),
    _bundled("llama-3-2", LLAMA, "<|eot_id|>", eos="<|eot_id|>", trim=_strip, refuses=PLAIN),
    _bundled(
        "mistral",
        MISTRAL,
        "</s>",
        eos="</s>",
        kind="metaspace",
        trim=lambda text: " " + text.strip(),
        calls=_mistral_calls(" "),
        refuses=NO_THOUGHTS,
    ),
    _bundled("mistral-nemo", MISTRAL, "</s>", eos="</s>", calls=_mistral_calls(""), refuses=NO_THOUGHTS),
    _bundled(
        "mistral-large",
        MISTRAL,
        "</s>",
        eos="</s>",
        kind="metaspace",
        trim=lambda text: " " + text,
        refuses=PLAIN,
    ),
    _bundled("mistral-small", MISTRAL, "</s>", eos="</s>", refuses=PLAIN),
    _bundled("olmo-2", ("<|endoftext|>",), "<|endoftext|>", refuses=PLAIN),
    _bundled(
        "olmo-3",
        CHATML,
        "<|im_end|>",
        eos="<|im_end|>",
        thought="<think>{}</think>",
        trim_thought=_as_it_is,
        refuses=NO_TOOLS,
    ),
    _bundled(
        "olmo-3-think",
        CHATML,
        "<|im_end|>",
        eos="<|im_end|>",
        thought="{}</think>",
        no_thought="</think>",
        trim_thought=_as_it_is,
        refuses=NO_TOOLS,
    ),
    _bundled(
        "phi-3", PHI3, "<|end|>", kind="sentencepiece", rstrip=("<|end|>", "<|assistant|>"), refuses=PLAIN
    ),
    _bundled("phi-4-mini", PHI3, "<|end|>", refuses=PLAIN),
    _bundled(
        "phi-4",
        ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        "<|im_end|>",
        eos="<|im_end|>",
        refuses=PLAIN,
    ),
    _bundled("plain", ("<s>",), "</s>", eos="</s>", kind="sentencepiece", refuses=PLAIN),
    _bundled(
        "smollm-3",
        CHATML,
        "<|im_end|>",
        eos="<|im_end|>",
        trim=_without_first_breaks,
        thought="<think>\n{}\n</think>\n",
        calls=_json_calls("\n"),
        refuses=DECLARED,
    ),
]
"""One for each of the trainer's own templates."""

ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
EACH = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
RAISES = (
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}{% endfor %}"
)
LATE_THOUGHTS = (
    "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > last.user %}<think>\n{{ m.reasoning_content }}"
    "\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)
BEFORE_USER = "writes what stands before messages"
LATE = {"two thoughts": "leaves the reasoning_content"}
LATE_AND_ASKED = dict.fromkeys(
    (
        "two thoughts",
        "several turns",
        "system in the middle",
        "assistant first",
        "leading white space",
        "leading breaks",
        "trailing white space",
        "unlike turns",
    ),
    BEFORE_USER,
)


def _marked(says: str) -> str:
    """A template that writes an answer so, with generation markers."""
    return EACH.replace(
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
        "{% if m.role == 'assistant' %}" + says + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}",
    ) + ASKED  # fmt: skip


def _model(
    name: str, template: str, marks: tuple[str, ...] = CHATML, end: str = "<|im_end|>", **more: Any
) -> Family:
    return Family(name, template, marks, end, **({"refuses": PLAIN} | more))


MODELS = [
    _model(
        "chatml with a default system",
        "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n"
        "{% endif %}" + EACH + ASKED,
        refuses=PLAIN | ALONE,
    ),
    _model("chatml behind a bos", "{{ bos_token }}" + EACH + ASKED),
    _model("chatml that trims", EACH.replace("m.content", "m.content | trim") + ASKED, trim=_strip),
    _model("chatml with the date", "{{ strftime_now('%d %b %Y') }}\n" + EACH + ASKED),
    _model(
        "zephyr",
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<s>",),
        "</s>",
        eos="</s>",
        kind="sentencepiece",
    ),
    _model(
        "llama 2",
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
        "{% else %}<<SYS>>\n{{ m.content }}\n<</SYS>>\n\n{% endif %}{% endfor %}",
        ("<s>",),
        " </s>",
        eos="</s>",
        kind="sentencepiece",
        trim=lambda text: " " + text.strip(),
        unasked=True,
    ),
    _model(
        "vicuna",
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
        "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}"
        "{% else %}{{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}",
        ("<s>",),
        "</s>",
        eos="</s>",
        kind="metaspace",
    ),
    _model(
        "alpaca",
        "{% for m in messages %}{% if m.role == 'assistant' %}### Response:\n{{ m.content }}{{ eos_token }}"
        "{% else %}### Instruction:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}",
        ("<s>",),
        "</s>",
        eos="</s>",
        kind="sentencepiece",
    ),
    _model(
        "deepseek v2",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\n"
        "{% elif m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}\n\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
        ("<|begin|>",),
        "<|eos|>",
        eos="<|eos|>",
        trim=lambda text: " " + text,
    ),
    _model(
        "command r",
        "{{ bos_token }}{% for m in messages %}<|START|>{% if m.role == 'assistant' %}<|BOT|>"
        "{{ m.content | trim }}{% else %}<|{{ m.role | upper }}|>{{ m.content }}{% endif %}<|STOP|>{% endfor %}"
        "{% if add_generation_prompt %}<|START|><|BOT|>{% endif %}",
        ("<BOS>", "<|START|>", "<|BOT|>", "<|USER|>", "<|SYSTEM|>", "<|STOP|>"),
        "<|STOP|>",
        eos="<|STOP|>",
        trim=_strip,
    ),
    _model(
        "answers in a frame",
        _marked(
            "<|im_start|>assistant\n{% generation %}<|say|>{{ m.content }}<|/say|><|im_end|>"
            "{% endgeneration %}\n"
        ),
        (*CHATML, "<|say|>", "<|/say|>"),
        "<|/say|><|im_end|>",
        eos="<|im_end|>",
        no_thought="<|say|>",
    ),
    _model(
        "answers in a frame, not marked",
        EACH.replace(
            "{{ m.content }}",
            "{{ '<|say|>' + m.content + '<|/say|>' if m.role == 'assistant' else m.content }}",
        )
        + ASKED,
        (*CHATML, "<|say|>", "<|/say|>"),
        "<|/say|><|im_end|>",
        eos="<|im_end|>",
        no_thought="<|say|>",
    ),
    _model("turns must alternate", RAISES + EACH + ASKED, refuses=PLAIN | NOT_ALTERNATING),
    _model(
        "moves the system's words",
        "{% set s = namespace(text='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set s.text = s.text + m.content + '\n\n' %}{% endif %}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'user' %}[INST]{{ s.text if loop.last }}{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        MISTRAL,
        "</s>",
        eos="</s>",
        unasked=True,
        hides_others=True,
        refuses=PLAIN
        | dict.fromkeys(
            ("system", "two systems", "system in the middle", "blank system", "unlike turns"),
            f"{BEFORE_USER}|leaves this turn",
        ),
    ),
    _model(
        "asks by itself",
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>"
        "{% else %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>"
        "{% if m.role == 'user' %}<|im_start|>assistant<|im_sep|>{% endif %}{% endif %}{% endfor %}",
        (*CHATML, "<|im_sep|>"),
        eos="<|im_end|>",
        unasked=True,
    ),
    _model(
        "never ends",
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        GLM,
        refuses={"*": "does not end what the assistant says with a token|has tools"},
    ),
    _model(
        "ends the last turn otherwise",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ eos_token if loop.last and m.role == 'assistant' else '<|im_end|>' }}\n{% endfor %}" + ASKED,
        stops=("<|im_end|>",),
        end="<|im_end|>",
        last_end="<|endoftext|>",
        refuses=PLAIN | {"two answers": BEFORE_USER},
    ),
    _model(
        "drops thoughts",
        LATE_THOUGHTS + ASKED,
        thought=THOUGHT,
        no_thought=QUIET,
        inline=False,
        late=True,
        refuses=NO_TOOLS | LATE,
    ),
    _model(
        "always thinks, and drops it",
        LATE_THOUGHTS + ASKED.replace("assistant\n", "assistant\n<think>\n"),
        thought=THOUGHT[8:],
        no_thought=QUIET[8:],
        inline=False,
        late=True,
        refuses=NO_TOOLS | LATE_AND_ASKED,
    ),
    _model(
        "writes thoughts",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n"
        "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + ASKED,
        thought=THOUGHT,
        inline=False,
        refuses=NO_TOOLS,
    ),
    _model(
        "splits at thoughts",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}" + ASKED,
        refuses=PLAIN | {"inline thought": "changes what the assistant says"},
    ),
    _model(
        "hermes tools",
        "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls %}"
        "{{ '\n' if m.content or not loop.first }}<tool_call>\n{{ call.function | tojson }}\n</tool_call>"
        "{% endfor %}<|im_end|>\n{% endfor %}" + ASKED,
        calls=_json_calls("\n"),
        refuses=NO_THOUGHTS,
    ),
    _model(
        "marked",
        _marked("<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"),
    ),
    _model(
        "marked without the end",
        _marked("<|im_start|>assistant\n{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n"),
    ),
    _model(
        "marked with the header",
        _marked("{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endgeneration %}"),
    ),
    _model(
        "marked in two parts",
        _marked(
            "<|im_start|>assistant\n{% generation %}{{ m.content }}{% endgeneration %}"
            "{% generation %}<|im_end|>{% endgeneration %}\n"
        ),
    ),
    _model(
        "an end that takes breaks along",
        EACH + ASKED,
        eos="<|im_end|>",
        rstrip=("<|im_end|>", "<|im_start|>"),
    ),
]
"""Models of what is troublesome about other templates."""
FAMILIES = [*BUNDLED, *MODELS]
