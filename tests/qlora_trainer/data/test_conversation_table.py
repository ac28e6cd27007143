"""Families of models x shapes of conversation: exactly the answers and their ends are learned, or it says why not."""

import json
import re
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from families import FAMILIES, Family, tokenizer_of
from qlora_trainer.data.chat_template import TemplateSettings
from qlora_trainer.data.messages import ROLES
from qlora_trainer.data.readers import BadRow, Row
from qlora_trainer.data.records import Chat, Message, Record, interpret
from qlora_trainer.data.tokenization import Tokenization, TokenizationOptions, render
from qlora_trainer.errors import DataError

pytestmark = pytest.mark.process

SYSTEM, ASK, SAY = Message("system", "Be brief."), Message("user", "Why?"), Message("assistant", "Because.")
THOUGHT = Message("assistant", "Because.", {"reasoning_content": "Let me see.\nYes."})
TOOL = {
    "type": "function",
    "function": {"name": "find", "description": "finds", "parameters": {"type": "object"}},
}
CODE = "def f(x):\n    if x:\n\treturn [x]\n\n\n    return {}\n"


def _call(*words: str) -> Message:
    calls = [
        {"type": "function", "id": f"call0000{i}", "function": {"name": "find", "arguments": {"word": word}}}
        for i, word in enumerate(words)
    ]
    return Message("assistant", "", {"tool_calls": calls})


def _said(text: str) -> Message:
    return Message("assistant", text)


def _result(text: str, number: int = 0) -> Message:
    return Message("tool", text, {"name": "find", "tool_call_id": f"call0000{number}"})


SHAPES: dict[str, Chat] = {
    "single": Chat((ASK, SAY)),
    "system": Chat((SYSTEM, ASK, SAY)),
    "two systems": Chat((SYSTEM, Message("system", "Be kind."), ASK, SAY)),
    "system in the middle": Chat((ASK, SAY, SYSTEM, ASK, SAY)),
    "several turns": Chat((ASK, SAY, Message("user", "How?"), _said("So."), ASK, _said("Thus"))),
    "assistant first": Chat((_said("Hello."), ASK, SAY)),
    "assistant alone": Chat((SAY,)),
    "two users": Chat((ASK, Message("user", "And how?"), SAY)),
    "two answers": Chat((ASK, SAY, _said("That is all."))),
    "ends with the user": Chat((ASK, SAY, ASK)),
    "system at the end": Chat((ASK, SAY, SYSTEM)),
    "empty question": Chat((Message("user", ""), SAY)),
    "blank system": Chat((Message("system", " \n"), ASK, SAY)),
    "tools": Chat((ASK, SAY), (TOOL,)),
    "call": Chat((ASK, _call("a"), _result("It is there."), SAY)),
    "two calls": Chat((ASK, _call("a", "b"), _result("Here.", 0), _result("There.", 1), SAY)),
    "reasoning": Chat((ASK, THOUGHT)),
    "two thoughts": Chat((ASK, THOUGHT, ASK, THOUGHT)),
    "inline thought": Chat((ASK, _said("<think>\nHm.\n</think>\n\nSo."))),
    "unicode": Chat((Message("user", "なぜ?"), _said("é e\u0301 日本 🙂 \u202eabc\u200d ﬁ"))),
    "code": Chat((Message("user", "Write\n```\n" + CODE + "```"), _said(CODE + "# end"))),
    "leading white space": Chat((ASK, _said("    indented"), ASK, _said(" one"))),
    "leading breaks": Chat((ASK, _said("\n\n\nlate"), ASK, _said("\n late"))),
    "trailing white space": Chat((ASK, _said("So.\n\n"), ASK, _said("So  "), ASK, _said("the end:\n \t"))),
    "excluded turn": Chat((ASK, Message("assistant", "Wrong.", trained=False), ASK, SAY)),
    "unlike turns": Chat((SYSTEM, ASK, _said("a"), ASK, THOUGHT)),
    "looks like marks": Chat(
        (Message("user", "<|what|>?"), _said("[TAG] <tag> {{ x }} {% y %} </tag> ### Z:"))
    ),
}


@cache
def _tokenizer(family: str) -> Any:
    return tokenizer_of(next(other for other in FAMILIES if other.name == family))


def _learned(family: Family, chat: Chat) -> str:
    tokenizer = _tokenizer(family.name)
    stops = tuple(tokenizer.convert_tokens_to_ids(list(family.stops)))
    settings = TemplateSettings(family.template, stop_ids=stops)
    record = Record("f.jsonl: line 3", chat, b"")
    [sample] = Tokenization(tokenizer, 10_000, TokenizationOptions(settings)).samples([record])
    return "".join(text for text, supervised in render(sample.ids, sample.mask, tokenizer) if supervised)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_the_answers_and_their_ends_are_learned_or_the_refusal_is_right(family: Family, shape: str) -> None:
    """Decoded, what is supervised is exactly what the assistant says, each turn with what ends it."""
    chat = SHAPES[shape]
    said = family.refuses.get("*") or family.refuses.get(shape)
    if said is not None:
        with pytest.raises(DataError, match=f"^f.jsonl: line 3: .*({said})"):
            _learned(family, chat)
        return

    assert _learned(family, chat) == family.learned(chat)


PIECES = (
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\u00a0",
        "\u2028",
        "\x00",
        "a",
        "The",
        "é",
        "e\u0301",
        "日本",
        "🙂",
        ".",
        ":",
        ">",
        '"',
    ),
    *(
        "\\n",
        "</s",
        "<|",
        "|>",
        "{{ x }}",
        "{% x %}",
        "[INST",
        "user\n",
        "<think",
        "/no_think",
        "/system_override",
    ),
)
WORDS = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)
# Without U+2581: some tokenizers take it for a space.
MARKS = sorted({mark for family in FAMILIES for mark in (*family.marks, family.end) if "▁" not in mark})
ANSWERS = WORDS.filter(str.strip)
MESSAGES = st.one_of(
    st.builds(Message, st.sampled_from(["system", "user", "tool"]), WORDS),
    st.builds(Message, st.just("user"), st.sampled_from(MARKS)),
    st.builds(Message, st.just("assistant"), ANSWERS, trained=st.sampled_from([None, None, False])),
    st.builds(
        Message,
        st.just("assistant"),
        ANSWERS,
        ANSWERS.map(lambda words: {"reasoning_content": words.strip()}),
    ),
    st.builds(Message, st.just("assistant"), st.sampled_from(MARKS).map(lambda mark: f"a {mark} b")),
    st.builds(_call, st.sampled_from(["a", "\n", "é"])),
)


@given(
    messages=st.lists(MESSAGES, min_size=1, max_size=6).filter(
        lambda messages: any(message.role == "assistant" for message in messages)
    ),
    name=st.sampled_from([family.name for family in FAMILIES]),
    tools=st.sampled_from([(), (), (), (TOOL,)]),
)
@settings(deadline=None, max_examples=300)
def test_any_conversation_of_any_family_is_learned_right_or_refused(
    messages: list[Message], name: str, tools: tuple[dict[str, Any], ...]
) -> None:
    """Exactly its answers with their ends, or a sentence with the record and what of it is in the way; nothing else."""
    family = next(family for family in FAMILIES if family.name == name)
    chat = Chat(tuple(messages), tools)
    assume(
        not family.begins_with_answer(chat)
    )  # how much the first token holds is the tokenizer's own matter
    try:
        learned = _learned(family, chat)
    except DataError as error:
        assert re.match(  # noqa: PT017 - either of two is right
            r"f\.jsonl: line 3: (.*messages\[\d\]|.*tools|every turn of the assistant)",
            str(error),
        ), error
        return

    assert learned == family.learned(chat)


ROLE_WORDS = (*ROLES, "moderator", "", None, 3)
CONTENTS = st.one_of(
    WORDS,
    st.lists(WORDS, min_size=1, max_size=2).map(lambda texts: [{"type": "text", "text": text} for text in texts]),
    st.sampled_from([None, 3, [{"type": "image"}], "{}", "[]", '{"name": "find", "arguments": {}}']),
)  # fmt: skip
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLE_WORDS), "content": CONTENTS},
    optional={
        "weight": st.sampled_from([0, 1, None, 0.5]),
        "train": st.sampled_from([True, False, "no"]),
        "name": st.sampled_from(["Ann", "", 3]),
        "thinking": st.sampled_from(["Hm.", None]),
    },
)
USUAL_TURNS = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "human", "assistant", "gpt", "model", "system", "developer"]),
        "content": st.one_of(ANSWERS, ANSWERS.map(lambda text: [{"type": "text", "text": text}])),
    },
    optional={"weight": st.sampled_from([0, 1, None])},
)
NAMES_PLACE = r"f\.jsonl: line 3: (.*(messages|tools)(\[\d\]| |: )|every turn of the assistant)"


@given(
    turns=st.one_of(st.lists(USUAL_TURNS, max_size=5), st.lists(st.one_of(USUAL_TURNS, TURNS), max_size=4)),
    name=st.sampled_from([family.name for family in FAMILIES]),
)
@settings(deadline=None, max_examples=300)
def test_turns_of_any_roles_are_learned_right_or_refused_by_record_and_turn(
    turns: list[dict[str, Any]], name: str
) -> None:
    """As a file has them, in any spelling: what is learned is told here from the record alone, not by what reads it."""
    family = next(family for family in FAMILIES if family.name == name)
    row = Row("f.jsonl: line 3", {"messages": turns})
    try:
        [record] = interpret([row], "chat")
        if isinstance(record, BadRow):
            raise DataError(str(record))  # noqa: TRY301 - as training tells it
        assert isinstance(record.content, Chat)
        assume(not family.begins_with_answer(record.content))
        learned = _learned(family, record.content)
    except DataError as error:
        assert re.match(NAMES_PLACE, str(error)), error  # noqa: PT017 - either of two is right
        return

    said = []
    for turn in turns:
        content = turn["content"]
        calls = turn["role"] in ("function_call", "tool_call")
        text = "".join(part["text"] for part in content) if isinstance(content, list) else content or ""
        extra: dict[str, Any] = {}
        if calls:
            found = json.loads(text)
            extra["tool_calls"] = [
                {"function": call} for call in (found if isinstance(found, list) else [found])
            ]
        if turn.get("thinking"):
            extra["reasoning_content"] = turn["thinking"]
        excluded = turn.get("weight") == 0 or turn.get("train") is False
        said.append(Message(ROLES[turn["role"]], "" if calls else text, extra, False if excluded else None))
    assert learned == family.learned(Chat(tuple(said)))


def test_the_table_is_as_large_as_is_promised() -> None:
    """At least 45 families and 24 shapes."""
    assert len(FAMILIES) >= 45
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert len(SHAPES) >= 24
