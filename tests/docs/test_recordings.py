"""docs/recordings: terminal recordings of real runs."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from doc_blocks import ROOT
from qlora_operator.cli.main import main

FOLDER = ROOT / "docs" / "recordings"


def program() -> ModuleType:
    """docs/recordings/make.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("recordings", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = program()


def events(name: str) -> list[tuple[float, str]]:
    """Of a cast."""
    _, *lines = map(json.loads, (FOLDER / f"{name}.cast").read_text().splitlines())
    return [(at, text) for at, kind, text in lines if kind == "o"]


@pytest.mark.parametrize("name", MAKE.SCENES)
def test_a_recording_is_what_asciinema_plays(name: str) -> None:
    """Version 2: a head, then outputs with times that grow; of all commands of its scene; and small."""
    text = (FOLDER / f"{name}.cast").read_text()
    head: dict[str, Any] = json.loads(text.splitlines()[0])
    shown = events(name)

    assert (head["version"], head["width"]) == (2, MAKE.COLUMNS)
    assert [at for at, _ in shown] == sorted(at for at, _ in shown)
    assert [said[2:].strip() for _, said in shown if said.startswith("$ ")] == MAKE.SCENES[name]
    assert len(text) < 200_000


@pytest.mark.parametrize("name", MAKE.SCENES)
def test_a_picture_is_the_last_screen_of_its_recording(name: str) -> None:
    """Nobody has drawn it."""
    assert (FOLDER / f"{name}.svg").read_text() == MAKE.svg(events(name))


def test_the_errors_shown_are_those_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recording of sentences that have changed since is made anew: `make recordings`."""
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text(MAKE.jobs()["typo.yaml"])

    assert main(["validate", "typo.yaml"]) == 2
    shown = "".join(said for _, said in events("failure")).replace("\r", "")
    assert capsys.readouterr().out in shown


@pytest.mark.parametrize(
    ("written", "screen"),
    [
        pytest.param("a\r\nb", ["a", "b"], id="lines"),
        pytest.param("abc\rx", ["xbc"], id="return"),
        pytest.param("one\r\ntwo\r\x1b[2K\x1b[1A\x1b[2Kthree", ["three", ""], id="a picture drawn over"),
        pytest.param("\x1b[1mbold\x1b[0m", ["bold"], id="styles take no room"),
        pytest.param("x" * 111, ["x" * 110, "x"], id="wrapped"),
    ],
)
def test_a_screen_shows_what_a_terminal_would(written: str, screen: list[str]) -> None:
    """As far as rich writes control sequences."""
    made = MAKE.Screen()
    made.write(written)

    assert ["".join(letter for letter, _ in line) for line in made.lines] == screen
