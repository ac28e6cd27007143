"""Where in a conversation's text the assistant speaks.

Where the template has generation markers, they tell. Elsewhere each assistant's turn is found by checked prefixes: the
conversation before it, rendered with a generation prompt, must be a prefix of the whole, so that the model learns to
continue exactly from where it will be asked to. Either way the turn must hold all that the assistant says, and end with
a token that the model stops at. What cannot be told apart with certainty is refused.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora_trainer.data.chat_template import ChatTemplate, Span, TemplateRefusalError
from qlora_trainer.data.records import Chat, Message
from qlora_trainer.errors import DataError

TrainedTurns = Literal["all", "lastTurn"]
REMEDY = (
    "set dataset.chatTemplate to a template for training (`bundled:auto` where there is one for the model), or give "
    "the data as prompt and completion"
)


@dataclass(frozen=True, slots=True)
class Turn:
    """A supervised turn of the assistant, as a part of its conversation's text."""

    start: int
    """First character: what the model is asked with ends here."""
    end: Span
    """The token that ends the turn."""


def supervised_turns(
    chat: Chat, template: ChatTemplate, location: str, limit: int, train: TrainedTurns = "all"
) -> tuple[str, tuple[Turn, ...]]:
    """The conversation's text, and the turns in it that are supervised.

    What follows the last of them is left out: nothing of it is learned.

    Args:
        chat: the conversation.
        template: what writes it.
        location: of the record, for errors.
        limit: characters; no turn that begins after so many is looked at, as nothing of it will be kept.
        train: which turns of the assistant are supervised, unless the record excludes them.

    Raises:
        DataError: what is to be learned cannot be told.
    """
    numbers = trained_messages(chat, train)
    if not numbers:
        raise DataError(
            f"{location}: every turn of the assistant that would be trained on is excluded by the record, so there is "
            "nothing to learn; leave the record out"
        )
    messages = chat.messages[: numbers[-1] + 1]
    shown = Chat(messages, chat.tools)
    try:
        text, marked = template.render(messages, location, tools=chat.tools)
    except TemplateRefusalError as error:
        raise _at(refused_part(shown, template), error, location) from error
    if template.has_markers:
        spans = _marked_spans(shown, numbers, text, marked, template, location)
    else:
        spans = _prompted_spans(shown, numbers, text, template, location, limit)
    turns = []
    for number, start, stop in spans:
        if start > limit:
            break
        where = f"{location}: messages[{number}]"
        remedy = _remedy(number, numbers)
        turn = Turn(start, _end(text, start, stop, template, where, remedy))
        _check_said(messages[number], text[start : turn.end[0]], template, where, remedy)
        turns.append(turn)
    _check_given(shown, text, location)
    return text, tuple(turns)


def trained_messages(chat: Chat, train: TrainedTurns) -> list[int]:
    """The messages that are supervised; with `lastTurn` those of the assistant after the last of the user."""
    first = 0
    if train == "lastTurn":
        last = max(i for i, message in enumerate(chat.messages) if message.role == "assistant")
        asked = [i for i, message in enumerate(chat.messages[:last]) if message.role == "user"]
        first = asked[-1] if asked else 0
    return [
        i
        for i, message in enumerate(chat.messages)
        if i >= first and message.role == "assistant" and message.trained is not False
    ]


def refused_part(chat: Chat, template: ChatTemplate) -> str:
    """What of a conversation makes the template refuse it: the first turn with which it does, or the tools."""

    def refused(count: int, tools: Sequence[Mapping[str, Any]]) -> bool:
        try:
            template.render(chat.messages[:count], "", tools=tools)
        except DataError:
            return True
        return False

    # Of the turns before one that it refuses it may refuse some by themselves: any place between the two will do.
    accepted, first = 0, len(chat.messages)
    while first - accepted > 1:
        middle = (accepted + first) // 2
        accepted, first = (accepted, middle) if refused(middle, chat.tools) else (middle, first)
    return "tools" if chat.tools and not refused(first, ()) else f"messages[{first - 1}]"


def _at(part: str, error: DataError, location: str) -> DataError:
    """A refusal with the part of the record that it is about."""
    return DataError(f"{location}: {part}: {str(error).removeprefix(f'{location}: ')}")


def _prompted_spans(
    chat: Chat, numbers: Sequence[int], text: str, template: ChatTemplate, location: str, limit: int
) -> Iterator[tuple[int, int, int]]:
    """(message, the end of the prompt that it answers, the end of the next prompt) of each of these messages."""
    prompts = []
    for number in numbers:
        try:
            prompt, _ = template.render(chat.messages[:number], location, tools=chat.tools, prompt=True)
        except DataError as error:
            if number > 0:
                raise _at(f"messages[{number}]", error, location) from error
            raise DataError(
                f"{location}: messages[0] is the assistant's, and the chat template cannot ask for it without a "
                "message before it; put a turn of the user there, exclude the turn (weight: 0), or set "
                "dataset.chatTemplate"
            ) from error
        if not text.startswith(prompt):
            thinks = (
                "reasoning_content" in chat.messages[number].extra
                or "<think>" in chat.messages[number].content
            )
            switch = "turn enable_thinking on in dataset.chatTemplateKwargs, or " * (
                thinks and "enable_thinking" in template.source
            )
            raise DataError(
                f"{location}: the chat template writes what stands before messages[{number}] otherwise when the model "
                f"is asked, so the tokens to learn cannot be determined; {switch}{_remedy(number, numbers)}"
            )
        prompts.append(len(prompt))
        if len(prompt) > limit:  # prompts only grow, and each costs as much as all before it
            break
    return zip(numbers, prompts, [*prompts[1:], len(text)], strict=False)


def _marked_spans(
    chat: Chat,
    numbers: Sequence[int],
    text: str,
    marked: Sequence[Span],
    template: ChatTemplate,
    location: str,
) -> Iterator[tuple[int, int, int]]:
    """(message, start, stop) of what the markers of each of these messages are around, without the header before it."""
    answers = [i for i, message in enumerate(chat.messages) if message.role == "assistant"]
    spans = [(start, stop) for start, stop in marked if text[start:stop].strip()]
    if len(spans) > len(answers):  # a thought and an answer, marked apart
        spans = _joined(spans, text)
    if len(spans) != len(answers):
        apart = (
            i
            for i, (start, stop) in zip(answers, spans, strict=False)
            if chat.messages[i].content.strip() not in text[start:stop]
        )
        where = f"{location}: messages[{next(apart, answers[min(len(spans), len(answers) - 1)])}]"
        raise DataError(
            f"{where}: the chat template's generation markers are around {len(spans)} parts of the text, and the "
            f"assistant has {len(answers)} turns, so the tokens to learn cannot be determined; mend the markers, or "
            "set dataset.chatTemplate"
        )
    for number, (start, stop) in zip(answers, spans, strict=True):
        if number in numbers:
            try:
                header = template.header(chat.messages[:number], location, chat.tools)
            except TemplateRefusalError as error:
                raise _at(f"messages[{number}]", error, location) from error
            yield number, start + len(header) * text.startswith(header, start), stop


def _joined(spans: Sequence[Span], text: str) -> list[Span]:
    """The spans, those made one that have nothing but white space between them."""
    result = [spans[0]]
    for start, stop in spans[1:]:
        if text[result[-1][1] : start].strip():
            result.append((start, stop))
        else:
            result[-1] = (result[-1][0], stop)
    return result


def _remedy(number: int, numbers: Sequence[int]) -> str:
    """What to do about one of these turns: what is wrong with an earlier one need not be with the last."""
    return REMEDY if number == numbers[-1] else f"set dataset.train to lastTurn, or {REMEDY}"


def _end(text: str, start: int, stop: int, template: ChatTemplate, where: str, remedy: str) -> Span:
    """The token that ends the turn in text[start:stop]: the first; with markers the last in, or one right behind."""
    found = [match.span() for match in template.ends.finditer(text, start, stop)]
    if not template.has_markers:
        del found[1:]  # the rest is between this turn and the next
    elif not found or text[found[-1][1] : stop].strip():
        behind = template.ends.search(text, stop)
        found = [behind.span()] if behind and not text[stop : behind.start()].strip() else []
    if not found:
        raise DataError(
            f"{where}: the chat template does not end what the assistant says with a token at which the model stops "
            f"(the tokenizer's eos_token, or eos_token_id of generation_config.json); {remedy}"
        )
    return found[-1]


def _without_marks_at_end(text: str, template: ChatTemplate) -> str:
    """A text without the special tokens and the white space that it ends with."""
    marks = [match.span() for match in template.special.finditer(text)]
    while True:
        text = text.rstrip()
        if not marks or marks[-1][1] < len(text):
            return text
        text = text[: marks.pop()[0]]


def _check_given(chat: Chat, text: str, location: str) -> None:
    """Raise DataError where a template passes over what the assistant is given: tools, or a turn of somebody else.

    Told by a tool's name and a turn's longest word: templates trim and frame what they write, and escape it in JSON.
    """
    for i, tool in enumerate(chat.tools):
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and name not in text:
            raise DataError(
                f"{location}: the chat template leaves tools[{i}] out; set dataset.chatTemplate to one that writes them"
            )
    for i, message in enumerate(chat.messages):
        if message.role == "assistant" or not (words := message.content.split()):
            continue
        word = max(words, key=len)
        if word not in text and json.dumps(word, ensure_ascii=False)[1:-1] not in text:
            raise DataError(
                f"{location}: messages[{i}]: the chat template leaves this turn of the {message.role} out, so the "
                f"model would learn to answer without it; {REMEDY}"
            )


def _check_said(message: Message, said: str, template: ChatTemplate, where: str, remedy: str) -> None:
    """Raise DataError unless a turn's text holds, and ends with, what the record has the assistant say."""
    if template.special.search(message.content):
        raise DataError(
            f"{where}: what the assistant says holds a special token of the model, which would end or divide the "
            "turn; take it out"
        )
    calls = [call["function"]["name"] for call in message.extra.get("tool_calls", ())]
    thought = message.extra.get("reasoning_content", "").strip()
    # Templates take the white space around a thought and an answer for their own.
    *thoughts, answer = (part.strip() for part in re.split(r"</?think>", message.content))
    if thought not in said:
        raise DataError(
            f"{where}: the chat template leaves the reasoning_content of this turn out, so the model would learn to "
            "answer without it; set dataset.train to lastTurn, or dataset.chatTemplate to one that writes it"
        )
    at = 0
    for words in (*thoughts, answer):
        at = said.find(words, at) + len(words) if words in said[at:] else len(said) + 1
    if at > len(said) or not (calls or _without_marks_at_end(said, template).endswith(answer)):
        raise DataError(
            f"{where}: the chat template changes what the assistant says, so the tokens to learn cannot be "
            f"determined; {remedy}"
        )
    if not all(name in said for name in calls):
        raise DataError(
            f"{where}: the chat template leaves a call of a tool out; set dataset.chatTemplate to one that writes them"
        )
