"""Where in a conversation's text the assistant speaks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_trainer.data.chat_template import ChatTemplate, TemplateSettings
from qlora_trainer.data.masks import TrainedTurns
from qlora_trainer.data.records import Chat, Message, Record
from qlora_trainer.data.tokenization import Tokenization, TokenizationOptions, render
from qlora_trainer.errors import DataError

pytestmark = pytest.mark.process

Make = Callable[..., Any]
MARKS = ("<|user|>", "<|assistant|>", "<|end|>")
HEADERS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
ASKED = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
PLAIN = HEADERS + "<|end|>\n{% endfor %}" + ASKED
NO_END = HEADERS + "{% endfor %}"
THOUGHTFUL = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}" + ASKED
)
LATE_THOUGHT = THOUGHTFUL.replace("{% if m.reasoning", "{% if loop.last and m.reasoning")
TOOLS = (
    "{% if tools %}<|user|>\n{{ tools | tojson }}<|end|>\n{% endif %}{% for m in messages %}<|{{ m.role }}|>\n"
    "{{ m.content }}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}<|end|>\n{% endfor %}"
    + ASKED
)
EACH = (
    "{% for m in messages %}{% if m.role == 'assistant' %}SAYS{% else %}"
    "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)


def _marked(says: str) -> str:
    """A template that writes an answer so."""
    return EACH.replace("SAYS", says) + ASKED


MARKED = {
    "whole": "<|assistant|>\n{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n",
    "end outside": "<|assistant|>\n{% generation %}{{ m.content }}{% endgeneration %}<|end|>\n",
    "header inside": "{% generation %}<|assistant|>\n{{ m.content }}<|end|>\n{% endgeneration %}",
    "two parts": (
        "<|assistant|>\n{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|end|>{% endgeneration %}\n"
    ),
}


def _chat(*turns: str | Message, tools: tuple[Mapping[str, Any], ...] = ()) -> Chat:
    """A conversation of `role: content` turns."""
    messages = (turn if isinstance(turn, Message) else Message(*turn.split(": ", 1)) for turn in turns)
    return Chat(tuple(messages), tools)


def _learned(
    chat: Chat, tokenizer: Any, train: TrainedTurns = "all", stop_ids: tuple[int, ...] = ()
) -> list[str]:
    """What is supervised, decoded."""
    options = TokenizationOptions(TemplateSettings(stop_ids=stop_ids), train)
    [sample] = Tokenization(tokenizer, 10_000, options).samples([Record("f.jsonl: line 3", chat, b"")])
    return [text for text, supervised in render(sample.ids, sample.mask, tokenizer) if supervised]


@pytest.fixture(scope="session")
def marked_tokenizer(byte_tokenizer: Make) -> Make:
    """make(template, rstrip=False): tokens are bytes and MARKS, turns end with <|end|>."""

    def make(template: str, **more: Any) -> Any:
        return byte_tokenizer(template, marks=MARKS, eos="<|end|>", **more)

    return make


TALK = _chat("user: ping", "assistant: pong", "user: bye", "assistant: see you")
LEARNED = ["pong<|end|>", "see you<|end|>"]


@pytest.mark.parametrize("template", [PLAIN, *map(_marked, MARKED.values())], ids=["prefixes", *MARKED])
@pytest.mark.parametrize("rstrip", [False, True])
def test_the_answer_and_its_end_are_learned(marked_tokenizer: Make, template: str, rstrip: bool) -> None:
    """Exactly the answers and the tokens that end them: also of an end token that takes the line break behind it along,
    and however much generation markers are put around."""
    assert _learned(TALK, marked_tokenizer(template, rstrip=rstrip)) == LEARNED


@pytest.mark.parametrize(
    ("template", "chat", "error"),
    [
        pytest.param(NO_END, TALK, "does not end what the assistant says with a token", id="no end"),
        pytest.param(
            NO_END + "<|assistant|>",
            _chat("user: ping", "assistant: pong"),
            "does not end what the assistant says with a token",
            id="a header behind every text",
        ),
        pytest.param(
            _marked("<|assistant|>\n{% generation %}{{ m.content }}{% endgeneration %}<|user|>\n"),
            TALK,
            "does not end what the assistant says with a token",
            id="markers before a header",
        ),
        pytest.param(
            _marked("<|assistant|>\n{% generation %}{{ m.content[1:] }}<|end|>{% endgeneration %}"),
            TALK,
            "changes what the assistant says",
            id="shortened between markers",
        ),
        pytest.param(
            PLAIN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"),
            _chat("user: ping", "assistant: <think>ball</think>pong"),
            "changes what the assistant says",
            id="a thought left out",
        ),
        pytest.param(
            _marked("<|assistant|>\n{{ m.content }}<|end|>{% generation %}{% endgeneration %}"),
            TALK,
            "markers are around 0 parts of the text, and the assistant has 2 turns",
            id="nothing marked",
        ),
        pytest.param(
            LATE_THOUGHT,
            _chat(
                "user: ping",
                Message("assistant", "pong", {"reasoning_content": "ball"}),
                "user: bye",
                "assistant: see you",
            ),
            r"messages\[1\]: the chat template leaves the reasoning_content of this turn out",
            id="reasoning left out",
        ),
        pytest.param(
            PLAIN,
            _chat("user: ping", "assistant: pong", tools=({"type": "function"},)),
            "the record has tools, which the chat template has no place for",
            id="no place for tools",
        ),
        pytest.param(
            PLAIN,
            _chat("user: ping", Message("assistant", "", {"tool_calls": [{"function": {"name": "serve"}}]})),
            "leaves a call of a tool out",
            id="no place for calls",
        ),
        pytest.param(
            PLAIN,
            _chat("user: ping", Message("assistant", "pong", trained=False)),
            "every turn of the assistant that would be trained on is excluded",
            id="nothing to learn",
        ),
        pytest.param(
            PLAIN,
            _chat("user: ping", "assistant: a<|user|>b"),
            r"messages\[1\]: what the assistant says holds a special token",
            id="a header in an answer",
        ),
    ],
)
def test_what_cannot_be_told_apart_is_refused(
    marked_tokenizer: Make, template: str, chat: Chat, error: str
) -> None:
    """A mask that would be wrong is refused, with record and reason, and without the record's words."""
    with pytest.raises(DataError, match=f"^f.jsonl: line 3: .*{error}") as caught:
        _learned(chat, marked_tokenizer(template))

    assert "pong" not in str(caught.value)


def test_a_base_models_template_may_end_turns_with_another_token(byte_tokenizer: Make) -> None:
    """The token behind every answer ends a turn, also where the tokenizer's eos_token is another."""
    tokenizer = byte_tokenizer(PLAIN, marks=(*MARKS, "<|endoftext|>"), eos="<|endoftext|>")

    assert _learned(TALK, tokenizer) == LEARNED


def test_a_token_at_which_generation_stops_ends_a_turn(byte_tokenizer: Make) -> None:
    """A header ends the turn before it where generation_config.json has generation stop at it."""
    last = "{% if loop.last and m.role == 'assistant' %}<|user|>{% endif %}{% endfor %}"
    template = NO_END.replace("{% endfor %}", last) + ASKED
    tokenizer = byte_tokenizer(template, marks=(*MARKS, "<|endoftext|>"), eos="<|endoftext|>")
    stop_ids = (tokenizer.convert_tokens_to_ids("<|user|>"),)

    assert _learned(TALK, tokenizer, stop_ids=stop_ids) == ["pong<|user|>", "see you<|user|>"]


@pytest.mark.parametrize("template", [PLAIN, _marked(MARKED["whole"])], ids=["prefixes", "markers"])
def test_excluded_turns_are_not_learned(marked_tokenizer: Make, template: str) -> None:
    """A turn that the record excludes is context: neither its words nor its end are learned."""
    chat = _chat("user: ping", Message("assistant", "BAD", trained=False), "user: bye", "assistant: see you")

    assert _learned(chat, marked_tokenizer(template)) == ["see you<|end|>"]


@pytest.mark.parametrize("template", [PLAIN, _marked(MARKED["whole"])], ids=["prefixes", "markers"])
@pytest.mark.parametrize(
    ("turns", "learned"),
    [
        (("user: a", "assistant: b", "user: c", "assistant: d"), ["d<|end|>"]),
        (("user: a", "assistant: b", "user: c", "assistant: d", "user: e"), ["d<|end|>"]),
        (("user: a", "assistant: b", "assistant: c"), ["b<|end|>", "c<|end|>"]),
        (("assistant: a",), ["a<|end|>"]),
    ],
)
def test_the_last_turn_alone(
    marked_tokenizer: Make, template: str, turns: Sequence[str], learned: list[str]
) -> None:
    """With `lastTurn` only what the assistant says after the last question that it answers is learned."""
    assert _learned(_chat(*turns), marked_tokenizer(template), "lastTurn") == learned


def test_reasoning_is_learned_where_the_template_writes_it(marked_tokenizer: Make) -> None:
    """The reasoning of a turn is part of what the assistant says; with lastTurn earlier ones may be left out."""
    thought = Message("assistant", "pong", {"reasoning_content": "two and two"})
    said = "<think>\ntwo and two\n</think>\npong<|end|>"

    assert _learned(_chat("user: ping", thought), marked_tokenizer(THOUGHTFUL)) == [said]
    assert _learned(
        _chat("user: ping", thought, "user: ping", thought), marked_tokenizer(LATE_THOUGHT), "lastTurn"
    ) == [said]


def test_tools_and_their_calls_reach_the_template(marked_tokenizer: Make) -> None:
    """What the assistant may call stands before the conversation, and its calls are learned."""
    call = {"type": "function", "function": {"name": "serve", "arguments": {"to": "left"}}}
    chat = _chat(
        "user: ping",
        Message("assistant", "", {"tool_calls": [call]}),
        Message("user", "served", {"name": "serve"}),
        "assistant: done",
        tools=({"type": "function", "function": {"name": "serve"}},),
    )

    assert _learned(chat, marked_tokenizer(TOOLS)) == [
        '{"name": "serve", "arguments": {"to": "left"}}<|end|>',
        "done<|end|>",
    ]


ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
WORDS = st.lists(
    st.sampled_from(
        [
            " ",
            "\n",
            "\t",
            "    ",
            "\n\n",
            "a",
            "B",
            "é",
            "日本",
            "🙂",
            "<think>",
            "</think>",
            "<|end|>",
            "<|user|>",
            ".",
        ]
    ),
    max_size=6,
).map("".join)
MESSAGES = st.builds(
    Message,
    ROLES,
    WORDS,
    st.just({}) | WORDS.map(lambda words: {"reasoning_content": words}),
    st.sampled_from([None, False]),
)
TEMPLATES = [
    PLAIN,
    NO_END,
    THOUGHTFUL,
    LATE_THOUGHT,
    TOOLS,
    PLAIN.replace("{{ m.content }}", "{{ m.content | trim }}"),
    *map(_marked, MARKED.values()),
]


@given(
    messages=st.lists(MESSAGES, min_size=1, max_size=6).filter(
        lambda messages: any(message.role == "assistant" for message in messages)
    ),
    template=st.sampled_from(TEMPLATES),
    train=st.sampled_from(["all", "lastTurn"]),
    rstrip=st.booleans(),
)
@example(
    messages=[Message("assistant", "", {"reasoning_content": "<|user|> a"})],
    template=THOUGHTFUL,
    train="all",
    rstrip=True,
)
@settings(deadline=None, max_examples=200)
def test_any_conversation_is_learned_right_or_refused(
    marked_tokenizer: Make,
    messages: list[Message],
    template: str,
    train: TrainedTurns,
    rstrip: bool,
) -> None:
    """Whatever the conversation: exactly its answers with their ends are learned, or a DataError names the record."""
    tokenizer = marked_tokenizer(template, merges=(("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ċ", "Ġ")), rstrip=rstrip)
    refused: DataError | None = None
    try:
        learned = _learned(Chat(tuple(messages)), tokenizer, train)
    except DataError as error:
        refused = error
    if refused is not None:
        assert str(refused).startswith("f.jsonl: line 3: ")
        return
    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    asked = max((i for i, message in enumerate(messages[:last]) if message.role == "user"), default=0)
    expected = [
        message
        for i, message in enumerate(messages)
        if message.role == "assistant" and message.trained is not False and (train == "all" or i >= asked)
    ]

    assert [text.count("<|end|>") for text in learned] == [1] * len(expected)
    for text, message in zip(learned, expected, strict=True):
        said = text.removesuffix("<|end|>")
        assert said != text
        assert said.rstrip().endswith(message.content.strip().split("</think>")[-1].strip())
        # Without white space: a mark in a thought may take that behind it along, and is decoded without it.
        assert "".join(message.extra.get("reasoning_content", "").split()) in "".join(said.split())
        if template == PLAIN:
            assert said == message.content


STRICT = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no results') }}{% endif %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}{% endfor %}"
    "{% if tools and messages | length > 9 %}{{ raise_exception('no tools') }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "chat", "part", "why"),
    [
        (STRICT, _chat("user: a", "system: b", "user: c", "assistant: d"), r"messages\[1\]", "system first"),
        (STRICT, _chat("tool: a", "assistant: b"), r"messages\[0\]", "no results"),
        (STRICT.replace("> 9", "> 0"), _chat("user: a", "assistant: b", tools=({"name": "f"},)), "tools", "no tools"),
        (STRICT, _chat("user: a", "tool: c", "assistant: e", tools=({"name": "f"},)), r"messages\[1\]", "no results"),
        ("{{ [1].index(0) }}", _chat("user: a", "assistant: b"), r"messages\[0\]", ""),
    ],
    ids=["a turn", "the first", "tools", "a turn beside tools", "an error of Python"],
)  # fmt: skip
def test_what_a_template_refuses_is_named(
    marked_tokenizer: Make, template: str, chat: Chat, part: str, why: str
) -> None:
    """The first turn with which it refuses the conversation, or the tools."""
    with pytest.raises(
        DataError, match=rf"line 3: {part}: the chat template refuses the conversation.*{why}"
    ):
        _learned(chat, marked_tokenizer(template + "{% if tools %}{% endif %}" + PLAIN))


def test_a_long_conversation_is_not_written_for_each_of_its_turns(
    marked_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn that a template refuses is found by halves."""
    turns = ["user: a", "assistant: b"] * 500
    turns[700] = "tool: a"
    written: list[int] = []
    render = ChatTemplate.render
    monkeypatch.setattr(
        ChatTemplate,
        "render",
        lambda self, *args, **fields: (written.append(1), render(self, *args, **fields))[1],
    )
    with pytest.raises(
        DataError, match=r"messages\[700\]: the chat template refuses the conversation: no results"
    ):
        _learned(_chat(*turns), marked_tokenizer(STRICT + PLAIN))

    assert len(written) < 20


def test_what_is_wrong_with_an_earlier_turn_alone_has_another_remedy(marked_tokenizer: Make) -> None:
    """The last one may be trained on by itself."""
    template = PLAIN.replace("<|end|>", "{{ '<|end|>' if loop.last or m.role == 'user' }}")
    chat = _chat("user: a", "assistant: b", "user: c", "assistant: d")

    with pytest.raises(DataError, match=r"messages\[1\]: .* set dataset.train to lastTurn, or set"):
        _learned(chat, marked_tokenizer(template))
    assert _learned(chat, marked_tokenizer(template), train="lastTurn") == ["d<|end|>"]
