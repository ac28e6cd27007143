"""A chat template: a conversation as the text that the model reads.

A template is a program that comes with the model. What it may depend on besides the conversation is fixed here: the
variables of the job, and the time, which is that of the job's first attempt on every rank and in every attempt.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jinja2

from qlora_trainer.data import template_limits
from qlora_trainer.data.records import Message
from qlora_trainer.errors import ConfigurationError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character and the one after the last."""


class TemplateRefusalError(DataError):
    """A chat template refuses a conversation by itself, by an error of its own or of Python's."""


_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TemplateSettings:
    """What a job says of its chat template."""

    source: str | None = None
    """Its text; None: the one that the tokenizer brings."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Handed to it by name."""
    clock: datetime.datetime = field(default_factory=lambda: datetime.datetime.now().astimezone())
    """What it is told when it asks for the time."""
    stop_ids: tuple[int, ...] = ()
    """Tokens at which the model's generation stops, besides the tokenizer's eos_token."""


class ChatTemplate:
    """A chat template and the tokens that it ends the assistant's turns with."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: TemplateSettings) -> None:
        """Choose the template.

        Raises:
            DataError: there is none.
            ConfigurationError: a variable is set that it does not use.
        """
        self._given = settings.source is not None
        self.source, self.source_with_tools = (
            (settings.source, settings.source) if settings.source is not None else _own_sources(tokenizer)
        )
        for name in settings.variables:
            if not re.search(rf"\b{re.escape(name)}\b", self.source):
                raise ConfigurationError(
                    f"dataset.chatTemplateKwargs.{name}: the chat template has no variable of this name"
                )
        self._set = dict(settings.variables)
        self._variables = {**tokenizer.special_tokens_map, **settings.variables}
        self._clock = settings.clock
        self.has_markers = _MARKERS.search(self.source) is not None
        """Whether the template itself says, by generation markers, what the assistant says."""
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special = _any_of(special)
        """Matches any special token."""
        stops = {tokenizer.eos_token_id, *settings.stop_ids} - {None}
        # An id beyond the vocabulary has no token, and no text ends with it.
        self._stops = set(tokenizer.convert_ids_to_tokens(sorted(stops))) - {None}
        self.end_tokens = self._stops | self._end_of_turn()
        """Tokens that end a turn of the assistant."""
        self.ends = _any_of(self.end_tokens)
        """Matches any token that ends a turn of the assistant."""

    def render(
        self,
        messages: Sequence[Message],
        location: str,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        prompt: bool = False,
    ) -> tuple[str, tuple[Span, ...]]:
        """The text of messages, and the spans in it that generation markers are around.

        Args:
            messages: the conversation, or its beginning.
            location: of the record, for errors.
            tools: what the assistant may call.
            prompt: whether the text ends with what the assistant is asked with.

        Raises:
            DataError: the template refuses the conversation.
            ModelError, ConfigurationError: it is no template.
        """
        source = self.source_with_tools if tools else self.source
        if tools and not re.search(r"\btools\b", source):
            raise DataError(
                f"{location}: the record has tools, which the chat template has no place for; set dataset.chatTemplate "
                "to one that writes them"
            )
        try:
            template = template_limits.compiled(source)
            template.globals["strftime_now"] = self._clock.strftime  # transformers' is of now
            text, spans = template_limits.render(
                template,
                sum(len(message.content) for message in messages),
                marked=self.has_markers,
                messages=[_plain(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except jinja2.TemplateSyntaxError as error:
            if self._given:
                raise ConfigurationError(f"dataset.chatTemplate is not valid: {error}") from error
            raise ModelError(f"the model's chat template is not valid: {error}") from error
        except template_limits.LimitError as error:
            raise DataError(f"{location}: the chat template {error}, and was stopped") from error
        except Exception as error:  # a template is a program, and can fail in any way
            # In the template's own words alone: an error might repeat the conversation.
            said = str(error)
            own = isinstance(error, jinja2.TemplateError) and said and said in source
            why = f": {said}" if own else f" with {type(error).__name__}"
            raise TemplateRefusalError(
                f"{location}: the chat template refuses the conversation{why}"
            ) from error
        return text, tuple(spans)

    def header(
        self, before: Sequence[Message], location: str, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """What the template adds to a conversation to ask the assistant; empty where that cannot be told."""
        without, _ = self.render(before, location, tools=tools)
        asked, _ = self.render(before, location, tools=tools, prompt=True)
        return asked.removeprefix(without) if asked.startswith(without) else ""

    @property
    def portable(self) -> str:
        """Its text with the variables that the job sets as defaults: for those who know nothing of the job."""
        defaults = [
            f"{{%- if {name} is not defined %}}{{%- set {name} = {text} %}}{{%- endif %}}"
            for name, text in ((n, json.dumps(value, ensure_ascii=False)) for n, value in self._set.items())
        ]
        # A line break at the template's beginning would belong to a block before it.
        return "".join([*defaults, "{{- '' }}", self.source]) if defaults else self.source

    def digest(self) -> str:
        """sha256 of all that decides how a conversation is written."""
        parts = [self.source, self.source_with_tools, self._variables]
        if "strftime_now" in self.source:
            parts.append(self._clock.isoformat())
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _end_of_turn(self) -> set[str]:
        """The special token that the template itself ends every turn of the assistant with, if there is one.

        A base model with a template of its tuned sibling stops at another token than the one that its eos_token
        names, so the template is asked: what comes after each of two answers, and is neither what opens the
        conversation nor part of what the assistant is asked with. Those are headers, which open turns.
        """
        answers = ("Yes, it is.", "No, it is not.")
        messages = [
            Message(role, text)
            for answer in answers
            for role, text in (("user", "Is it?"), ("assistant", answer))
        ]
        try:
            text, _ = self.render(messages, "")
            header = self.header(messages[:1], "")
        except (DataError, ModelError, ConfigurationError):
            return set()  # said of a record, with its place
        found = set()
        framed = True
        for answer in answers:
            behind = text.find(answer) + len(answer)
            token = self.special.search(text, behind)
            if behind < len(answer) or token is None or text[behind : token.start()].strip():
                return set()
            found.add(token.group())
            # A frame around answers: what ends the turn stands right behind it, and is known already.
            after: re.Match[str] | None = token
            while after and after.group() not in self._stops:
                after = self.special.match(text, after.end())
            framed = framed and after is not None
        if (
            framed
            or len(found) > 1
            or text.startswith(tuple(found))
            or any(token in header for token in found)
        ):
            return set()
        return found


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates read it: transformers hands a thought to them under both of its names."""
    thought = message.extra.get("reasoning_content")
    also = {} if thought is None else {"thinking": thought}
    return {"role": message.role, "content": message.content, **also, **message.extra}


def _own_sources(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """The tokenizer's template, and the one for conversations with tools. Raises DataError when there is none."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise DataError(
            f"the model's tokenizer has the chat templates {', '.join(sorted(templates))}, and none that is called "
            "default: put the text of one into dataset.chatTemplate"
        )
    if not templates:
        raise DataError(
            "the data are conversations, but the model's tokenizer has no chat template to write them: take a model "
            "that has one (chat_template.jinja), set dataset.chatTemplate, or give prompts and completions"
        )
    if isinstance(templates, dict):
        return str(templates["default"]), str(templates.get("tool_use", templates["default"]))
    return str(templates), str(templates)


def _any_of(words: set[str]) -> re.Pattern[str]:
    """A pattern that matches each of some words, the longest first, and nothing when there are none."""
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
