"""What output.formats asks for, made at the end of a job by a process of its own."""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.exit_codes import ExitCode
from qlora_contract.run_config import Adapter
from qlora_trainer.errors import ModelError, Terminated, TrainerError
from qlora_trainer.training import exports
from qlora_trainer.training.context import RankContext
from qlora_trainer.training.exports import export

pytestmark = pytest.mark.process

WANTED = {"formats": ["adapter", "merged", "gguf"], "ggufTypes": ["f16", "lora"]}
FORMS = ["merged", "gguf-f16", "gguf-lora"]


def finished(context: RankContext, report: dict[str, Any] | None = None) -> RankContext:
    """The context of a job whose adapter is there, as far as what asks for exports looks."""
    context.folder.acquire()
    (context.folder.path / "training_report.json").write_text(
        json.dumps({"adapter_sha256": "a", **(report or {})})
    )
    return context


def test_adapters_on_experts_are_refused_before_training(tmp_path: Path) -> None:
    """No other form has a place for them; a layer that is called alike is none, and the adapter alone is no export."""
    on_experts = Adapter(target_modules=["q_proj", "mlp.experts.down_proj"])

    with pytest.raises(
        ModelError, match=r"has gguf, .* or mlp\.experts\.down_proj of adapter\.targetModules"
    ):
        exports.check(["gguf-lora"], tmp_path, on_experts)
    with pytest.raises(ModelError, match=r"has no config\.json"):
        exports.check(["merged"], tmp_path, Adapter(target_modules=["down_proj"]))
    exports.check([], tmp_path, on_experts)


def program(text: str) -> tuple[str, ...]:
    """The command line of an exporter that does this."""
    return (sys.executable, "-c", f"import json, sys\nrequest = json.load(sys.stdin)\n{text}")


@pytest.mark.slow
def test_a_job_ends_with_what_it_asks_for_and_again_makes_only_what_is_new(
    ready: Callable[..., RankContext],
) -> None:
    """Trained, then exported; the report says how far each is the trained model. More need no training."""
    from qlora_trainer.training.loop import train

    context = ready(output=WANTED)
    train(context)

    export(context)

    folder = context.folder.path / "exports"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FORMS)
    report = context.folder.report()["exports"]
    assert list(report) == FORMS
    assert all(made["proof"]["adapter_share"] == pytest.approx(1, abs=0.1) for made in report.values())
    inodes = {path.name: path.stat().st_ino for path in folder.iterdir()}
    more = ready(output={**WANTED, "ggufTypes": ["f16", "lora", "q8_0"]})
    export(more)
    assert {**inodes, "gguf-q8_0": (folder / "gguf-q8_0").stat().st_ino} == {
        path.name: path.stat().st_ino for path in folder.iterdir()
    }


def test_a_job_without_other_formats_starts_no_process(ready: Callable[..., RankContext]) -> None:
    """The adapter is there."""
    export(ready(), command=("/no/such/program",))


def test_progress_of_the_process_is_the_jobs(ready: Callable[..., RankContext]) -> None:
    """So that whoever watches the job sees it advance."""
    context = finished(ready(output=WANTED))
    told = "print(json.dumps({'work': {'name': 'merging', 'unit': 'bytes', 'total': 9}}))"
    told += "\nprint('a line of a library')\nprint(json.dumps({'advanced': 5}))\nsys.exit(7)"

    with pytest.raises(TrainerError, match="ended with code 7"):
        export(context, command=program(told))

    assert context.progress.report.stage == "Publishing"
    assert context.progress.report.advances == 5


def test_a_failed_export_ends_all_ranks_with_its_cause(ready: Callable[..., RankContext]) -> None:
    """In order, since they all know."""
    error = {"error": {"code": 14, "cause": "no space"}}

    with pytest.raises(TrainerError, match="no space") as failed:
        export(finished(ready(output=WANTED)), command=program(f"print(json.dumps({error!r})); sys.exit(14)"))

    assert failed.value.exit_code == ExitCode.STORAGE_FULL
    assert failed.value.agreed


def test_a_job_that_is_asked_to_stop_ends_the_process(
    ready: Callable[..., RankContext], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Within a second or two; the process gets to remove what is not finished."""
    monkeypatch.setattr(exports, "POLL_SECONDS", 0.1)
    context, mark = finished(ready(output=WANTED)), tmp_path / "removed"
    threading.Timer(1.0, context.stop.set).start()
    waits = (
        "import pathlib, signal, time\n"
        f"def stop(*_):\n    pathlib.Path({str(mark)!r}).touch()\n    sys.exit(50)\n"
        "signal.signal(signal.SIGTERM, stop)\ntime.sleep(60)"
    )

    with pytest.raises(Terminated, match="asked to stop while exporting"):
        export(context, command=program(waits))

    assert mark.exists()
