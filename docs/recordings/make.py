"""Record `qlora` in a terminal: `make recordings`. A minute; writes NAME.cast and NAME.svg here.

Each is a real run of real commands on the model of qlora_trainer.smoke_model, in a pseudo-terminal. A cast is
asciinema's text format, version 2; the picture is what its screen shows at the end.
"""

import html
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLACE = Path("/tmp/qlora")  # noqa: S108 - paths in the recordings are to be the same each time
COLUMNS, ROWS = 110, 40
QLORA = f"{sys.executable} -m qlora_operator.cli"
SCENES: dict[str, list[str]] = {
    "plan": ["qlora plan first.yaml --volume here=first"],
    "run": ["qlora run first.yaml --volume here=first"],
    "failure": [
        "qlora validate typo.yaml",
        "qlora run broken.yaml --volume here=first",
    ],
}
"""Name -> commands, as a reader types them."""
SIXTEEN = ("#555555", "#e06c75", "#98c379", "#e5c07b", "#61afef", "#c678dd", "#56b6c2", "#dcdfe4")
Event = tuple[float, str]


def prepare() -> None:
    """The folder that the commands run in: the job of docs/one-machine.md, and two that fail."""
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
    subprocess.run(
        [sys.executable, "-m", "qlora_trainer.smoke_model", "first"],
        cwd=PLACE,
        check=True,
        capture_output=True,
    )
    for name, text in jobs().items():
        (PLACE / name).write_text(text)
    lines = (PLACE / "first/data.jsonl").read_text().splitlines()
    lines[7] = lines[7].replace(", {", " {")
    (PLACE / "first/broken.jsonl").write_text("\n".join(lines) + "\n")


def jobs() -> dict[str, str]:
    """Their files."""
    page = (HERE.parent / "one-machine.md").read_text()
    (job,) = re.findall(r"```yaml first.yaml\n(.*?)```", page, re.DOTALL)
    return {
        "first.yaml": job,
        "typo.yaml": job.replace("learningRate", "learning_rate").replace("1Gi", "1GB"),
        "broken.yaml": job.replace("name: first", "name: broken").replace("data.jsonl", "broken.jsonl"),
    }


def record(commands: list[str]) -> list[Event]:
    """What a terminal shows of these commands, one after the other: seconds since the start, and text."""
    events: list[Event] = []
    began = time.monotonic()
    for command in commands:
        events.append((time.monotonic() - began, f"$ {command}\r\n"))
        ours, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        process = subprocess.Popen(
            ["bash", "-c", re.sub(r"^qlora", QLORA, command)],
            cwd=PLACE,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        pending = b""
        while True:
            ready, _, _ = select.select([ours], [], [], 0.2)
            try:
                data = os.read(ours, 65536) if ready else b""
            except OSError:  # the other end is closed: how a terminal says that all is read
                break
            text, pending = _decoded(pending + data)
            if text:
                events.append((time.monotonic() - began, text))
        os.close(ours)
        code = process.wait()
        events.append((time.monotonic() - began, f"[exit code {code}]\r\n\r\n" if code else "\r\n"))
    return events


def _decoded(data: bytes) -> tuple[str, bytes]:
    """The whole characters at the beginning, and the rest."""
    for cut in range(4):
        try:
            return data[: len(data) - cut].decode(), data[len(data) - cut :]
        except UnicodeDecodeError:
            continue
    return data.decode(errors="replace"), b""


def cast(events: list[Event], title: str) -> str:
    """asciinema's format, version 2."""
    head = {"version": 2, "width": COLUMNS, "height": ROWS, "title": title, "env": {"TERM": "xterm-256color"}}
    lines = [head, *([round(at, 3), "o", text] for at, text in events)]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


@dataclass
class Screen:
    """A terminal, as far as these programs use one: lines of (character, style)."""

    lines: list[list[tuple[str, str]]] = field(default_factory=lambda: [[]])
    row: int = 0
    column: int = 0
    style: str = ""

    def write(self, text: str) -> None:
        """Show text with its control sequences."""
        for control, letter in re.findall(r"\x1b\[([0-9;?]*[A-Za-z])|([^\x1b])", text, re.DOTALL):
            if control:
                self._control(control[:-1], control[-1])
            elif letter == "\r":
                self.column = 0
            elif letter == "\n":
                self.row += 1
                if self.row == len(self.lines):
                    self.lines.append([])
            else:
                self._put(letter)

    def _put(self, letter: str) -> None:
        if self.column == COLUMNS:
            self.write("\r\n")
        line = self.lines[self.row]
        line.extend([(" ", "")] * (self.column - len(line) + 1))
        line[self.column] = (letter, self.style)
        self.column += 1

    def _control(self, arguments: str, letter: str) -> None:
        if letter == "A":
            self.row = max(0, self.row - int(arguments or 1))
        elif letter == "K":
            line = self.lines[self.row]
            del line[0 if arguments == "2" else self.column :]
        elif letter == "m":
            self.style = _style(self.style, arguments)


def _style(before: str, arguments: str) -> str:
    """CSS after a sequence that selects colors."""
    parts = {key: value for key, _, value in (each.partition(":") for each in before.split(";") if each)}
    codes = [int(code or 0) for code in arguments.split(";")]
    while codes:
        code = codes.pop(0)
        if code == 0:
            parts = {}
        elif code == 1:
            parts["font-weight"] = "bold"
        elif code == 2:
            parts["opacity"] = ".7"
        elif code == 4:
            parts["text-decoration"] = "underline"
        elif 30 <= code <= 37:
            parts["fill"] = _color(code - 30)
        elif code == 38 and codes[:1] == [5]:
            parts["fill"] = _color(codes[1])
            del codes[:2]
    return ";".join(f"{key}:{value}" for key, value in parts.items())


def _color(number: int) -> str:
    """A color of xterm's 256."""
    if number < 16:
        return SIXTEEN[number % 8]
    if number >= 232:
        return "#" + 3 * f"{8 + 10 * (number - 232):02x}"
    levels = (0, 95, 135, 175, 215, 255)
    red, green, blue = (levels[(number - 16) // each % 6] for each in (36, 6, 1))
    return f"#{red:02x}{green:02x}{blue:02x}"


def svg(events: list[Event]) -> str:
    """The screen at the end."""
    screen = Screen()
    for _, text in events:
        screen.write(text)
    lines = screen.lines
    while lines and not "".join(letter for letter, _ in lines[-1]).strip():
        lines.pop()
    width, height = 8.4, 18
    rows = []
    for number, line in enumerate(lines):
        spans, start = [], 0
        for at in range(1, len(line) + 1):
            if at == len(line) or line[at][1] != line[start][1]:
                said = html.escape("".join(letter for letter, _ in line[start:at]))
                spans.append(f'<tspan style="{line[start][1]}">{said}</tspan>' if line[start][1] else said)
                start = at
        rows.append(
            f'<text x="12" y="{height * (number + 1) + 6}" xml:space="preserve">{"".join(spans)}</text>'
        )
    size = f'width="{COLUMNS * width + 24:.0f}" height="{height * len(lines) + 22}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            '<rect width="100%" height="100%" rx="6" fill="#1e2127"/>',
            '<g font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14" fill="#dcdfe4">',
            *rows,
            "</g>",
            "</svg>\n",
        ]
    )


def main() -> None:
    """Write all recordings, or those that are named."""
    prepare()
    for name in sys.argv[1:] or SCENES:
        events = record(SCENES[name])
        (HERE / f"{name}.cast").write_text(cast(events, " ; ".join(SCENES[name])))
        (HERE / f"{name}.svg").write_text(svg(events))
    shutil.rmtree(PLACE)


if __name__ == "__main__":
    main()
