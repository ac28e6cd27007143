"""`qlora chat` and `qlora compare` on a job's folder, with the trainer's own process."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer

import builders
from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli.main import main
from trained_jobs import CLAIM, TrainedJob, write_model

pytestmark = pytest.mark.process


MANIFEST = builders.job_manifest(
    "assistant",
    workspace=f"pvc://{CLAIM}/work",
    model={"source": f"pvc://{CLAIM}/model"},
    dataset={"source": f"pvc://{CLAIM}/data.jsonl", "format": "chat"},
    adapter={"rank": 4, "alpha": 8.0},
    quantization={"scheme": "none"},
    training={"computeDtype": "fp32"},
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> TrainedJob:
    """A job that is not finished, with a checkpoint."""
    root = tmp_path_factory.mktemp("claim")
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    write_model(root / "model", tokenizer)
    run = to_run_config(QLoRAJob.model_validate(MANIFEST), uid="u", attempt=0, isa="avx2")
    trained = TrainedJob(root, run)
    trained.save_checkpoint(tokenizer, 3)
    return trained


@pytest.fixture
def job_file(tmp_path: Path) -> str:
    """The job as its user wrote it."""
    path = tmp_path / "job.json"
    path.write_text(json.dumps(MANIFEST))
    return str(path)


def test_lines_of_a_pipe_are_answered(
    job: TrainedJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only answers are on standard output; what answers is told beside them. The folder alone says where all is."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Is it?\n"))
    code = main(["chat", str(job.folder.path), "--max-tokens", "5"])
    shown = capsys.readouterr()

    assert code == 0
    assert shown.out.count("\n") >= 1
    assert "Is it?" not in shown.out
    assert f"{job.folder.path}/checkpoints/step-00000003 (checkpoint of a job" in shown.err


def test_both_answers_are_compared(
    job: TrainedJob, job_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the job's file, as JSON."""
    (tmp_path / "prompts").write_text(json.dumps({"instruction": "Say it.", "output": "It."}))
    options = ["--volume", f"{CLAIM}={job.root}", "--prompts", str(tmp_path / "prompts"), "--max-tokens", "6"]
    code = main(["compare", job_file, *options, "-o", "json"])
    (compared,) = json.loads(capsys.readouterr().out)["prompts"]

    assert code == 0
    assert (compared["prompt"], compared["expected"]) == ("Say it.", "It.")
    assert compared["base"] != compared["adapter"]


def test_what_is_wrong_ends_with_the_trainer_s_code(
    job: TrainedJob, job_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another spec than the folder's is refused by the code that training would end with."""
    document = json.loads(Path(job_file).read_text())
    document["spec"]["adapter"]["rank"] = 5
    Path(job_file).write_text(json.dumps(document))

    assert main(["chat", job_file, "--volume", f"{CLAIM}={job.root}"]) == 10
    assert "error: invalid configuration: " in (shown := capsys.readouterr().err)
    assert "adapter.rank" in shown
    assert main(["chat", job_file]) == 2
    assert f"add --volume {CLAIM}=PATH" in capsys.readouterr().err


def test_a_terminal_has_a_conversation_that_ctrl_c_ends(job: TrainedJob) -> None:
    """There is a prompt for each turn; Ctrl-C ends the command and the process with the model."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qlora_operator.cli", "chat", str(job.folder.path), "--max-tokens", "4"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    seen = ""

    def until(pattern: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 240
        while not re.search(pattern, seen, re.DOTALL):
            assert time.monotonic() < deadline, seen
            seen += os.read(ours, 4096).decode(errors="replace")

    try:
        until("Ctrl-D ends it.*> ")
        model = psutil.Process(process.pid).children()
        os.write(ours, b"Is it?\n")
        until("Is it\\?.*(cut off|\n)> ")
        os.kill(process.pid, signal.SIGINT)
        code = process.wait(60)
    finally:
        process.kill()
        process.wait()
        os.close(ours)

    assert code == 130
    assert len(model) == 1
    assert not model[0].is_running()
