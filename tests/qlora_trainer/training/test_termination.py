"""How a rank's end becomes a report."""

from pathlib import Path
from typing import Any

import pytest

from qlora_contract.exit_codes import ExitCode
from qlora_trainer.errors import Diverged, Fenced
from qlora_trainer.training.context import RankContext
from qlora_trainer.training.termination import failure_report, success_report

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("loss", "cause"), [(1.25, "adapter published, eval loss 1.2500"), (None, "adapter published")]
)
def test_a_success_reports_its_result(alone: RankContext, loss: float | None, cause: str) -> None:
    """The termination report has the adapter's URI and digest, and the losses that were measured."""
    report = success_report(
        alone,
        {
            "eval_loss": loss, "steps": 4, "not_bit_exact": None, "compute_dtype": "fp32", "base_eval_loss": 2.0,
            "base_eval_loss_quantized": 2.1, "adapter_sha256": "ab", "world_size": 3,
        },
    )  # fmt: skip

    assert (report.exit_code, report.reason, report.cause) == (0, "DONE", cause)
    assert report.adapter_uri == "pvc://team/w/jobs/j/adapter"
    assert (report.step, report.adapter_sha256, report.eval_loss, report.world_size) == (4, "ab", loss, 3)


def test_a_failure_reports_how_far_training_got(alone: RankContext) -> None:
    """Step and compute dtype are those of the live report."""
    alone.progress.update(step=7, compute_dtype="bf16")
    report = failure_report(Diverged("NaN"), 0, alone)

    assert (report.step, report.compute_dtype, report.checkpoint_step) == (7, "bf16", None)


@pytest.mark.parametrize(
    ("error", "code", "cause"),
    [
        pytest.param(Diverged("the loss is NaN"), ExitCode.DIVERGED, "the loss is NaN", id="expected"),
        pytest.param(Fenced("taken over"), ExitCode.TERMINATED, "taken over", id="fenced"),
        pytest.param(ValueError("bad\nand more"), ExitCode.UNEXPECTED, "unexpected ValueError: bad", id="a-bug"),
        pytest.param(
            KeyboardInterrupt(), ExitCode.UNEXPECTED, "unexpected KeyboardInterrupt: KeyboardInterrupt", id="no-text"
        ),
    ],
)  # fmt: skip
def test_every_failure_has_a_code_and_one_sentence(error: BaseException, code: ExitCode, cause: str) -> None:
    """The report has the code, its name, and what happened; none of it needs a context."""
    report = failure_report(error, 3, None)

    assert (report.exit_code, report.reason, report.rank, report.cause) == (code, code.name, 3, cause)


@pytest.mark.parametrize("module", ["qlora_trainer.data", "qlora_trainer.data.records"])
def test_an_unexpected_error_from_the_data_says_only_where_it_was_raised(tmp_path: Path, module: str) -> None:
    """The text of such an error may quote the data, and the report is shown in the job's status."""
    file = tmp_path / "records.py"
    file.write_text("def parse(line):\n    raise ValueError('cannot parse ' + line)\n")
    scope: dict[str, Any] = {"__name__": module}
    exec(compile(file.read_text(), str(file), "exec"), scope)

    try:
        scope["parse"]("a secret")
    except ValueError as error:
        cause = failure_report(error, 0, None).cause

    assert cause == "unexpected ValueError: in parse of records.py; the log of the rank has the details"


def test_an_unexpected_error_beside_the_data_keeps_its_text() -> None:
    """A module whose name only begins like the data's handles none of it."""
    scope: dict[str, Any] = {"__name__": "qlora_trainer.database"}
    exec("def fail():\n    raise ValueError('the text')\n", scope)

    try:
        scope["fail"]()
    except ValueError as error:
        cause = failure_report(error, 0, None).cause

    assert cause == "unexpected ValueError: the text"
