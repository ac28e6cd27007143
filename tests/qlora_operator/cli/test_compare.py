"""`qlora compare`: which prompts, and how the answers are shown."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_contract.chat import ChatRequest
from qlora_operator.cli.chat import Settings
from qlora_operator.cli.chat_exchange import Exchange
from qlora_operator.cli.compare import Compared, compare, read_prompts, show
from qlora_operator.errors import InvalidFileError


def prompts(path: Path, text: str) -> list[dict[str, Any]]:
    """The questions of a file with that text."""
    file = path / "prompts"
    file.write_text(text, encoding="utf-8")
    return [question.model_dump(exclude_none=True) for question in read_prompts(str(file))]


def test_a_file_has_records_or_plain_lines(tmp_path: Path) -> None:
    """By its first line; blank lines are passed over."""
    assert prompts(tmp_path, "\ufeffOne?\n\n {two}\r\n") == [{"text": "One?"}, {"text": " {two}"}]
    assert prompts(tmp_path, '{"prompt": "A"}\n\n{"messages": []}') == [
        {"record": {"prompt": "A"}}, {"record": {"messages": []}},
    ]  # fmt: skip


WRONG = {
    "empty": ("\n \n", "has no prompt"),
    "both kinds": ('{"prompt": "secret"}\nsecret\n[1]', "line 2 is not a JSON object, as line 1 is"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_file_that_is_neither_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """With every line that is wrong, and without quoting any."""
    with pytest.raises(InvalidFileError, match=message) as refused:
        prompts(tmp_path, text)
    assert "secret" not in str(refused.value)
    with pytest.raises(InvalidFileError, match="cannot be read: No such file"):
        read_prompts(str(tmp_path / "none"))


class Model:
    """Answers with who answers; keeps its requests."""

    def __init__(self) -> None:
        self.requests: list[ChatRequest] = []
        self.events: list[str] = []

    def send(self, line: str) -> None:
        """Take a request."""
        message = json.loads(line)
        if "questions" not in message:
            ready = {"model": "/m", "adapter": "/a", "step": 2, "scheme": "nf4", "computeDtype": "fp32"}
            self.events.append(json.dumps({"ready": ready}))
            return
        request = ChatRequest.model_validate(message)
        self.requests.append(request)
        who = "adapter" if request.adapter else "base"
        answers = [
            {"prompt": question.text, "text": f"{who} {question.text}", "tokens": 1, "cut": request.adapter}
            for question in request.questions
        ]
        self.events.append(json.dumps({"answers": answers}))

    def __iter__(self) -> "Model":
        return self

    def __next__(self) -> str:
        return self.events.pop(0)


def test_both_answer_every_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the prompts' order, some at once; as JSON with what answered."""
    model = Model()
    (tmp_path / "p").write_text("\n".join(f"p{number}" for number in range(11)))
    questions = read_prompts(str(tmp_path / "p"))
    exchange = Exchange(model.send, iter(model), lambda: "gone")
    code = compare(exchange, questions, Settings(system="S"), output="json", console=Console())
    shown = json.loads(capsys.readouterr().out)

    assert code == 0
    assert [len(request.questions) for request in model.requests] == [8, 8, 3, 3]
    assert {request.system for request in model.requests} == {"S"}
    assert (shown["adapter"], shown["step"], shown["finished"]) == ("/a", 2, False)
    assert shown["prompts"][10] == {
        "prompt": "p10", "base": "base p10", "adapter": "adapter p10", "baseCut": False, "adapterCut": True,
    }  # fmt: skip
    assert len(shown["prompts"]) == 11


@pytest.mark.parametrize("expected", [None, "E"])
def test_the_table_has_a_column_for_what_was_expected(expected: str | None) -> None:
    """If a record says; control characters and markup are shown as they are, and a cut answer is marked."""
    out = io.StringIO()
    result = Compared(
        prompt="[bold]P\x1b", expected=expected, base="B", adapter="A", base_cut=False, adapter_cut=True
    )
    show([result], Console(file=out, width=100))
    text = out.getvalue()

    assert "[bold]P\N{REPLACEMENT CHARACTER}" in text
    assert "A [...]" in text
    assert ("expected" in text) == (expected is not None)
