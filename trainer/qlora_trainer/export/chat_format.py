"""A chat template as plain text around each turn, for programs that do not run the template itself."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


def without_generation_marks(template: str) -> str:
    """The template without `{% generation %}`, which only transformers knows; blanks around it are treated alike."""
    return _GENERATION.sub(lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", template)


@dataclass(frozen=True)
class Turn:
    """What stands around the text of a message."""

    before: str
    after: str


@dataclass(frozen=True)
class ChatFormat:
    """A conversation as text: its messages in their turns, then the beginning of the answer."""

    without_system: str
    """What a conversation begins with that has no system message."""
    turns: dict[str, Turn]
    """By role: user, assistant, and, unless the template refuses it, system."""
    answer: str
    """What asks for an answer."""

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """(role, text) of each message -> the prompt for an answer."""
        start = "" if messages[0][0] == "system" else self.without_system
        turns = (f"{self.turns[role].before}{text}{self.turns[role].after}" for role, text in messages)
        return start + "".join(turns) + self.answer


_SYSTEM, _USER, _ASSISTANT, _AGAIN = "qzsystemzq", "qzuserzq", "qzassistantzq", "qzagainzq"
_CONVERSATION = [("user", _USER), ("assistant", _ASSISTANT), ("user", _AGAIN)]


def chat_format(tokenizer: Any, template: str) -> ChatFormat | None:
    """What a template writes, if it writes each turn alike; None if it does not, or cannot be run.

    Args:
        tokenizer: of transformers: runs the template.
        template: the template.
    """

    def render(messages: Sequence[tuple[str, str]], *, answer: bool = False) -> str:
        written = [{"role": role, "content": text} for role, text in messages]
        return str(
            tokenizer.apply_chat_template(
                written, chat_template=template, tokenize=False, add_generation_prompt=answer
            )
        )

    try:
        first, after_user, _, end_of_user = _around(render(_CONVERSATION), [t for _, t in _CONVERSATION])
        *_, after_assistant = _around(render(_CONVERSATION[:2]), [_USER, _ASSISTANT])
        between = _around(render(_CONVERSATION), [_ASSISTANT, _AGAIN])[1]
        answer = _cut_start(render(_CONVERSATION, answer=True), render(_CONVERSATION))
        user = Turn(_cut_start(between, after_assistant), end_of_user)
        turns = {"user": user, "assistant": Turn(_cut_start(after_user, end_of_user), after_assistant)}
        whole = ChatFormat(_cut_end(first, user.before), turns, answer)
        if whole.render(_CONVERSATION) != render(_CONVERSATION, answer=True):
            return None
    except Exception:  # templates raise what they like
        return None
    return _with_system(whole, render) or whole


def _with_system(known: ChatFormat, render: Any) -> ChatFormat | None:
    """The format with a turn for the system; None if the template refuses one, or writes it elsewhere."""
    conversation = [("system", _SYSTEM), *_CONVERSATION]
    try:
        before, after, *_ = _around(render(conversation), [_SYSTEM, _USER])
        system = Turn(before, _cut_end(after, known.turns["user"].before))
        whole = ChatFormat(known.without_system, {**known.turns, "system": system}, known.answer)
        return whole if whole.render(conversation) == render(conversation, answer=True) else None
    except Exception:
        return None


def _around(text: str, marks: Sequence[str]) -> list[str]:
    """What stands before, between and after the marks. Raises ValueError unless each is there once, in order."""
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError(mark)
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text]


def _cut_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(start)
    return text[len(start) :]


def _cut_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(end)
    return text[: len(text) - len(end)]
