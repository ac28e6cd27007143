"""`qlora chat`: what is asked, and what is shown."""

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qlora_contract.chat import ChatReady, ChatRequest
from qlora_operator.cli.chat import Conversation, Settings, describe
from qlora_operator.cli.chat_exchange import Exchange

READY = ChatReady(model="/m", adapter="/a", step=3, scheme="nf4", compute_dtype="bf16")


class Scripted:
    """A model that answers with the number of turns, and keeps what it was asked."""

    def __init__(self, *, cut: bool = False) -> None:
        self.requests: list[ChatRequest] = []
        self._cut = cut
        self._waiting: list[dict[str, Any]] = []

    def send(self, line: str) -> None:
        """Take a request."""
        request = ChatRequest.model_validate_json(line)
        self.requests.append(request)
        question = request.questions[0]
        asked = question.text if question.turns is None else question.turns[-1].content
        if asked == "bad":
            self._waiting.append({"error": {"code": 11, "cause": "no\x1b[31m"}})
            return
        text = f"answer {len(question.turns or [1])}\x1b"
        self._waiting.append({"piece": {"question": 0, "text": text}})
        answer = {"prompt": asked, "text": text, "tokens": 2, "cut": self._cut}
        self._waiting.append({"answers": [answer]})

    def lines(self) -> Iterator[str]:
        """The events."""
        while self._waiting:
            yield json.dumps(self._waiting.pop(0))

    def exchange(self) -> Exchange:
        """With this model."""
        model = self

        class Lines:
            def __iter__(self) -> "Lines":
                return self

            def __next__(self) -> str:
                return next(model.lines())

        return Exchange(self.send, Lines(), lambda: "gone")


Hold = Callable[..., tuple[Scripted, str, str]]


@pytest.fixture
def hold() -> Hold:
    """hold(*lines, ...) -> the model, what was answered, and what was said besides."""

    def held(
        *lines: str, ready: ChatReady = READY, cut: bool = False, **settings: Any
    ) -> tuple[Scripted, str, str]:
        model, out, info = Scripted(cut=cut), io.StringIO(), io.StringIO()
        conversation = Conversation(model.exchange(), ready, Settings(**settings), out, info)
        conversation.hold(iter(lines))
        return model, out.getvalue(), info.getvalue()

    return held


def turns(request: ChatRequest) -> list[tuple[str, str]]:
    """Role and content of what was asked."""
    return [(turn.role, turn.content) for turn in request.questions[0].turns or []]


def test_the_conversation_grows_with_each_turn(hold: Hold) -> None:
    """Each question brings all that was said before, after the system message; blank lines are none."""
    model, out, _ = hold("One?\n", "  \n", "Two?\n", system="Be brief.", temperature=0.5, seed=7)

    assert turns(model.requests[1]) == [
        ("system", "Be brief."), ("user", "One?"), ("assistant", "answer 2\x1b"), ("user", "Two?"),
    ]  # fmt: skip
    assert out == "answer 2\N{REPLACEMENT CHARACTER}\nanswer 4\N{REPLACEMENT CHARACTER}\n"
    assert (model.requests[0].temperature, model.requests[0].seed, model.requests[0].adapter) == (
        0.5,
        7,
        True,
    )


def test_commands_change_who_answers_and_what_is_known(hold: Hold) -> None:
    """/base, /adapter and /new; none of them is a turn."""
    model, _, info = hold("One?", "/base", "Two?", "/new", "/adapter", "Three?", "/help")

    assert [request.adapter for request in model.requests] == [True, False, True]
    assert turns(model.requests[1])[0] == ("user", "One?")
    assert turns(model.requests[2]) == [("user", "Three?")]
    assert "the base answers alone" in info
    assert "Ctrl-D ends it" in info


def test_a_refused_question_is_forgotten(hold: Hold) -> None:
    """It is told, without control characters, and the next one is asked as if it had not been there."""
    model, out, info = hold("bad", "One?")

    assert "error: invalid data: no\N{REPLACEMENT CHARACTER}[31m" in info
    assert turns(model.requests[1]) == [("user", "One?")]
    assert out == "answer 1\N{REPLACEMENT CHARACTER}\n"


def test_an_answer_that_was_cut_off_says_so(hold: Hold) -> None:
    """And with what it can be made longer."""
    assert "(cut off after 2 tokens: --max-tokens)" in hold("One?", cut=True)[2]


def test_without_an_adapter_the_base_answers(hold: Hold) -> None:
    """Nobody can be asked who was not loaded."""
    alone = READY.model_copy(update={"adapter": None})
    model, _, info = hold("/adapter", "One?", ready=alone)

    assert not model.requests[0].adapter
    assert "there is no adapter" in info


def test_a_job_of_texts_has_no_history(hold: Hold) -> None:
    """Lines are continued as they stand, with their leading spaces."""
    model, _, _ = hold("  2 + 2 = \n", "3\n", ready=READY.model_copy(update={"conversation": False}))

    assert [request.questions[0].text for request in model.requests] == ["  2 + 2 = ", "3"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "adapter  /a (checkpoint of a job that is not finished, step 3)"),
        ({"finished": True}, "adapter  /a (finished, step 3)"),
        ({"adapter": None}, "adapter  none: the base answers alone"),
        ({"notes": ["n"]}, "note: n"),
        (
            {"conversation": False},
            "The job was trained on texts: each line is continued as it stands, without history.",
        ),
    ],
    ids=["training", "finished", "base", "a note", "texts"],
)
def test_what_answers_is_told(changes: dict[str, Any], line: str) -> None:
    """Which base, and which adapter or checkpoint."""
    lines = describe(READY.model_copy(update=changes))

    assert lines[0] == "base     /m (nf4, computing in bf16)"
    assert line in lines
