"""What a job goes through: which stage is next, and in what words."""

from collections.abc import Callable
from typing import Any

import pytest

from qlora_contract.progress import ProgressReport
from qlora_contract.run_config import ResolvedRevisions, RunStage
from qlora_operator.api.names import Reason
from qlora_operator.api.status import QLoRAJobStatus
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.status import stages

MODEL = {"model": {"source": "hf://org/model"}}
DATA = {"dataset": {"source": "s3://bucket/data.jsonl"}}
FORMATS = {"formats": ["merged", "gguf"]}
EXPORTS = {"output": FORMATS}
OUT = {"output": {"destination": "s3://bucket/adapters"}}
ALL = {**MODEL, **DATA, **OUT}
MIX = {
    "dataset": {
        "source": None,
        "sources": [{"source": "s3://bucket/a"}, {"source": "pvc://team/b"}, {"source": "s3://bucket/c"}],
    }
}
TUNED = {"adapter": {"initialAdapter": "hf://org/tuned"}}
ADAPTER = {"adapter": {"uri": "pvc://team/work/jobs/job/adapter"}}


def known(model: str | None = None, dataset: str | None = None, **status: Any) -> dict[str, Any]:
    """A status with these revisions."""
    return {"provenance": {"modelRevision": model, "datasetRevision": dataset}, **status}


STAGES: dict[str, tuple[dict[str, Any], dict[str, Any], RunStage]] = {
    "all on claims": ({}, {}, "train"),
    "all on claims, and a destination": (OUT, {}, "train"),
    "a model to fetch": (MODEL, {}, "fetch"),
    "data to fetch": (DATA, {}, "fetch"),
    "both to fetch": (ALL, {}, "fetch"),
    "a first attempt that told nothing": (MODEL, {"provenance": {"seed": 0}}, "fetch"),
    "only the data was fetched": (ALL, known(dataset="d"), "fetch"),
    "only the model was fetched": (ALL, known(model="m"), "fetch"),
    "the model was fetched, and the data lies on a claim": (MODEL, known(model="m"), "train"),
    "both were fetched": (ALL, known("m", "d"), "train"),
    "several sources, of which two are to be fetched": (MIX, {}, "fetch"),
    "one of two was fetched": (MIX, {"provenance": {"datasetRevisions": ["d", "", ""]}}, "fetch"),
    "all that is remote was fetched": (MIX, {"provenance": {"datasetRevisions": ["d", "", "e"]}}, "train"),
    "an adapter to fetch that training goes on from": (TUNED, {}, "fetch"),
    "it was fetched": (TUNED, {"provenance": {"initialAdapterRevision": "a"}}, "train"),
    "the model was fetched, and it was not": ({**MODEL, **TUNED}, known("m"), "fetch"),
    "trained": ({**DATA, **OUT}, known(dataset="d", **ADAPTER), "publish"),
    "trained on claims": (OUT, ADAPTER, "publish"),
    "trained, and other formats are wanted": (EXPORTS, ADAPTER, "export"),
    "one of them is made": (EXPORTS, {"adapter": {**ADAPTER["adapter"], "exports": ["merged"]}}, "export"),
    "they are made": (
        {"output": {**OUT["output"], **FORMATS}},
        {"adapter": {**ADAPTER["adapter"], "exports": ["merged", "gguf-q8_0"]}},
        "publish",
    ),
}


@pytest.mark.parametrize(("spec", "status", "stage"), STAGES.values(), ids=STAGES)
def test_next_stage(
    make_job: Callable[..., QLoRAJob], spec: dict[str, Any], status: dict[str, Any], stage: RunStage
) -> None:
    """First what is remote and not known by its revision, then the ranks, then the destination."""
    assert stages.next_stage(make_job(**spec).spec, QLoRAJobStatus.model_validate(status)) == stage


@pytest.mark.parametrize(
    ("status", "fetched"),
    [
        ({}, ResolvedRevisions()),
        (known("m"), ResolvedRevisions(model="m")),
        (known("m", "d"), ResolvedRevisions(model="m", dataset="d")),
        ({"provenance": {"datasetRevisions": ["d", ""]}}, ResolvedRevisions(sources=["d", ""])),
        ({"provenance": {"initialAdapterRevision": "a"}}, ResolvedRevisions(adapter="a")),
    ],
    ids=["nothing known", "the model", "both", "several", "the initial adapter"],
)
def test_fetched(status: dict[str, Any], fetched: ResolvedRevisions) -> None:
    """What the sources stood for is kept as the provenance of the adapter."""
    assert stages.fetched(QLoRAJobStatus.model_validate(status)) == fetched


@pytest.mark.parametrize(
    ("spec", "stage", "words"),
    [
        (ALL, "train", "starts"),
        (MODEL, "fetch", "fetches hf://org/model"),
        (DATA, "fetch", "fetches s3://bucket/data.jsonl"),
        (ALL, "fetch", "fetches hf://org/model and s3://bucket/data.jsonl"),
        (EXPORTS, "export", "makes merged, gguf-q8_0 of the adapter"),
        (ALL, "publish", "sends the adapter to s3://bucket/adapters"),
        (MIX, "fetch", "fetches s3://bucket/a and s3://bucket/c"),
        ({**MODEL, **MIX}, "fetch", "fetches hf://org/model and 2 more sources"),
    ],
    ids=["ranks", "a model", "data", "both", "formats", "the adapter", "two of three", "many"],
)
def test_an_attempt_is_described_by_what_it_does(
    make_job: Callable[..., QLoRAJob], spec: dict[str, Any], stage: RunStage, words: str
) -> None:
    """People read what an attempt is about, with the URIs that they wrote."""
    assert stages.describe(make_job(**spec).spec, stage) == words


def test_every_stage_runs_in_its_own_words() -> None:
    """An attempt that is up, and has not told of itself yet, is in its stage's first state."""
    assert stages.RUNNING == {
        "fetch": Reason.FETCHING,
        "train": Reason.LOADING,
        "export": Reason.EXPORTING,
        "publish": Reason.UPLOADING,
    }


def told(done: int | None, total: int | None) -> ProgressReport:
    """A report of so many bytes."""
    return ProgressReport(
        job_uid="u",
        attempt=0,
        stage="Fetching",
        step=0,
        total_steps=0,
        epoch=0.0,
        bytes_done=done,
        bytes_total=total,
        updated_time="2026-01-31T12:00:00Z",
    )


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (None, ""),
        (told(None, None), ""),
        (told(5, None), ""),
        (told(None, 5), ""),
        (told(0, 0), ""),
        (told(0, 700), ": 0 of 700 bytes"),
        (told(512, 2048), ": 0.50 of 2.00 KiB"),
        (told(3 * 2**19, 10 * 2**20), ": 1.50 of 10.0 MiB"),
        (told(1234 * 2**20, 7577 * 2**20), ": 1.21 of 7.40 GiB"),
        (told(1023 * 2**20, 1023 * 2**20), ": 1023 of 1023 MiB"),
        (told(2**40, 2**40), ": 1.00 of 1.00 TiB"),
    ],
    ids=[
        "nobody asked",
        "not known yet",
        "no total",
        "nothing done",
        "nothing to do",
        "bytes",
        "KiB",
        "MiB",
        "GiB",
        "almost a GiB",
        "TiB",
    ],
)
def test_bytes_of_a_transfer_share_a_unit(report: ProgressReport | None, words: str) -> None:
    """Both numbers have the total's unit, and three digits."""
    assert stages.bytes_transferred(report) == words
