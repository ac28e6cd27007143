"""`qlora compare`: what the base and the adapter answer to the same prompts, side by side."""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_contract.base import ContractModel
from qlora_contract.chat import QUESTIONS_AT_ONCE, Answer, ChatReady, ChatRequest, Question
from qlora_operator.cli.chat import Settings, describe
from qlora_operator.cli.chat_exchange import Exchange
from qlora_operator.cli.display import printable
from qlora_operator.errors import Fault, InvalidFileError


class Compared(ContractModel):
    """A prompt and its two answers."""

    prompt: str
    """The last message of what is asked."""
    expected: str | None = None
    """The answer that the record has."""
    base: str
    adapter: str
    base_cut: bool
    """Whether the answer ended by the number of tokens."""
    adapter_cut: bool


class Comparison(ContractModel):
    """`qlora compare -o json`."""

    model: str
    adapter: str
    step: int | None = None
    finished: bool
    prompts: list[Compared]


def read_prompts(name: str) -> list[Question]:
    """The prompts of a file: JSON objects, one a line, which are records as training data have them; else plain lines.

    Blank lines are passed over. `-` is standard input.

    Raises:
        InvalidFileError: it cannot be read, has no prompt, or has both kinds of lines.
    """
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise InvalidFileError([Fault(name, f"cannot be read: {why}")]) from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InvalidFileError([Fault(name, "has no prompt: give one a line, as text or as a JSON record")])
    if not lines[0][1].lstrip().startswith("{"):
        return [Question(text=line.rstrip("\r")) for _, line in lines]
    faults: list[Fault] = []
    questions: list[Question] = []
    for number, line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            questions.append(Question(record=record))
        else:
            faults.append(Fault(name, f"line {number} is not a JSON object, as line {lines[0][0]} is"))
    if faults:
        raise InvalidFileError(faults)
    return questions


def compare(
    exchange: Exchange, questions: Sequence[Question], settings: Settings, *, output: str, console: Console
) -> int:
    """Have both answer all questions, and show it; the exit code.

    Raises:
        CommandError: a question cannot be asked, or the process is gone.
    """
    print("loading the model ...", file=sys.stderr)
    ready = exchange.open(base_only=False)
    for line in describe(ready):
        print(line, file=sys.stderr)
    results: list[Compared] = []
    for base, adapter in answers(exchange, questions, settings):
        print(f"{len(results) + 1}/{len(questions)} prompts answered", file=sys.stderr)
        results.append(
            Compared(
                prompt=adapter.prompt,
                expected=adapter.expected,
                base=base.text,
                adapter=adapter.text,
                base_cut=base.cut,
                adapter_cut=adapter.cut,
            )
        )
    if output == "json":
        print(comparison(ready, results).model_dump_json(by_alias=True, exclude_none=True, indent=2))
    else:
        show(results, console)
    return 0


def answers(
    exchange: Exchange, questions: Sequence[Question], settings: Settings
) -> Iterator[tuple[Answer, Answer]]:
    """The base's and the adapter's answer to each question, in order; some are asked together."""
    rest = iter(questions)
    while batch := list(islice(rest, QUESTIONS_AT_ONCE)):
        base, adapter = (
            exchange.ask(
                ChatRequest(
                    questions=batch,
                    system=settings.system,
                    adapter=with_adapter,
                    max_tokens=settings.max_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    seed=settings.seed,
                )
            )
            for with_adapter in (False, True)
        )
        yield from zip(base, adapter, strict=True)


def comparison(ready: ChatReady, results: list[Compared]) -> Comparison:
    """All of it as one object."""
    assert ready.adapter is not None, "both were asked"
    return Comparison(
        model=ready.model, adapter=ready.adapter, step=ready.step, finished=ready.finished, prompts=results
    )


def show(results: Sequence[Compared], console: Console) -> None:
    """Print a table, with the records' own answers where there are any."""
    expected = any(result.expected is not None for result in results)
    table = Table(show_lines=True)
    for name in ("prompt", "base", "adapter", *(["expected"] if expected else [])):
        table.add_column(name, overflow="fold", ratio=1)
    for result in results:
        cells = [
            result.prompt,
            _shown(result.base, cut=result.base_cut),
            _shown(result.adapter, cut=result.adapter_cut),
        ]
        table.add_row(
            *(Text(printable(cell)) for cell in [*cells, *([result.expected or ""] if expected else [])])
        )
    console.print(table)


def _shown(answer: str, *, cut: bool) -> str:
    return f"{answer} [...]" if cut else answer
