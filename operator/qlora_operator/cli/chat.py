"""`qlora chat`: a conversation with a job's model."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from qlora_contract.chat import MAX_TOKENS, ChatReady, ChatRequest, Question, Turn
from qlora_operator.cli.chat_exchange import Exchange, RefusedError
from qlora_operator.cli.display import printable

HELP = "Ctrl-D ends it; /new forgets what was said, /base lets the base answer alone, /adapter the adapter again."


@dataclass(frozen=True)
class Settings:
    """How answers are made."""

    system: str | None = None
    """What stands before every conversation."""
    max_tokens: int = MAX_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Conversation:
    """What was said, and who answers."""

    exchange: Exchange
    ready: ChatReady
    settings: Settings
    out: TextIO
    """Takes the answers."""
    info: TextIO
    """Takes what is said about them."""
    adapter: bool = True
    turns: list[Turn] = field(default_factory=list)

    def hold(self, lines: Iterator[str]) -> None:
        """Answer the user's lines until they end. Blank ones are passed over."""
        for line in lines:
            text = line.strip() if self.ready.conversation else line.rstrip("\n")
            if not text.strip():
                continue
            if (command := COMMANDS.get(text)) is not None:
                print(command(self), file=self.info)
            else:
                self.answer(text)

    def answer(self, text: str) -> None:
        """Answer a message, which belongs to the conversation from then on, as the answer does."""
        turns = [*self.turns, Turn(role="user", content=text)]
        system = [Turn(role="system", content=self.settings.system)] if self.settings.system else []
        question = Question(turns=[*system, *turns]) if self.ready.conversation else Question(text=text)
        request = ChatRequest(
            questions=[question],
            adapter=self.adapter and self.ready.adapter is not None,
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            seed=self.settings.seed,
        )
        try:
            answer = self.exchange.ask(request, self._show)[0]
        except RefusedError as error:
            print(f"error: {printable(str(error))}", file=self.info)
            return
        print(file=self.out, flush=True)
        if answer.cut:
            print(f"(cut off after {answer.tokens} tokens: --max-tokens)", file=self.info)
        self.turns = [*turns, Turn(role="assistant", content=answer.text)]

    def forget(self) -> str:
        """Begin a new conversation."""
        self.turns = []
        return "a new conversation"

    def choose(self, *, adapter: bool) -> str:
        """Let the adapter answer, or the base alone."""
        if adapter and self.ready.adapter is None:
            return "there is no adapter: it was not loaded"
        self.adapter = adapter
        return "the adapter answers" if adapter else "the base answers alone"

    def _show(self, _: int, text: str) -> None:
        print(printable(text), end="", file=self.out, flush=True)


COMMANDS: dict[str, Callable[[Conversation], str]] = {
    "/new": Conversation.forget,
    "/base": lambda conversation: conversation.choose(adapter=False),
    "/adapter": lambda conversation: conversation.choose(adapter=True),
    "/help": lambda _: HELP,
}
"""What a line does that is exactly this."""


def chat(exchange: Exchange, settings: Settings, *, base_only: bool) -> int:
    """Hold a conversation on standard input and output; the exit code.

    At a terminal there is a prompt, and answers appear as they are made. Lines of a pipe are the user's turns.
    """
    print("loading the model ...", file=sys.stderr)
    ready = exchange.open(base_only=base_only)
    for line in describe(ready):
        print(line, file=sys.stderr)
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    conversation = Conversation(exchange, ready, settings, sys.stdout, sys.stderr)
    conversation.hold(typed_lines() if interactive else sys.stdin)
    return 0


def typed_lines() -> Iterator[str]:
    """Lines that a user types, with a prompt before each; Ctrl-D ends them."""
    import readline  # noqa: F401 - lets input() edit lines; where nobody types it is not needed

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def describe(ready: ChatReady) -> list[str]:
    """What answers, in lines."""
    lines = [f"base     {ready.model} ({ready.scheme}, computing in {ready.compute_dtype})"]
    if ready.adapter is None:
        lines.append("adapter  none: the base answers alone")
    else:
        kind = "finished" if ready.finished else "checkpoint of a job that is not finished"
        step = "" if ready.step is None else f", step {ready.step}"
        lines.append(f"adapter  {ready.adapter} ({kind}{step})")
    if not ready.conversation:
        lines.append("The job was trained on texts: each line is continued as it stands, without history.")
    return [printable(line) for line in [*lines, *(f"note: {note}" for note in ready.notes)]]
