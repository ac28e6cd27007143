"""The `qlora` command's arguments."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import a_run
from qlora_contract.job_folder import IDENTITY, identity_text
from qlora_operator.cli.main import claims, main, parse_volumes
from qlora_operator.errors import CommandError

pytestmark = pytest.mark.process

Document = Callable[..., dict[str, Any]]


@pytest.fixture
def job_file(tmp_path: Path, job_document: Document) -> Callable[..., str]:
    """A maker of files with a job of each name."""

    def make(*names: str, **spec: Any) -> str:
        items = [job_document(name, **spec) for name in names or ("small",)]
        path = tmp_path / "job.json"
        path.write_text(json.dumps({"kind": "List", "apiVersion": "v1", "items": items}))
        return str(path)

    return make


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    """`qlora --version` names command and version."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])

    assert ended.value.code == 0
    assert capsys.readouterr().out == f"qlora {importlib.metadata.version('qlora-operator')}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="no command"),
        pytest.param(["train"], id="no such command"),
        pytest.param(["plan", "a", "-o", "yaml"], id="no such output"),
    ],
)
def test_wrong_arguments_end_with_2(arguments: list[str]) -> None:
    """As of every command."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    assert ended.value.code == 2


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_file_that_is_wrong_ends_with_2(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every fault is told, on stderr."""
    path = tmp_path / "job.yaml"
    path.write_text("kind: QLoRAJob")

    assert main([command, str(path)]) == 2
    assert f"error: {path}: apiVersion: is required" in capsys.readouterr().err


def test_validate_tells_of_files(job_file: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    """`qlora validate` needs neither machine nor volumes."""
    path = job_file()

    assert main(["validate", path]) == 0
    assert capsys.readouterr().out == f"{path}: small: valid\n"


@pytest.mark.parametrize("of_the_file", [True, False], ids=["by its file", "by its folder"])
def test_the_report_of_a_job_is_written(
    of_the_file: bool, job_file: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job is named by its file, with a directory for its workspace's claim, or by its folder."""
    folder = tmp_path / "here" / "jobs" / "small"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    path = job_file(workspace="pvc://work/here")
    arguments = [path, "--volume", f"work={tmp_path}"] if of_the_file else [str(folder)]

    assert main(["report", *arguments, "--price", "0.04 EUR"]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"


@pytest.mark.parametrize("command", ["run", "plan", "report"])
def test_what_is_no_price_ends_with_2(
    command: str, job_file: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is done."""
    assert main([command, job_file(), "--price", "cheap"]) == 2
    assert "error: --price 'cheap' is not a price" in capsys.readouterr().err


def test_claims_without_a_folder_are_all_named(
    job_file: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one error, spelled as they are to be given."""
    path = job_file(workspace="pvc://work/a", model={"source": "pvc://models/m"})

    assert main(["run", path, "--volume", f"work={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        "error: the job uses claims that have no directory here; add --volume models=PATH --volume team=PATH\n"
    )


def test_several_jobs_need_a_name(job_file: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    """`qlora run` runs one job."""
    assert main(["run", job_file("a", "b")]) == 2
    assert "has 2 jobs (a, b); choose one with --name" in capsys.readouterr().err
    assert main(["run", job_file("a", "b"), "--name", "c"]) == 2
    assert "has no jobs named 'c'; it has: a, b" in capsys.readouterr().err
    assert main(["plan", job_file("a", "b"), "--name", "b"]) == 0
    assert capsys.readouterr().out.startswith("b: 1 rank(s)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("team", "must be CLAIM=PATH, such as team-data=/srv/data", id="no path"),
        pytest.param("=.", "must be CLAIM=PATH", id="no claim"),
        pytest.param(
            "team=/no/such/folder",
            "/no/such/folder is not a directory; create it or choose another",
            id="not a directory",
        ),
    ],
)
def test_a_volume_must_be_a_directory(text: str, message: str) -> None:
    """The argument is quoted, and what would be right is said."""
    with pytest.raises(CommandError, match=message) as refused:
        parse_volumes([text])
    assert str(refused.value).startswith(f"--volume {text}: ")
    assert refused.value.code == 2


def test_a_claim_has_one_directory(tmp_path: Path) -> None:
    """Two would be a mistake."""
    with pytest.raises(CommandError, match="claim team already has a directory"):
        parse_volumes([f"team={tmp_path}", f"team={tmp_path}"])


def test_volumes_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks do not depend on where the command was given."""
    monkeypatch.chdir(tmp_path)

    assert parse_volumes(["team=.", "x=/"]) == {
        "this-machine": Path("/"),
        "team": tmp_path,
        "x": Path("/"),
    }


def test_claims_are_the_hosts_of_the_uris() -> None:
    """Each once."""
    assert claims("pvc://a/b", "pvc://a", "pvc://c/d/e", "hf://org/name", "s3://bucket/x") == {"a", "c"}


def test_what_is_remote_needs_the_workspace_alone(
    job_file: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is fetched into it; `qlora plan` without that folder says what it wants, and the other two refuse."""
    remote = {"model": {"source": "hf://org/name"}, "dataset": {"source": "s3://bucket/data.jsonl"}}
    path = job_file(workspace="pvc://work/a", **remote)
    assert main(["plan", path, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["missingVolumes"] == ["work"]

    for command in ("fetch", "run"):
        assert main([command, path]) == 2
        assert capsys.readouterr().err.endswith("add --volume work=PATH\n")


def test_a_plan_can_be_read_by_programs(
    job_file: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """`-o json` prints one object."""
    assert main(["plan", job_file(), "-o", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)

    assert (plan["name"], plan["worldSize"], plan["missingVolumes"], plan["details"]) == (
        "small",
        1,
        ["team"],
        None,
    )


def test_nobody_has_to_read_to_the_end(job_file: Callable[..., str]) -> None:
    """`qlora plan | head` ends without a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_operator.cli", "plan", job_file(), "-o", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (1, b"")


def test_an_output_that_is_full_is_told(job_file: Callable[..., str]) -> None:
    """As a disk is that a log is written to."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qlora_operator.cli", "plan", job_file(), "-o", "json"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )

    assert (done.returncode, done.stderr) == (1, b"error: cannot write: No space left on device\n")


@pytest.mark.parametrize("command", ["plan", "run"])
def test_what_is_not_there_is_told_before_anything_is_imported(
    command: str, job_file: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the code that a rank would end with, and all of it at once; torch is nowhere near."""
    assert main([command, job_file(), "--volume", f"team={tmp_path}"]) == 12
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: the model: {tmp_path}/model: no such file or folder\nthe data: {tmp_path}/"
    )


def test_without_a_file_model_and_data_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    """Both."""
    assert main(["run"]) == 2
    assert "give a job's file, or both --model and --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["--modle", "x"], "unrecognized arguments: --modle x; did you mean --model?"),
        (["--epochs", "3"], "did you mean --set training.epochs=VALUE?"),
        (["--lr=3"], "did you mean --set training.learningRate=3?"),
        (["--zzz"], "unrecognized arguments: --zzz\n"),
    ],
)
def test_an_option_that_does_not_exist_may_be_a_field(
    words: list[str], phrase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is with other programs; or a typing error."""
    with pytest.raises(SystemExit):
        main(["run", "job.yaml", *words])

    assert phrase in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "phrase"),
    [
        ("d.jsonl", "d.jsonl holds data, not a job: give --data d.jsonl, and --model with it"),
        ("d.json", "d.json holds data, not a job"),
        ("m", "m is a model: give --model m, and --data with it"),
        ("work/jobs/a", "is a job's folder: give the job's file, or the --model and --data"),
        (".", "is a folder: give a job's file"),
    ],
)
def test_what_is_given_for_a_job_is_named_for_what_it_is(
    given: str,
    phrase: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Data, a model or a job's folder, and how it is given."""
    monkeypatch.chdir(tmp_path)
    for name in ("d.jsonl", "d.json", "m/config.json", "work/jobs/a/run.json"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}")

    assert main(["run", given]) == 2
    assert phrase in capsys.readouterr().err


def test_a_job_without_a_file_is_told_of_its_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not of fields of a file that nobody wrote, nor of a cluster that the job cannot go to as it is."""
    model, data, work = tmp_path / "m", tmp_path / "d.jsonl", tmp_path / "w"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    data.write_text("{}")
    folder = work / "jobs" / "m-d"
    folder.mkdir(parents=True)
    (folder / IDENTITY).write_text(identity_text(a_run()))
    arguments = ["run", "--model", str(model), "--data", str(data), "--workspace", str(work)]

    assert main([*arguments, "--columns", "instruction=q,output=a"]) == 10
    out, error = capsys.readouterr()
    assert "holds the results of another spec" in error
    assert "choose another --name, or remove the folder" in error
    assert "cluster" not in out
    assert main([*arguments, "--columns", "q"]) == 2
    assert "--columns: must be NAME=COLUMN" in capsys.readouterr().err


def test_columns_of_a_job_file_are_written_there(
    job_file: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """--columns goes with --model and --data."""
    assert main(["run", job_file(), "--columns", "instruction=q"]) == 2
    assert "error: --columns make a job without a file" in capsys.readouterr().err


def test_a_command_that_fails_early_imports_no_library_of_the_trainer(tmp_path: Path) -> None:
    """Seconds of imports are no part of a typing error."""
    program = (
        "import sys; from qlora_operator.cli.main import main; "
        f"code = main(['run', '--model', '{tmp_path}/m', '--data', '{tmp_path}/d', '--workspace', '{tmp_path}/w']); "
        "print(code, *sorted({'torch', 'transformers', 'kubernetes', 'numpy', 'boto3', 'huggingface_hub'} & "
        "sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout == "12\n"
    assert not (tmp_path / "w").exists()


def test_a_wrong_option_is_told_with_the_usage_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Not with that of the whole."""
    with pytest.raises(SystemExit) as ended:
        main(["run", "job.yaml", "--volumes", "a=b"])

    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: qlora run ")


def test_errors_can_be_read_by_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """With -o json, the sentence and the code."""
    assert main(["run", "/no/such.yaml", "-o", "json"]) == 2
    assert json.loads(capsys.readouterr().out) == {
        "error": "/no/such.yaml: cannot be read: no such file or directory",
        "exitCode": 2,
    }


def test_ctrl_c_ends_with_one_line(
    job_file: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a run listens for it, as well as in a plan: no traceback, and the exit code of shells."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_operator.cli.plan.job_plan", interrupted)

    assert main(["plan", job_file()]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_sigterm_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary folders are removed, and SIGTERM is handled as before afterwards."""
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(kept))
    before = signal.getsignal(signal.SIGTERM)

    def terminated(*_: Any, **__: Any) -> None:
        assert list(kept.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("qlora_operator.cli.check.query_trainer", terminated)
    (tmp_path / "d.jsonl").write_text("{}")

    assert main(["check", str(tmp_path / "d.jsonl")]) == 143
    assert list(kept.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before
