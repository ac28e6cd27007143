"""metrics.jsonl: one line a step or evaluation, written by rank 0."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_contract.progress import ProgressReport
from qlora_contract.units import now
from qlora_trainer.storage.atomic import translate_os_errors, write_atomically


@dataclass(frozen=True)
class StepMetrics:
    """One training step of all ranks: a line of metrics.jsonl, and what the live report shows of it."""

    step: int
    """Its number, from 1."""
    epoch: float
    """Epochs done after it."""
    loss: float
    """The objective's mean loss."""
    learning_rate: float
    grad_norm: float
    """Of the whole gradient, before clipping."""
    tokens: int
    supervised_tokens: int
    seconds: float
    memory_peak: int
    """Bytes: the largest peak of any rank so far."""
    eval_loss: float | None = None
    """Of the evaluation after this step, where there was one."""
    more: Mapping[str, float] = field(default_factory=dict)
    """Means of the objective's further metrics."""

    def line(self) -> dict[str, Any]:
        """The line of metrics.jsonl; `eval_loss` only where there was an evaluation."""
        values = asdict(self)
        more = values.pop("more")
        if self.eval_loss is None:
            del values["eval_loss"]
        return {**values, **more}

    def progress(self) -> dict[str, Any]:
        """The fields that ProgressReport shows, by name."""
        return {name: value for name, value in self.line().items() if name in ProgressReport.model_fields}


def evaluation_line(step: int, eval_loss: float) -> dict[str, Any]:
    """A line of metrics.jsonl for an evaluation before the first step or after the last one."""
    return {"step": step, "eval_loss": eval_loss}


class MetricsLog:
    """Appends to metrics.jsonl.

    Lines beyond the step that an attempt starts from are dropped: they will come again. So will the final evaluation,
    a line of the last step without a loss.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        lines = read_metrics(path) if start_step else []
        kept = [
            line
            for line in lines
            if line["step"] < start_step or (line["step"] == start_step and line.get("loss") is not None)
        ]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, which has a `step`, with the time. Raises StorageFull."""
        with translate_os_errors(f"writing {self.path}"), self.path.open("a") as stream:
            stream.write(json.dumps({**line, "time": now()}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of metrics.jsonl: a crash may have cut the last one, and a disk damaged any.

    Without the file there are none.
    """
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
