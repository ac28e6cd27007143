"""`qlora export`, with a process that only says what an exporter says."""

import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_contract.files import sha256
from qlora_contract.job_folder import TRAINING_REPORT
from qlora_operator.cli.export import base_model, export
from qlora_operator.cli.job_folder import WorkspaceError, locked
from qlora_operator.errors import CommandError

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def signals_as_before() -> Any:
    """The command handles signals; the tests after it do as they did."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def finished(tmp_path: Path) -> Callable[..., Path]:
    """make(source) -> the folder of a finished job that was trained on that model."""

    def make(source: str = "pvc://team/model", revision: str | None = None) -> Path:
        folder = tmp_path / "w" / "jobs" / "mine"
        (folder / "adapter").mkdir(parents=True)
        weights = folder / "adapter" / "adapter_model.safetensors"
        weights.write_text("weights")
        (folder / "adapter" / "manifest.json").write_text(
            json.dumps({"files": {weights.name: sha256(weights)}})
        )
        provenance = {"model_source": source, "model_revision": revision}
        (folder / TRAINING_REPORT).write_text(json.dumps({"provenance": provenance}))
        return folder

    return make


def program(text: str) -> tuple[str, ...]:
    """The command line of an exporter that does this."""
    return (sys.executable, "-c", f"import json, sys\nrequest = json.load(sys.stdin)\n{text}")


WRITES = """
import pathlib
for form in request["forms"]:
    print(json.dumps({"work": {"name": "merging", "unit": "bytes", "total": 10}}), flush=True)
    print(json.dumps({"advanced": 10}), flush=True)
    folder = pathlib.Path(request["output"], form)
    folder.mkdir(parents=True)
    proof = {"kl_divergence": 0.001, "base_kl_divergence": 0.5, "greedy_agreement": 0.99}
    (folder / "export_report.json").write_text(json.dumps({"proof": proof, "request": request}))
"""


def test_each_form_is_shown_with_how_far_it_is_the_trained_model(
    finished: Callable[..., Path], tmp_path: Path
) -> None:
    """It is in the job's folder, and was made of what the job was trained on."""
    folder, shown = finished(), io.StringIO()

    code = export(folder, ["merged"], {"team": tmp_path}, Console(file=shown), command=program(WRITES))

    assert code == 0
    made = folder / "exports" / "merged"
    assert (
        f"exported   {made}: KL divergence 0.001 nats (base 0.5), the same next token 99% of the time"
        in shown.getvalue()
    )
    assert f"report     {folder / 'report.html'}" in shown.getvalue()
    request = json.loads((made / "export_report.json").read_text())["request"]
    assert (request["name"], request["model"]) == ("mine", str(tmp_path / "model"))


def test_elsewhere_and_of_another_folder(finished: Callable[..., Path], tmp_path: Path) -> None:
    """-o and --model; the job's folder need not be writable then."""
    folder, output, model = finished(), tmp_path / "o", tmp_path / "m"

    with locked(folder):
        code = export(
            folder,
            ["gguf-f16"],
            {},
            Console(file=io.StringIO()),
            model=model,
            output=output,
            command=program(WRITES),
        )

    assert code == 0
    assert json.loads((output / "gguf-f16" / "export_report.json").read_text())["request"]["model"] == str(
        model
    )


def test_what_the_exporter_says_is_the_error(finished: Callable[..., Path], tmp_path: Path) -> None:
    """With its exit code in words."""
    fails = program("print(json.dumps({'error': {'code': 14, 'cause': 'no space'}})); sys.exit(14)")

    with pytest.raises(CommandError, match="storage full: no space") as failed:
        export(finished(), ["merged"], {"team": tmp_path}, Console(file=io.StringIO()), command=fails)

    assert failed.value.code == 14


def test_an_exporter_that_says_nothing_is_told_by_its_code(
    finished: Callable[..., Path], tmp_path: Path
) -> None:
    """As when it was killed."""
    with pytest.raises(CommandError, match="the exporting process ended with code 3"):
        export(
            finished(),
            ["merged"],
            {"team": tmp_path},
            Console(file=io.StringIO()),
            command=program("sys.exit(3)"),
        )


def test_ctrl_c_ends_the_exporter(finished: Callable[..., Path], tmp_path: Path) -> None:
    """It gets to clean up; the command says how to go on."""
    shown = io.StringIO()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    code = export(
        finished(),
        ["merged"],
        {"team": tmp_path},
        Console(file=shown),
        command=program("import time; time.sleep(60)"),
    )

    assert code == 128 + signal.SIGINT
    assert "run the same command again" in shown.getvalue()


def test_a_job_that_is_not_finished_or_in_use_is_refused(
    finished: Callable[..., Path], tmp_path: Path
) -> None:
    """Each with a sentence."""
    console = Console(file=io.StringIO())
    with pytest.raises(CommandError, match="has no complete adapter: run the job to its end first"):
        export(tmp_path, ["merged"], {}, console)

    folder = finished()
    with locked(folder), pytest.raises(WorkspaceError, match="is in use"):
        export(folder, ["merged"], {"team": tmp_path}, console, command=program(WRITES))


def test_a_model_that_was_fetched_is_found_in_the_workspace(
    finished: Callable[..., Path], tmp_path: Path
) -> None:
    """At the revision that the job was trained on."""
    folder = finished("hf://org/name", "c0ffee")
    report = json.loads((folder / TRAINING_REPORT).read_text())

    assert base_model(folder, report, {}) == tmp_path / "w" / "sources" / "hf" / "org" / "name" / "c0ffee"


def test_a_model_on_an_unknown_claim_is_asked_for(finished: Callable[..., Path]) -> None:
    """By the two options that name it."""
    folder = finished()
    report = json.loads((folder / TRAINING_REPORT).read_text())

    with pytest.raises(
        CommandError, match="give its folder with --model, or the directory of its claim with --volume"
    ):
        base_model(folder, report, {})
