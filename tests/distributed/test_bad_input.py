"""Bad input ends a job before its first step, with its permanent exit code and one clear sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_trainer
from qlora_contract.exit_codes import PERMANENT, ExitCode
from qlora_contract.identity import identity_fields, identity_hash

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MakeJob = Callable[..., Any]


def missing_file(make_job: MakeJob, folder: Path) -> Any:
    """The dataset is not there."""
    return make_job(data=folder / "nothing.jsonl")


def malformed_line(make_job: MakeJob, folder: Path) -> Any:
    """Line 3 of the dataset is no JSON."""
    good = json.dumps({"prompt": "1 + 1 = ", "completion": "2"})
    path = folder / "lines.jsonl"
    path.write_text("\n".join([good, good, good[:-5], good]))
    return make_job(data=path)


def nothing_to_learn(make_job: MakeJob, folder: Path) -> Any:
    """No sample keeps a supervised token."""
    return make_job(training={"maxSequenceLength": 8})


def unknown_target(make_job: MakeJob, folder: Path) -> Any:
    """The adapter is to sit on layers that this model lacks."""
    return make_job(adapter={"targetModules": ["q_proj", "query"]})


def no_model(make_job: MakeJob, folder: Path) -> Any:
    """The model folder is empty."""
    return make_job(model=folder)


def nan_in_the_weights(make_job: MakeJob, folder: Path) -> Any:
    """A weight of the base is NaN."""
    job = make_job()
    for path in job.model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    job.model = folder
    return job


def another_spec(make_job: MakeJob, folder: Path) -> Any:
    """The job's folder holds the results of another seed."""
    fields = identity_fields(make_job(root=folder).run_config(1, 1))
    job = make_job(root=folder, training={"seed": 1})
    job.folder.mkdir(parents=True)
    identity = {"hash": identity_hash(fields), "fields": fields}
    (job.folder / "identity.json").write_text(json.dumps(identity))
    return job


CASES = [
    pytest.param(missing_file, ExitCode.INVALID_DATA, ["nothing.jsonl: no such file"], id="missing file"),
    pytest.param(
        malformed_line, ExitCode.INVALID_DATA, ["lines.jsonl: line 3: is not JSON"], id="malformed line"
    ),
    pytest.param(nothing_to_learn, ExitCode.INVALID_DATA, ["no supervised token"], id="nothing to learn"),
    pytest.param(
        unknown_target,
        ExitCode.MODEL_UNUSABLE,
        ["'query'", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"],
        id="unknown target",
    ),
    pytest.param(no_model, ExitCode.MODEL_UNUSABLE, ["has no config.json"], id="no model"),
    pytest.param(
        nan_in_the_weights,
        ExitCode.MODEL_UNUSABLE,
        ["model.layers.1.mlp.up_proj.weight"],
        id="NaN in the weights",
    ),
    pytest.param(
        another_spec,
        ExitCode.INVALID_CONFIGURATION,
        ["holds the results of another spec", "training.seed: 0, now 1"],
        id="another spec",
    ),
]


def assert_refused(job: Any, end: Any, code: ExitCode, words: list[str]) -> None:
    """It ended with that code and one sentence, and trained nothing."""
    assert code in PERMANENT
    assert end.code == code == end.report.exit_code, end.log
    for text in words:
        assert text in end.report.cause
    assert "unexpected" not in end.report.cause
    assert "Traceback" not in end.log
    assert job.metrics() == []
    assert job.checkpoints() == []


@pytest.mark.parametrize(("make", "code", "words"), CASES)
def test_bad_input_is_refused(
    make: Callable[..., Any], code: ExitCode, words: list[str], make_job: MakeJob, tmp_path: Path
) -> None:
    """A rank that cannot use its input says what was wrong and where, before it trains."""
    job = make(make_job, tmp_path)

    assert_refused(job, job.run(), code, words)


def test_all_ranks_refuse_together(make_job: MakeJob, tmp_path: Path) -> None:
    """With more ranks the sentence is the same, and no rank waits for another."""
    job = malformed_line(make_job, tmp_path)

    assert_refused(job, job.run(4), ExitCode.INVALID_DATA, ["lines.jsonl: line 3: is not JSON"])


def test_backend_that_is_not_compiled_is_refused(backend: str, make_job: MakeJob, tmp_path: Path) -> None:
    """Where nobody compiled a backend, a job that names it ends before the ranks meet, with what to run."""
    trainer = Path(qlora_trainer.__file__).parents[1]
    shutil.copytree(trainer, tmp_path / "trainer", ignore=shutil.ignore_patterns("compiled", "benchmarks"))
    job = make_job(distributed={"backend": backend})
    job.extra_environ = {"PYTHONPATH": str(tmp_path / "trainer")}

    words = [f"backend {backend} is not compiled", f"`python -m qlora_trainer.native.build {backend}`"]
    assert_refused(job, job.run(2), ExitCode.INVALID_CONFIGURATION, words)


def test_other_version_is_refused(make_job: MakeJob) -> None:
    """A run.json of a version that this trainer does not read is refused by the launcher, which names both."""
    job = make_job()
    values = json.loads(job.run_config(1, 1).to_json())
    with job.start_text(json.dumps({**values, "version": 99})) as attempt:
        (end,) = attempt.wait()

    words = ["version 99", "this trainer reads", "release"]
    assert_refused(job, end, ExitCode.INVALID_CONFIGURATION, words)
