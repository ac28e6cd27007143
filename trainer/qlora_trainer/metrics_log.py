"""metrics.jsonl: one line a step or evaluation, written by rank 0."""

import json
from pathlib import Path
from typing import Any

from qlora_trainer import storage
from qlora_trainer.storage import storing


class MetricsLog:
    """Appends to metrics.jsonl.

    Lines beyond the step that an attempt starts from are dropped: they will come
    again. So will the final evaluation, a line of the last step without a loss.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        lines = read(path) if start_step else []
        kept = [
            line
            for line in lines
            if line["step"] < start_step or (line["step"] == start_step and line.get("loss") is not None)
        ]
        storage.write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **line: Any) -> None:
        """Append one line; each has a `step`."""
        with storing(f"writing {self.path}"), self.path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; the last may have been cut by a crash."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
