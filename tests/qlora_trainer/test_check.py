"""A look at the data beside a fetch, as a process."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import builders
from qlora_contract.env import HANDOFF_ENV, RUN_CONFIG_ENV, TERMINATION_LOG_ENV, VOLUMES_ENV
from qlora_contract.plan import PlanError, PlanResponse
from qlora_contract.progress import TerminationReport
from qlora_contract.remote import fetched_uri, parse_remote
from qlora_contract.run_config import ResolvedRevisions
from qlora_trainer.check import look
from qlora_trainer.storage.handoff import fetching, leave
from testcluster.remote import until

pytestmark = pytest.mark.process

S3 = "s3://bucket/docs"
LISTING = "d0" * 32


@pytest.fixture
def environ(tmp_path: Path, smoke_folder: Path) -> dict[str, str]:
    """Of a container whose fetch has brought data into the workspace, beside a small model on a claim."""
    handoff = tmp_path / "handoff"
    handoff.mkdir()
    run = builders.a_run(
        version=1,
        stage="fetch",
        workspace="pvc://work",
        model={"source": "pvc://models/model"},
        dataset={"source": S3},
        training={"epochs": 1, "maxSequenceLength": 64, "globalBatchTokens": 128},
    )
    (tmp_path / "run.json").write_text(run.to_json())
    with fetching({HANDOFF_ENV: str(handoff)}):
        leave(ResolvedRevisions(dataset=LISTING), {HANDOFF_ENV: str(handoff)})
    return {
        "PATH": "/usr/bin:/bin",
        RUN_CONFIG_ENV: str(tmp_path / "run.json"),
        HANDOFF_ENV: str(handoff),
        TERMINATION_LOG_ENV: str(tmp_path / "end"),
        VOLUMES_ENV: json.dumps({"work": str(tmp_path / "work"), "models": str(smoke_folder)}),
        "PYTHONPATH": ":".join(sys.path),
    }


@pytest.fixture
def bring(tmp_path: Path) -> Callable[[str], None]:
    """bring(text) -> it is what the fetch has brought."""

    def put(text: str) -> None:
        place = fetched_uri("pvc://work", parse_remote(S3), LISTING).removeprefix("pvc://work/")
        folder = tmp_path / "work" / place
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text(text)

    return put


GOOD = "".join(json.dumps({"prompt": f"{n}?", "completion": "x" * (n % 30 + 1)}) + "\n" for n in range(60))


def test_good_data_are_told_in_a_sentence(environ: dict[str, str], bring: Callable[[str], None]) -> None:
    """What the file is, its records, samples, tokens and steps: by the ranks' own reading."""
    bring(GOOD)
    end = look(environ)

    assert (end.exit_code, end.data is None) == (0, False), end.cause
    assert end.data is not None
    assert end.data.startswith("train.jsonl (a JSONL file): training: ")
    for part in (" records in the prompt-completion format", " samples of ", "; evaluation: ", " steps of "):
        assert part in end.data


def test_data_that_no_rank_could_use_are_refused(
    environ: dict[str, str], bring: Callable[[str], None]
) -> None:
    """With the ranks' exit code and words."""
    bring('{"question": "a", "reply": "b"}\n')
    end = look(environ)

    assert (end.exit_code, end.data) == (11, None)
    assert "train.jsonl: line 1" in end.cause


def _answers(response: PlanResponse) -> list[str]:
    return ["sh", "-c", f"echo a word before; echo '{response.model_dump_json(by_alias=True)}'"]


@pytest.mark.parametrize(
    ("planner", "says"),
    [
        pytest.param(["sh", "-c", "kill -9 $$"], "ended with exit status -9", id="it is killed"),
        pytest.param(["sh", "-c", "exit 1"], "ended with exit status 1", id="an unexpected error"),
        pytest.param(["sh", "-c", "sleep 60"], "nothing was found out within 1 s", id="it hangs"),
        pytest.param(
            _answers(PlanResponse(error=PlanError(code=14, cause="/tmp is full"))), "/tmp is full", id="no room here"
        ),
        pytest.param(_answers(PlanResponse()), "something else", id="no answer"),
    ],
)  # fmt: skip
def test_a_look_that_fails_refuses_nothing(planner: list[str], says: str, environ: dict[str, str]) -> None:
    """The ranks find out: their image, memory and time are others."""
    end = look(environ, planner, seconds=1.0)

    assert (end.exit_code, end.data) == (1, None)
    assert says in end.cause


def test_where_nothing_was_fetched_nobody_looks(environ: dict[str, str], tmp_path: Path) -> None:
    """The fetch itself says why."""
    for file in (tmp_path / "handoff").glob("*.json"):
        file.unlink()

    assert look(environ, ["false"]).cause == "the sources were not fetched"


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_it_stops_when_it_is_asked_to(environ: dict[str, str], tmp_path: Path) -> None:
    """While it waits for a fetch: at once, with 0 and a report, as whatever happens."""
    with fetching(environ):
        process = subprocess.Popen([sys.executable, "-m", "qlora_trainer.check"], env=environ)
        until(lambda: _catches(process.pid, signal.SIGTERM))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    end: Any = TerminationReport.model_validate_json((tmp_path / "end").read_bytes())

    assert (end.exit_code, end.cause) == (1, "asked to stop")
