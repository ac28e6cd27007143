"""The folder of a job, as `qlora run` sees it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from disturbances import fill, small_disk
from qlora_contract.exit_codes import ExitCode
from qlora_contract.job_folder import identity_text
from qlora_contract.progress import TerminationReport
from qlora_contract.run_config import RunConfig
from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli import job_folder
from qlora_operator.cli.job_folder import WorkspaceError, locked

pytestmark = pytest.mark.process


@pytest.fixture
def a_run(a_job: Callable[..., QLoRAJob]) -> Callable[..., RunConfig]:
    """A maker of RunConfigs."""

    def make(uid: str = "u", attempt: int = 0, **spec: object) -> RunConfig:
        return to_run_config(a_job(**spec), uid=uid, attempt=attempt, isa="avx2")

    return make


def identify(folder: Path, run: RunConfig) -> None:
    """Mark the folder as the trainer does."""
    (folder / "identity.json").write_text(identity_text(run))


def test_a_folder_is_locked_once(tmp_path: Path) -> None:
    """A second run of the same job is refused, and told who is at work."""
    again = locked(tmp_path / "job")
    with (
        locked(tmp_path / "job"),
        pytest.raises(WorkspaceError, match=r"`qlora run` \(process \d+\)"),
        again,
    ):
        pass

    with locked(tmp_path / "job"):  # free again
        pass


def test_a_lock_outlives_its_holder_in_those_who_inherited_it(tmp_path: Path) -> None:
    """While a launcher of a dead `qlora run` is still ending, the job cannot be started again."""
    with locked(tmp_path) as lock:
        heir = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.fileno(),)
        )
    with pytest.raises(WorkspaceError, match="still exiting"), locked(tmp_path):
        pass
    heir.communicate(b"\n")

    with locked(tmp_path):  # free again
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file in the way is not a directory."""
    (tmp_path / "file").touch()

    with (
        pytest.raises(WorkspaceError, match=r"cannot write to .*: Not a directory"),
        locked(tmp_path / "file/job"),
    ):
        pass


def test_a_folder_without_room_for_a_lock_is_named(tmp_path: Path) -> None:
    """A full disk is told in a sentence."""
    with small_disk(tmp_path / "work", "1m") as root:
        fill(root, leave=0)
        with (
            pytest.raises(WorkspaceError, match=r"cannot write to .*job: No space left"),
            locked(root / "job"),
        ):
            pass


def test_attempts_are_counted(tmp_path: Path, a_run: Callable[..., RunConfig]) -> None:
    """The uid stays and the attempt is the last plus one."""
    first = job_folder.next_attempt(tmp_path)
    job_folder.prepare(tmp_path, a_run(*first))

    assert first[1] == 0
    assert job_folder.next_attempt(tmp_path) == (first[0], 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"job": 1}',
        '{"job": {"uid": "u"}}',
        '{"job": {"name": "n", "uid": "u", "attempt": -5}}',
        '{"job": {"name": "n", "uid": "u", "attempt": Infinity}}',
        '{"job": {"name": "n", "uid": "", "attempt": 1}}',
        f'{{"job": {{"name": "n", "uid": "{"u" * 100}", "attempt": 1}}}}',
    ],
    ids=lambda text: text[:60],
)
def test_a_damaged_run_config_gives_a_new_job(tmp_path: Path, text: str) -> None:
    """Without a readable run.json the job gets another uid, so that nobody of before may publish."""
    (tmp_path / "run.json").write_text(text)

    assert job_folder.next_attempt(tmp_path)[1] == 0


def test_a_folder_of_the_same_spec_is_known(tmp_path: Path, a_run: Callable[..., RunConfig]) -> None:
    """Memory knobs and topology do not make it another spec."""
    assert not job_folder.belongs_to(tmp_path, a_run())
    identify(tmp_path, a_run())

    assert job_folder.belongs_to(tmp_path, a_run(topology={"pods": 2}, training={"microBatchTokens": 1024}))


def test_a_folder_of_another_spec_is_refused(tmp_path: Path, a_run: Callable[..., RunConfig]) -> None:
    """The sentence names what differs."""
    identify(tmp_path, a_run())

    with pytest.raises(WorkspaceError, match=r"another spec \(training.seed: 0, now 1\)") as refused:
        job_folder.belongs_to(tmp_path, a_run(training={"seed": 1}))
    assert refused.value.code == ExitCode.INVALID_CONFIGURATION


def test_a_damaged_identity_is_left_to_rank_0(tmp_path: Path, a_run: Callable[..., RunConfig]) -> None:
    """What cannot be read is not judged here."""
    (tmp_path / "identity.json").write_text("{")

    assert not job_folder.belongs_to(tmp_path, a_run())


def test_an_attempt_starts_with_a_clean_folder(tmp_path: Path, a_run: Callable[..., RunConfig]) -> None:
    """Reports of the last attempt are gone, run.json is this one's."""
    stale = job_folder.termination_file(tmp_path, 5)
    stale.write_text("{}")
    logs = job_folder.prepare(tmp_path, a_run(attempt=3))

    assert logs == tmp_path / "logs/attempt-3"
    assert logs.is_dir()
    assert not stale.exists()
    assert RunConfig.model_validate_json((tmp_path / "run.json").read_text()) == a_run(attempt=3)


def test_reports_are_read_if_they_are_reports(tmp_path: Path) -> None:
    """A missing or damaged one is None."""
    path = job_folder.termination_file(tmp_path, 0)
    assert job_folder.read_termination(path) is None
    path.write_text("{")
    assert job_folder.read_termination(path) is None
    report = TerminationReport(exit_code=11, reason="INVALID_DATA", cause="line 3")
    path.write_text(report.model_dump_json(by_alias=True))

    assert job_folder.read_termination(path) == report
