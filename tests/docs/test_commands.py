"""Every command of the documentation that needs nothing but this project is run, with a tiny model in place of the
models that the pages name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from doc_blocks import ROOT, Block, blocks, commands
from qlora_trainer import smoke_model

pytestmark = [pytest.mark.process, pytest.mark.slow]

DATA = "/srv/data"
FAQ = "question,answer\nWhat is seven?,A number.\nWhat is eight?,Another number.\n"
SMALL = """\
    maxSequenceLength: 128
    learningRate: 0.01
  topology:
    cpusPerRank: 1
"""
"""What README's job needs to be trained with the tiny model on a machine of any size."""
PLACES = {
    "BASE_FOLDER": f"{DATA}/models/SmolLM2-135M-Instruct",
    "ADAPTER_FOLDER": f"{DATA}/qlora/jobs/smollm2-docs/adapter",
    "demo/ask.py": str(ROOT / "demo/ask.py"),
}
"""What a command names -> what is there."""


class Scene:
    """A folder with what the pages speak of: their job files, data, and a model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "srv"
        smoke_model.write(self.data)
        (self.data / "models").mkdir()
        (self.data / "model").rename(self.data / "models/SmolLM2-135M-Instruct")
        (self.data / "data.jsonl").rename(self.data / "docs.jsonl")
        (folder / "docs.jsonl").symlink_to(self.data / "docs.jsonl")
        (folder / "faq.csv").write_text(FAQ)
        (folder / "questions.txt").write_text("What comes after 7?\nWhat comes after 8?\n")
        readme = next(block for block in blocks() if block.page == "README.md" and block.language == "yaml")
        (folder / "job.yaml").write_text(readme.text.replace("  topology:\n", SMALL))
        for block in blocks():
            if block.name:
                (folder / block.name).write_text(block.text)
        programs = folder / "bin"
        programs.mkdir()
        for name, module in (("qlora", "-m qlora_operator.cli"), ("python", "")):
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
            (programs / name).chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "COLUMNS": "120"}

        self.ended: dict[str, subprocess.CompletedProcess[str]] = {}

    def outcome(self, command: str) -> subprocess.CompletedProcess[str]:
        """How a command ended. Those before it were run before: it may need what they have made."""
        for _, each in commands(of_cluster=False):
            if each not in self.ended:
                self.ended[each] = self._run(each)
            if each == command:
                break
        return self.ended[command]

    def _run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a reader would."""
        for said, here in PLACES.items():
            command = command.replace(said, here)
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", command.replace(DATA, str(self.data))],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """One for all commands: the later use what the earlier have made."""
    return Scene(tmp_path_factory.mktemp("docs"))


@pytest.mark.parametrize(
    ("block", "command"),
    [pytest.param(*each, id=f"{each[0]} {each[1]}") for each in commands(of_cluster=False)],
)
def test_a_command_of_the_documentation_works(scene: Scene, block: Block, command: str) -> None:
    """It ends with exit code 0, in the order of the pages."""
    done = scene.outcome(command)

    assert done.returncode == 0, f"{block}: {command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


def test_progress_looks_as_the_page_says(scene: Scene) -> None:
    """Line by line, but for the numbers, and for what a fast run does not show."""
    (block,) = [each for each in blocks() if each.language == "text" and "first: Importing" in each.text]
    printed = scene.outcome("qlora run first.yaml --volume here=first").stdout

    def without_numbers(text: str) -> list[str]:
        return [re.sub(r"\d+", "#", line) for line in text.splitlines()]

    assert set(without_numbers(block.text)) <= set(without_numbers(printed))
