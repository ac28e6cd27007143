"""`python -m qlora_trainer.report`."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_contract.env import PRICE_ENV
from qlora_contract.job_folder import METRICS, REPORT_PAGE
from qlora_trainer.report.__main__ import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job that has made a step."""
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 2.5}\n')
    return tmp_path


def test_the_page_is_written_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its path is all that is printed."""
    assert main([str(folder)], {PRICE_ENV: "1 EUR"}) == 0
    assert capsys.readouterr().out == f"{folder / REPORT_PAGE}\n"


@pytest.mark.parametrize(
    ("arguments", "environ", "code", "message"),
    [
        pytest.param([], {}, 2, "usage: ", id="no folder"),
        pytest.param(["missing"], {}, 1, "missing holds no job that has made a step", id="no job"),
        pytest.param(["missing"], {PRICE_ENV: "much"}, 1, "'much' is not a price", id="no price"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str],
    environ: dict[str, str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a line on stderr."""
    assert main(arguments, environ) == code
    assert message in capsys.readouterr().err


@pytest.mark.process
def test_a_report_needs_no_torch(folder: Path) -> None:
    """Whoever has the command alone, without the trainer's packages, can look at a job."""
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'numpy', 'safetensors', 'matplotlib'): sys.modules[name] = None\n"
        "from qlora_trainer.report.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], check=False, capture_output=True)

    assert done.returncode == 0, done.stderr
