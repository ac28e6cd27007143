"""How `python -m qlora_trainer.chat` is asked, and what it answers: JSON objects, one a line, each way.

Whoever asks speaks first, with an OpenRequest: what a pod says before somebody listens is lost. It is answered by one
event with `ready` or `error`. Each ChatRequest after it is answered by events with `piece`, as the text is made, and
one with `answers` or `error`. The end of the input ends the program.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from qlora_contract.base import ContractModel
from qlora_contract.plan import PlanError

MAX_TOKENS = 512
"""Tokens of an answer, unless another number is asked for."""
QUESTIONS_AT_ONCE = 8
"""Questions of a request: answered together, each costs little more than one alone."""


class OpenRequest(ContractModel):
    """Which model is loaded."""

    base_only: bool = False
    """Without the adapter."""


class Turn(ContractModel):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Question(ContractModel):
    """What is answered. Exactly one of the three is set."""

    turns: list[Turn] | None = None
    """A conversation, whose next turn is the answer."""
    text: str | None = None
    """One message of a user; for a job that was trained on prompts, the prompt itself."""
    record: dict[str, Any] | None = None
    """A record as training data have them. What it has the assistant say last is the expected answer."""

    @model_validator(mode="after")
    def _one_is_set(self) -> "Question":
        if sum(value is not None for value in (self.turns, self.text, self.record)) != 1:
            raise ValueError("exactly one of turns, text and record must be given")
        return self


class ChatRequest(ContractModel):
    """Questions, each answered by itself."""

    questions: list[Question] = Field(min_length=1, max_length=QUESTIONS_AT_ONCE)
    system: str | None = None
    """The system message of those that are texts."""
    adapter: bool = True
    """False: the base answers alone."""
    max_tokens: int = Field(default=MAX_TOKENS, ge=1, le=1_048_576)
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    """0: the most probable token each time."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int = Field(default=0, ge=0, le=4_294_967_295)


class ChatReady(ContractModel):
    """What answers."""

    model: str
    """The base's folder."""
    adapter: str | None = None
    """Folder of the finished adapter or of the checkpoint; None: the base alone."""
    step: int | None = None
    """Steps that the adapter was trained for, where that is known."""
    finished: bool = False
    """Whether it is the job's finished adapter."""
    conversation: bool = True
    """False: the job was trained on prompts or documents, so a text is continued as it stands, without history."""
    scheme: str
    """How the base's weights are kept."""
    compute_dtype: str
    notes: list[str] = Field(default=[])
    """What a user should know, such as that the base could not be compared with the one that was trained on."""


class Piece(ContractModel):
    """The next characters of an answer."""

    question: int
    """Index within the request."""
    text: str


class Answer(ContractModel):
    """A whole answer."""

    prompt: str
    """The last message, or the prompt, that is answered."""
    text: str
    tokens: int
    cut: bool
    """Whether it ended by the number of tokens, not by itself."""
    expected: str | None = None
    """What the record has the assistant say."""


class ChatEvent(ContractModel):
    """One line of what the program says."""

    ready: ChatReady | None = None
    piece: Piece | None = None
    answers: list[Answer] | None = None
    error: PlanError | None = None
    """Why a request was not answered, or why there is no model; after the latter the program ends."""
