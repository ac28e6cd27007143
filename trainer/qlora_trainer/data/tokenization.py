"""A record as token ids, and which of them are supervised.

Chat: the model's own chat template; only what the assistant says is supervised,
through its end-of-turn token. Where the template has generation markers, they
tell what that is. Elsewhere each assistant's turn is found by checked prefixes:
the conversation before it, rendered with a generation prompt, must be a prefix
of the whole, so that the model learns to continue exactly from where it will be
asked to. What cannot be told apart with certainty is refused.

Prompt and completion: the two texts are joined as they stand, as TRL does, with
the tokenizer's first token (BOS) if it adds one and its end-of-sequence token;
the completion and the end are supervised. No chat template is used.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from numpy.typing import NDArray
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_trainer.data.records import Chat, Document, Message, PromptCompletion, Record
from qlora_trainer.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 512
"""Records tokenized at once: enough to keep a fast tokenizer busy."""
REMEDY = "give the model's chat template {% generation %} markers, or the data as prompt and completion"

Span = tuple[int, int]
"""First character and the one after the last."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A tokenized record."""

    ids: NDArray[np.int32]
    """(tokens,)"""
    mask: NDArray[np.uint8]
    """(tokens,): 1 where the token is supervised: predicted from those before it. Never the first."""
    truncated: bool
    """Whether its end was cut off."""


@dataclass(frozen=True)
class _Text:
    """A record as one text."""

    location: str
    text: str
    supervised: tuple[Span, ...]
    strict: bool
    """Whether a span must start at a token's start; else a token across that joint is supervised too."""


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens around a text: none where a chat template has written them."""

    begin: tuple[int, ...]
    end: int | None

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "SpecialTokens":
        """What the tokenizer puts before a text, and its end of sequence. Raises ModelError when it has none."""
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the model's tokenizer has no eos_token, so the end of a completion cannot be learned"
            )
        starts = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return cls((tokenizer.bos_token_id,) if starts else (), tokenizer.eos_token_id)

    def wrap(self, ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
        """Ids and mask of a text between begin and end, neither of them twice; the end is supervised."""
        begin = [] if tuple(ids[:1]) == self.begin else list(self.begin)
        end = [] if self.end is None or ids[-1:] == [self.end] else [self.end]
        return begin + ids + end, [0] * len(begin) + mask + [1] * len(end)


def tokenize(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> Iterator[Sample]:
    """One sample per record, in order, at most `max_length` tokens: the end is cut off.

    Raises DataError, naming the record, when what is to be learned cannot be told
    with certainty, and ModelError when the tokenizer cannot serve at all.
    """
    if not tokenizer.is_fast:
        raise ModelError("the model's tokenizer gives no offsets; a folder with tokenizer.json is needed")
    if not records:
        return
    refuse_what_is_not_honored(records)
    chat = isinstance(records[0].content, Chat)
    template = ChatTemplate(tokenizer) if chat else None
    special = SpecialTokens((), None) if chat else SpecialTokens.of(tokenizer)
    for start in range(0, len(records), BATCH):
        texts = [_text(record, template) for record in records[start : start + BATCH]]
        encoded = tokenizer(
            [text.text for text in texts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for text, text_ids, offsets in zip(
            texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            ids, mask = special.wrap(text_ids, _mask(text, offsets))
            targets = np.array(mask[:max_length], dtype=np.uint8)
            targets[:1] = 0  # nothing stands before it to predict it from
            yield Sample(np.array(ids[:max_length], dtype=np.int32), targets, len(ids) > max_length)


def refuse_what_is_not_honored(records: Sequence[Record]) -> None:
    """Raises DataError, naming the record and the key, rather than training on less than a record says."""
    for record in records:
        content = record.content
        if isinstance(content, Document):
            raise DataError(f"{record.location}: text cannot be trained on as it is yet")
        if isinstance(content, Chat) is not isinstance(records[0].content, Chat):
            raise DataError(
                f"{record.location}: is {'a conversation' if isinstance(content, Chat) else 'two texts'}, as "
                f"{records[0].location} is not; the records of a dataset must be alike"
            )
        if isinstance(content, PromptCompletion):
            continue
        if content.tools:
            raise DataError(f"{record.location}: tools cannot be trained on yet")
        for i, message in enumerate(content.messages):
            for key in sorted(message.extra):
                raise DataError(f"{record.location}: messages[{i}].{key} cannot be trained on yet")
            if message.trained is False:
                raise DataError(
                    f"{record.location}: messages[{i}] is excluded from what is learned (weight or train), which "
                    "is not possible yet"
                )


def _text(record: Record, template: "ChatTemplate | None") -> _Text:
    content = record.content
    assert not isinstance(content, Document)  # refused above
    if isinstance(content, PromptCompletion):
        text = content.prompt + content.completion
        return _Text(record.location, text, ((len(content.prompt), len(text)),), strict=False)
    assert template is not None
    text, supervised = template.render(content, record.location)
    return _Text(record.location, text, supervised, strict=not template.has_generation_markers)


def _mask(text: _Text, offsets: list[Span]) -> list[int]:
    """1 for each token that lies in a supervised span."""
    mask = [0] * len(offsets)
    ends = np.fromiter((end for _, end in offsets), dtype=np.int64, count=len(offsets))
    for start, stop in text.supervised:
        first, last = np.searchsorted(ends, (start, stop), side="right").tolist()
        # The end before, not this token's start: byte-level tokenizers may leave spaces out of a token's start.
        before = offsets[first - 1][1] if first else 0
        if text.strict and first < last and before != start:
            raise DataError(
                f"{text.location}: the tokenizer joins the assistant's first characters with what stands before "
                f"them, as it would not when the model is asked; {REMEDY}"
            )
        mask[first:last] = [1] * (last - first)
    return mask


class ChatTemplate:
    """A tokenizer's chat template, and where in its text the assistant speaks."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        try:
            self._source = str(tokenizer.get_chat_template())
        except ValueError as error:
            raise DataError(
                "the data are conversations, but the model's tokenizer has no chat template to write them: "
                "take a model that has one (chat_template.jinja), or give prompts and completions"
            ) from error
        self._variables = dict(tokenizer.special_tokens_map)
        self.has_generation_markers = re.search(r"\{%-?\s*generation\s*-?%\}", self._source) is not None
        """Whether the template itself says what the assistant says."""
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(special, key=lambda token: (-len(token), token))
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(self, chat: Chat, location: str) -> tuple[str, tuple[Span, ...]]:
        """The conversation's text, and the spans in it that are supervised.

        What follows the assistant's last turn is left out: nothing of it is learned.
        """
        turns = [i for i, message in enumerate(chat.messages) if message.role == "assistant"]
        messages = chat.messages[: turns[-1] + 1]
        text, spans = self._render(messages, location, prompt=False)
        if self.has_generation_markers:
            return text, spans
        starts = [self._start(messages[:turn], text, location) for turn in turns]
        limits = [*starts[1:], len(text)]
        contents = [messages[turn].content for turn in turns]
        turn_bounds = zip(contents, starts, limits, strict=True)
        return text, tuple(
            (start, self._end(content, text, start, limit, location)) for content, start, limit in turn_bounds
        )

    def _render(
        self, messages: Sequence[Message], location: str, *, prompt: bool
    ) -> tuple[str, tuple[Span, ...]]:
        try:
            texts, spans = render_jinja_template(
                [[{"role": message.role, "content": message.content} for message in messages]],
                chat_template=self._source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self.has_generation_markers,
                **self._variables,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the model's chat template is not valid: {error}") from error
        except Exception as error:  # a template is a program, and can fail in any way
            # In the template's own words alone: an error might repeat the conversation.
            text = str(error)
            own = isinstance(error, jinja2.TemplateError) and text and text in self._source
            why = f": {text}" if own else f" with {type(error).__name__}"
            raise DataError(f"{location}: the model's chat template refuses the conversation{why}") from error
        return texts[0], tuple(spans[0]) if spans else ()

    def _start(self, before: Sequence[Message], text: str, location: str) -> int:
        """Where the assistant starts to speak: after the prompt that it will be asked with."""
        prompt, _ = self._render(before, location, prompt=True)
        if not text.startswith(prompt):
            raise DataError(
                f"{location}: the chat template writes what stands before messages[{len(before)}] otherwise "
                f"when the model is asked, so the tokens to learn cannot be determined; {REMEDY}"
            )
        return len(prompt)

    def _end(self, content: str, text: str, start: int, limit: int, location: str) -> int:
        """The end of the first special token after `start`, if it ends this turn and no other."""
        found = self._special.search(text, start, limit)
        if found is None:
            raise DataError(
                f"{location}: the chat template ends an assistant's turn with no special token; {REMEDY}"
            )
        if not text[start : found.start()].rstrip().endswith(content.strip()):
            raise DataError(
                f"{location}: the chat template changes what the assistant says, or that holds a special token "
                f"of the model, so the tokens to learn cannot be determined; {REMEDY}"
            )
        return found.end()


def render(
    ids: NDArray[np.int32], mask: NDArray[np.uint8], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[str, bool]]:
    """A sample as text: runs, and whether each is supervised. Joined they are the decoded sample."""
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    # Decoded from the start each time: a run on its own may lose its leading space.
    texts = [tokenizer.decode(ids[:cut].tolist(), clean_up_tokenization_spaces=False) for cut in cuts[1:]]
    whole = texts[-1]
    # A character that a cut goes through belongs to the run that completes it.
    marks = [0, *(len(commonprefix([text, whole])) for text in texts)]  # noqa: RUF071 - of texts, not paths
    runs = zip(marks, marks[1:], cuts, strict=False)
    return [(whole[start:stop], bool(mask[cut])) for start, stop, cut in runs if start < stop]
