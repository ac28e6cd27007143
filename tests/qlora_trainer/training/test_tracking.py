"""The metrics' other readers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_contract.exit_codes import ExitCode
from qlora_contract.job_folder import EVENTS
from qlora_contract.run_config import RunConfig
from qlora_trainer.artifacts.event_file import EventFile
from qlora_trainer.training.tracking import Tracking, status_of, target_of

pytestmark = pytest.mark.process

Run = Callable[..., RunConfig]


def test_tensorboard_needs_no_setting(a_run: Run, tmp_path: Path) -> None:
    """Each job has its event files."""
    tracking = Tracking(a_run(1), tmp_path, 0)
    tracking.write({"step": 1, "loss": 2.0})
    tracking.close(0)
    (path,) = (tmp_path / EVENTS).iterdir()

    assert b"loss/train" in path.read_bytes()


def test_a_full_disk_is_said_once_and_ends_nothing(
    a_run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at the beginning nor later."""
    (tmp_path / "other" / EVENTS).parent.mkdir()
    (tmp_path / "other" / EVENTS).write_text("in the way")
    Tracking(a_run(1), tmp_path / "other", 0).write({"step": 1, "loss": 2.0})
    assert "no metrics for TensorBoard" in caplog.text

    tracking = Tracking(a_run(1), tmp_path, 0)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(EventFile, "write", fail)
    for step in (1, 2, 3):
        tracking.write({"step": step, "loss": 2.0})
    assert caplog.text.count("no more metrics for TensorBoard: no space left") == 1


def test_a_run_is_described_by_what_shapes_it(a_run: Run) -> None:
    """Its parameters are the job's identity, whose hash joins runs of the same settings; nothing unset is among
    them."""
    run = a_run(1, tracking={"mlflow": {"uri": "http://mlflow:5000", "experiment": "docs"}})
    target = target_of(run)

    assert (target.uri, target.experiment, target.run_name) == ("http://mlflow:5000", "docs", run.job.name)
    assert target.params["adapter.rank"] == str(run.adapter.rank)
    assert "dataset.evalSplit" not in target.params
    assert set(target.tags) == {"qlora.namespace", "qlora.job_uid", "qlora.config_hash"}
    assert "tracking" not in json.dumps(target.params)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (ExitCode.DONE, "FINISHED"),
        (ExitCode.TERMINATED, "KILLED"),
        (ExitCode.DIVERGED, "FAILED"),
        (1, "FAILED"),
    ],
)
def test_the_end_has_the_server_s_name(code: int, status: str) -> None:
    """Done, asked to stop, or failed."""
    assert status_of(code) == status
