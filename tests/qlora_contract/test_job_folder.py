"""The format of a job's folder."""

import hashlib
import json
from pathlib import Path

import pytest

from builders import a_run
from qlora_contract import job_folder
from qlora_contract.job_folder import DamagedIdentityError, IdentityError

IDENTITY_OF_RELEASE_0_1_0 = {
    "hash": "d15fffa0bf43345a1b138440a85f61ade6b6dfde9450bafe82ade9c29e7f4f36",
    "fields": {
        "model": {"source": "pvc://data/model"},
        "dataset": {
            "source": "pvc://data/train.jsonl",
            "format": "auto",
            "trainSplit": "train",
            "evalSplit": None,
            "evalFraction": 0.05,
        },
        "adapter": {
            "method": "lora",
            "rank": 16,
            "alpha": 32.0,
            "dropout": 0.0,
            "targetModules": ["all-linear"],
        },
        "quantization": {"scheme": "nf4", "blockSize": 64, "doubleQuantization": True},
        "training": {
            "epochs": 1,
            "maxSteps": None,
            "globalBatchTokens": 8192,
            "maxSequenceLength": 1024,
            "packing": True,
            "overlong": "truncate",
            "learningRate": 0.0002,
            "schedule": "cosine",
            "warmupRatio": 0.03,
            "weightDecay": 0.0,
            "maxGradNorm": 1.0,
            "computeDtype": "auto",
            "seed": 0,
        },
        "evaluation": {"everySteps": None, "requireImprovement": True},
    },
}
"""Of a_run(), byte for byte what that release wrote."""


def finish(folder: Path, weights: bytes = b"weights") -> None:
    """Leave an adapter and a report, as the trainer of release 0.1.0 does."""
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_model.safetensors").write_bytes(weights)
    digests = {"adapter_model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    (folder / "adapter/manifest.json").write_text(json.dumps({"step": 9, "files": digests}))
    (folder / "training_report.json").write_text(json.dumps({"steps": 3}))


@pytest.mark.parametrize("workspace", ["pvc://team/qlora", "pvc://team/qlora/"])
def test_a_jobs_folder_is_in_its_workspace(workspace: str) -> None:
    """A slash at the end of the workspace changes nothing."""
    assert job_folder.job_path(workspace, "demo", {}) == Path("/volumes/team/qlora/jobs/demo")
    assert job_folder.job_uri(a_run(workspace=workspace), "logs") == "pvc://team/qlora/jobs/smollm2/logs"
    assert job_folder.adapter_uri(a_run(workspace=workspace)) == "pvc://team/qlora/jobs/smollm2/adapter"


def test_a_folder_without_a_mark_belongs_to_nobody_yet(tmp_path: Path) -> None:
    """Whoever begins a job in it writes the mark, and is recognised by it afterwards."""
    assert not job_folder.has_identity(tmp_path, a_run())
    (tmp_path / "identity.json").write_text(job_folder.identity_text(a_run()))

    assert job_folder.has_identity(tmp_path, a_run())


def test_a_folder_of_the_release_before_is_recognised(tmp_path: Path) -> None:
    """A job that was begun by release 0.1.0, which wrote every default, goes on after an upgrade."""
    (tmp_path / "identity.json").write_text(json.dumps(IDENTITY_OF_RELEASE_0_1_0))

    assert job_folder.has_identity(tmp_path, a_run())
    with pytest.raises(IdentityError, match=r"another spec \(adapter.rank: 16, now 8\);"):
        job_folder.has_identity(tmp_path, a_run(adapter={"rank": 8}))


def test_the_folder_of_another_spec_is_refused_with_what_differs(tmp_path: Path) -> None:
    """Its results would be taken for this spec's."""
    (tmp_path / "identity.json").write_text(job_folder.identity_text(a_run()))

    with pytest.raises(IdentityError, match=r"another spec \(training.seed: 0, now 1\); choose another"):
        job_folder.has_identity(tmp_path, a_run(training={"epochs": 1, "seed": 1}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"hash": "x"}',
        '{"hash": "x", "fields": null}',
        '{"hash": "x", "fields": {"model": {}}}',
    ],
)
def test_a_damaged_mark_is_told_apart(tmp_path: Path, text: str) -> None:
    """It may be this spec's or another's: only the user can say."""
    (tmp_path / "identity.json").write_text(text)

    with pytest.raises(DamagedIdentityError, match=r"identity.json is damaged; remove .* to start over"):
        job_folder.has_identity(tmp_path, a_run())


def test_a_job_is_finished_once_its_adapter_is_complete_and_reported(tmp_path: Path) -> None:
    """The report is what its readers want."""
    assert job_folder.finished_report(tmp_path) is None
    finish(tmp_path)

    assert job_folder.finished_report(tmp_path) == {"steps": 3}


def test_a_damaged_adapter_is_not_finished(tmp_path: Path) -> None:
    """Bytes that are not those of the manifest are no verified adapter."""
    finish(tmp_path, b"weighty")

    assert job_folder.finished_report(tmp_path) is None


@pytest.mark.parametrize("text", [None, "", "{", "[]"])
def test_an_adapter_without_its_report_is_not_finished(tmp_path: Path, text: str | None) -> None:
    """The report is written last: a job that was killed before it goes on from its last checkpoint."""
    finish(tmp_path)
    (tmp_path / "training_report.json").unlink()
    if text is not None:
        (tmp_path / "training_report.json").write_text(text)

    assert job_folder.finished_report(tmp_path) is None


def test_a_manifest_is_read_whole(tmp_path: Path) -> None:
    """What else its writer put in is given back."""
    finish(tmp_path)

    manifest = job_folder.read_manifest(tmp_path / "adapter")
    assert manifest is not None
    assert manifest["step"] == 9
    assert list(manifest["files"]) == ["adapter_model.safetensors"]


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "{}"),
        *('{"files": null}', '{"files": ["file"]}', '{"files": {"file": 1}}', '{"files": {"gone": "x"}}'),
    ],
)
def test_a_damaged_manifest_is_none(tmp_path: Path, content: str) -> None:
    """Whatever stands in it, the folder counts as incomplete."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "manifest.json").write_text(content)

    assert job_folder.read_manifest(tmp_path) is None


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_training_is_made_longer_where_the_learning_rate_allows_it(schedule: str, tmp_path: Path) -> None:
    """Its folder is then to be marked anew; else it is refused, with the way."""
    short, long = (a_run(training={"epochs": count, "schedule": schedule}) for count in (1, 2))
    (tmp_path / job_folder.IDENTITY).write_text(job_folder.identity_text(short))

    assert job_folder.has_identity(tmp_path, short)
    if schedule == "constant":
        assert not job_folder.has_identity(tmp_path, long)
        return
    with pytest.raises(
        IdentityError, match=r"training.epochs: 1, now 2.*only with training.schedule constant"
    ):
        job_folder.has_identity(tmp_path, long)
