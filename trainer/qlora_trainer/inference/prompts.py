"""Questions as the token ids that a model was trained to answer, and its answers as text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_trainer.data.chat_template import ChatTemplate
from qlora_trainer.data.messages import parse_messages, parse_tools
from qlora_trainer.data.records import (
    CONVERSATIONS,
    RECORD_KINDS,
    Chat,
    Document,
    Message,
    PromptCompletion,
    refuse_what_is_not_honored,
    renamed,
)
from qlora_trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder gives for bytes that are no character yet."""


@dataclass(frozen=True)
class Prompt:
    """What is answered."""

    asked: Chat | str
    """A conversation that ends with what the assistant is asked; or a text that is continued as it stands."""
    expected: str | None = None
    """The answer that a record gives."""

    @property
    def last(self) -> str:
        """The last message, or the text."""
        return self.asked if isinstance(self.asked, str) else self.asked.messages[-1].content


class Prompter:
    """Writes prompts as the job's data were written: with its chat template, or without any."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: ChatTemplate | None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        """Prepare prompts.

        Args:
            tokenizer: the model's.
            template: what writes conversations; None where texts are continued as they stand.
            stop_ids: tokens at which generation stops, besides those that the template and the tokenizer name.
        """
        self._tokenizer = tokenizer
        self.template = template
        ends = (
            {tokenizer.convert_tokens_to_ids(token) for token in template.end_tokens} if template else set()
        )
        self.stop_tokens = frozenset({*stop_ids, *ends, tokenizer.eos_token_id} - {None})
        """Tokens that end an answer."""

    def ids(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens, at least one.

        Raises:
            DataError: the template refuses the conversation, there is none to write it with, or nothing is asked.
        """
        if isinstance(prompt.asked, str):
            ids = list(self._tokenizer(prompt.asked).input_ids)
            # Some tokenizers end every text, which a prompt must not.
            while len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id and prompt.asked:
                ids.pop()
        elif self.template is None:
            raise DataError(
                "the job was trained on prompts, not on conversations: ask with a text or a prompt"
            )
        else:
            text, _ = self.template.render(
                prompt.asked.messages, "the conversation", tools=prompt.asked.tools, prompt=True
            )
            ids = list(self._tokenizer(text, add_special_tokens=False).input_ids)
        if not ids:
            raise DataError("there is nothing to answer: the prompt is empty")
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer."""
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


class GrowingText:
    """The text of an answer, piece by piece: a character that is not whole yet is held back."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self.ids: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        """The characters that a further token has completed; often none."""
        self.ids.append(token)
        return self._rest(self._decode(self.ids).rstrip(REPLACEMENT))

    def end(self) -> str:
        """The characters that are left."""
        return self._rest(self._decode(self.ids))

    def _rest(self, whole: str) -> str:
        rest = whole[self._shown :]
        self._shown += len(rest)
        return rest


def prompt_of_record(fields: Mapping[str, Any], columns: Mapping[str, str]) -> Prompt:
    """What a record of training data asks, and the answer that it gives, if it gives one.

    Args:
        fields: the record.
        columns: dataset.columns of the job.

    Raises:
        DataError: it asks nothing.
    """
    known = renamed(fields, columns)
    refuse_what_is_not_honored(known)
    if key := next((key for key in CONVERSATIONS if key in known), None):
        messages = parse_messages(known[key], key)
        if isinstance(known.get("system"), str) and known["system"] and messages[0].role != "system":
            messages = (Message("system", known["system"]), *messages)
        tools = next((parse_tools(known[k], k) for k in ("tools", "functions") if known.get(k)), ())
        return _unanswered(Chat(messages, tools))
    for answer, kind in (
        ("completion", RECORD_KINDS["prompt-completion"]),
        ("output", RECORD_KINDS["alpaca"]),
    ):
        if kind.missing({**known, answer: ""}):
            continue
        given = known.get(answer)
        content = kind.parse({**known, answer: given or "?"})  # what a parser asks for, though nobody answers
        if isinstance(content, PromptCompletion):
            return Prompt(content.prompt, content.completion if given else None)
        assert not isinstance(content, Document)
        prompt = _unanswered(content)
        return prompt if given else Prompt(prompt.asked)
    raise DataError("it must be a conversation (messages), a prompt, or an instruction")


def _unanswered(chat: Chat) -> Prompt:
    """A conversation without the turns of the assistant that end it."""
    messages = list(chat.messages)
    answer = None
    while messages and messages[-1].role == "assistant":
        answer = messages.pop().content
    if not messages:
        raise DataError("nothing is asked: the conversation has turns of the assistant alone")
    return Prompt(Chat(tuple(messages), chat.tools), answer)
