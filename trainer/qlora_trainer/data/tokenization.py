"""A record as token ids, and which of them are supervised.

Chat: the chat template's text; only what the assistant says is supervised, through its end-of-turn token (masks.py).
The text is cut where the assistant starts to speak, and its parts are tokenized apart, since that is what the model
meets: when it is asked, the prompt has been tokenized without the answer.

Prompt and completion: the two texts are joined as they stand, as TRL does, with the tokenizer's first token (BOS) if it
adds one and its end-of-sequence token; the completion and the end are supervised. No chat template is used.

Document: as a completion without a prompt.
"""

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from os.path import commonprefix
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qlora_contract.run_config import Overlong
from qlora_trainer.data.chat_template import ChatTemplate, Span, TemplateSettings
from qlora_trainer.data.masks import REMEDY, TrainedTurns, supervised_turns
from qlora_trainer.data.readers import BadRow
from qlora_trainer.data.records import Chat, Document, PromptCompletion, Record
from qlora_trainer.errors import DataError, ModelError, TrainerError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

_Encoded = tuple[tuple[str, list[int]], "Encoding"]
"""The anchor before a part and its ids; what the tokenizer made of the two together."""

BATCH_RECORDS = 512
"""Records tokenized at once, at most: enough to keep a fast tokenizer busy."""
BATCH_CHARACTERS = 2**18
"""Characters tokenized at once, but for one record that has more: their tokens and offsets take some 20 MB."""


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
class TokenizationOptions:
    """How records become tokens, besides their longest length."""

    template: TemplateSettings = field(default_factory=TemplateSettings)
    train: TrainedTurns = "all"
    overlong: Overlong = "truncate"
    """What becomes of a sample that is longer than the longest length."""
    advance: Callable[[int], None] = lambda _: None
    """Called with the number of records that were just tokenized, and with 0 before each batch. What it raises ends the
    work."""


@dataclass(frozen=True)
class _Part:
    """A part of a record's text that is tokenized by itself."""

    text: str
    supervised: Span | None = None
    """Characters."""
    begins_turn: bool = False
    """Whether the assistant starts to speak here: it is supervised from its beginning through `end`."""
    end: Span | None = None
    """The end-of-turn token; None where it was cut off."""


@dataclass(frozen=True)
class _Text:
    """A record as text."""

    record: Record
    parts: tuple[_Part, ...]
    cut: bool
    """Whether its end is missing, which is not kept anyway."""
    special: "SpecialTokens"


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
        with faults_of_the_tokenizer():
            starts = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return cls((tokenizer.bos_token_id,) if starts else (), tokenizer.eos_token_id)

    def wrap(self, ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
        """Ids and mask of a text between begin and end, neither of them twice; the end is supervised."""
        begin = [] if tuple(ids[:1]) == self.begin else list(self.begin)
        end = [] if self.end is None or ids[-1:] == [self.end] else [self.end]
        return begin + ids + end, [0] * len(begin) + mask + [1] * len(end)


@contextmanager
def faults_of_the_tokenizer() -> Iterator[None]:
    """Raises ModelError for whatever a tokenizer fails with. A damaged one also ends in panics of its own language."""
    try:
        yield
    except TrainerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"the model's tokenizer cannot be used ({type(error).__name__}); take another copy of the model"
        ) from error


class Tokenization:
    """What makes a job's records into samples."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        options: TokenizationOptions | None = None,
    ) -> None:
        """Samples have at most `max_length` tokens: the end is cut off."""
        if not tokenizer.is_fast:
            raise ModelError("the model's tokenizer gives no offsets; a folder with tokenizer.json is needed")
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = tokenizer.split_special_tokens
        self.max_length = max_length
        self.options = options or TokenizationOptions()
        longest = max(map(len, tokenizer.get_vocab()), default=1)
        # A token never spans more characters than the longest one has; and one more token tells that there are more.
        self._max_characters = (max_length + 2) * longest

    def samples(self, records: Iterable[Record]) -> Iterator[Sample]:
        """One sample per record, in order.

        Raises:
            DataError: what is to be learned cannot be told with certainty; names the record.
            ModelError, ConfigurationError: tokenizer, template or options cannot serve at all.
        """
        for outcome in self.outcomes(records):
            if isinstance(outcome, BadRow):
                raise DataError(str(outcome))
            yield outcome

    def outcomes(self, records: Iterable[Record]) -> Iterator[Sample | BadRow]:
        """For each record, in order, its sample, or why what is to be learned cannot be told with certainty.

        Raises DataError, ModelError or ConfigurationError when tokenizer, template or options cannot serve at all.
        """
        batch: list[_Text | BadRow] = []
        characters = 0
        for record in records:
            text = self._text_or_refusal(record, self._max_characters)
            size = 0 if isinstance(text, BadRow) else sum(len(part.text) for part in text.parts)
            if batch and (characters + size > BATCH_CHARACTERS or len(batch) == BATCH_RECORDS):
                yield from self._encode(batch)
                batch, characters = [], 0
            batch.append(text)
            characters += size
        if batch:
            yield from self._encode(batch)

    @cached_property
    def template(self) -> ChatTemplate:
        """What writes conversations. Raises DataError, ModelError or ConfigurationError when there is none."""
        return ChatTemplate(self._tokenizer, self.options.template)

    @cached_property
    def _special(self) -> SpecialTokens:
        return SpecialTokens.of(self._tokenizer)

    def _text_or_refusal(self, record: Record, limit: int) -> _Text | BadRow:
        """As _text, with the record's own refusal as a value. One that is about all records is raised."""
        if isinstance(record.content, Chat):
            _ = self.template
        try:
            return self._text(record, limit)
        except DataError as error:
            return _refusal(record, error)

    def _text(self, record: Record, limit: int) -> _Text:
        """The record's text, cut to so many characters."""
        match record.content:
            case Chat():
                text, turns = supervised_turns(
                    record.content, self.template, record.location, limit, self.options.train
                )
                shown = text[:limit]
                starts = [0, *(turn.start for turn in turns if turn.start < len(shown))]
                ends = [None, *(turn.end for turn in turns)]
                parts = tuple(
                    _Part(
                        shown[start:stop],
                        end=(end[0] - start, end[1] - start) if end and end[1] <= len(shown) else None,
                        begins_turn=end is not None,
                    )
                    for start, stop, end in zip(starts, [*starts[1:], len(shown)], ends, strict=False)
                )
                return _Text(record, parts, len(text) > limit, SpecialTokens((), None))
            case PromptCompletion(prompt, completion):
                text, begin = prompt + completion, len(prompt)
            case Document(text):
                begin = 0
        parts = (_Part(text[:limit], supervised=(begin, len(text))),)
        return _Text(record, parts, len(text) > limit, self._special)

    def _encode(self, batch: Sequence[_Text | BadRow]) -> Iterator[Sample | BadRow]:
        self.options.advance(0)
        encoded = self._encode_parts([text for text in batch if isinstance(text, _Text)])
        for text in batch:
            if isinstance(text, BadRow):
                yield text
                continue
            parts = list(islice(encoded, len(text.parts)))
            try:
                sample = self._sample(text, parts)
            except DataError as error:
                yield _refusal(text.record, error)
                continue
            if sample is None:
                yield from self._encode([self._text_or_refusal(text.record, sys.maxsize)])
            else:
                yield sample

    def _sample(self, text: _Text, parts: Sequence[_Encoded]) -> Sample | None:
        """The sample of a text; None when more of it must be tokenized to know. Raises DataError."""
        ids: list[int] = []
        mask: list[int] = []
        for part, encoded in zip(text.parts, parts, strict=True):
            part_ids, part_mask = self._part(part, encoded, text.record.location)
            ids += part_ids
            mask += part_mask
        max_length = self.max_length
        if text.cut and len(ids) <= max_length:
            # Some tokens span more than their own text: white space around them, or what a normalizer drops.
            return None
        if text.cut:
            ids, mask = SpecialTokens(text.special.begin, None).wrap(ids, mask)
        else:
            ids, mask = text.special.wrap(ids, mask)
        if len(ids) > max_length and self.options.overlong == "error":
            raise DataError(
                f"{text.record.location}: is longer than training.maxSequenceLength, {max_length} tokens; shorten it, "
                "raise that, or let training.overlong be truncate or drop"
            )
        targets = np.array(mask[:max_length], dtype=np.uint8)
        targets[:1] = 0  # nothing stands before it to predict it from
        return Sample(np.array(ids[:max_length], dtype=np.int32), targets, len(ids) > max_length)

    def _encode_parts(self, texts: Sequence[_Text]) -> Iterator[_Encoded]:
        """Ids and offsets of each part behind its anchor."""
        parts = [part for text in texts for part in text.parts]
        if not parts:
            return
        anchors = [self._anchor if part.begins_turn else ("", []) for part in parts]
        with faults_of_the_tokenizer():
            # Not by the tokenizer itself, which makes lists of all that is known of each token.
            encoded = self._backend.encode_batch(
                [anchor + part.text for (anchor, _), part in zip(anchors, parts, strict=True)],
                add_special_tokens=False,
            )
        yield from zip(anchors, encoded, strict=True)

    def _part(self, part: _Part, encoded: _Encoded, location: str) -> tuple[list[int], list[int]]:
        """Ids and mask of a part. Raises DataError."""
        (anchor, anchor_ids), encoding = encoded
        ids, count = encoding.ids, len(anchor_ids)
        if ids[:count] != anchor_ids:
            raise DataError(
                f"{location}: the tokenizer joins the first characters of an answer with whatever stands before "
                f"them; {REMEDY}"
            )

        def end_of(token: int) -> int:
            # Of the few tokens that are asked for: a list of all offsets costs as much as half of the ids.
            place = encoding.token_to_chars(token)
            assert place is not None, "no token is added to those of the text"
            return place[1]

        def ended(character: int) -> int:
            """How many tokens of the part end before a character of it, or with it."""
            return bisect_right(range(len(ids)), character + len(anchor), count, key=end_of) - count

        return ids[count:], self._mask(part, ids[count:], ended, location)

    def _mask(self, part: _Part, ids: list[int], ended: Callable[[int], int], location: str) -> list[int]:
        """1 for each supervised token. `ended`: how many tokens end before a character, or with it."""
        if not part.begins_turn:
            first, last = map(ended, part.supervised or (0, 0))
        else:
            first, last = 0, len(ids)
            if part.end is not None:
                # By where it starts: a token may take white space behind it along, and so end later.
                last = ended(part.end[0]) + 1
                name = part.text[slice(*part.end)]
                if ids[last - 1 : last] != [self._tokenizer.convert_tokens_to_ids(name)]:
                    raise DataError(
                        f"{location}: the tokenizer reads the end of a turn as part of other text, so the model would "
                        f"not learn to stop; {REMEDY}"
                    )
        return [0] * first + [1] * (last - first) + [0] * (len(ids) - last)

    @cached_property
    def _anchor(self) -> tuple[str, list[int]]:
        """A text, and its ids, after which another one is tokenized as in the middle of a text.

        Some tokenizers put a space before whatever they are given, which would part an answer from its prompt.

        Raises:
            ModelError: there is none.
        """

        def encode(text: str) -> list[int]:
            with faults_of_the_tokenizer():
                return list(self._tokenizer.encode(text, add_special_tokens=False))

        def decode(ids: list[int]) -> str:
            with faults_of_the_tokenizer():
                return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

        before = encode("a")
        for anchor in ("", self._tokenizer.eos_token or "", "\n"):
            ids = encode(anchor) if anchor else []
            if all(
                decode(before + encode(anchor + text)[len(ids) :]) == decode(before) + text
                for text in ("a", " a", "\na")
            ):
                return anchor, ids
        raise ModelError(
            "the model's tokenizer does not give back the text that it was given, so prompts and answers cannot be "
            "put together; take another model"
        )


def _refusal(record: Record, error: DataError) -> BadRow:
    """A record's refusal, without its location, which the row has."""
    return BadRow(record.location, str(error).removeprefix(record.location).removeprefix(":").strip())


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
