"""The RunConfig of a job."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

from qlora_contract import run_config as wire
from qlora_contract.identity import identity
from qlora_contract.run_config import Output, ResolvedRevisions, RunConfig
from qlora_operator.api import v1alpha1
from qlora_operator.api.rules import ApiModel
from qlora_operator.api.run_config import (
    cannot_write,
    carry_over,
    config_hash,
    initial_version,
    to_run_config,
)
from qlora_operator.api.v1alpha1 import OPERATOR_ONLY, QLoRAJob

FORMS: dict[str, tuple[type[ApiModel], type[BaseModel]]] = {
    "model": (v1alpha1.ModelSource, wire.ModelSource),
    "dataset": (v1alpha1.Dataset, wire.Dataset),
    "adapter": (v1alpha1.Adapter, wire.Adapter),
    "quantization": (v1alpha1.Quantization, wire.Quantization),
    "training": (v1alpha1.Training, wire.Training),
    "evaluation": (v1alpha1.Evaluation, wire.Evaluation),
    "checkpoint": (v1alpha1.Checkpoint, wire.Checkpoint),
    "output": (v1alpha1.Output, wire.Output),
    "tracking": (v1alpha1.Tracking, wire.Tracking),
    "distributed": (v1alpha1.Distributed, wire.Distributed),
    "topology": (v1alpha1.Topology, wire.Layout),
}
"""Sections of spec: what users write, and what ranks read."""


def test_every_setting_of_the_job_reaches_the_ranks(a_job: Callable[..., QLoRAJob]) -> None:
    """Settings are taken over as they stand, the topology with its memory in bytes."""
    job = a_job(
        adapter={"rank": 4},
        training={"maxSteps": 7, "seed": 3},
        output={"destination": "s3://bucket/adapters"},
        topology={"pods": 2, "ranksPerPod": 3, "memoryPerRank": "1500M"},
        terminationGracePeriodSeconds=40,
    )
    run = to_run_config(job, uid="u-1", attempt=2, isa="avx512")

    for name in FORMS.keys() - {"topology"}:
        assert getattr(run, name).model_dump() == getattr(job.spec, name).model_dump()
    assert (run.workspace, run.isa, run.termination_grace_period_seconds) == ("pvc://team/work", "avx512", 40)
    assert (run.job.name, run.job.namespace, run.job.uid, run.job.attempt) == ("small", "default", "u-1", 2)
    layout = run.layout
    assert (
        layout.pods,
        layout.ranks_per_pod,
        layout.cpus_per_rank,
        layout.memory_per_rank,
        layout.pinning,
    ) == (
        2,
        3,
        1,
        1_500_000_000,
        "best-effort",
    )


def test_nothing_is_lost_on_the_way(a_job: Callable[..., QLoRAJob]) -> None:
    """What the trainer reads from run.json is what was written."""
    run = to_run_config(a_job(), uid="u", attempt=0, isa="avx2")

    assert RunConfig.model_validate_json(run.to_json()) == run


def test_no_field_of_the_run_is_left_to_its_default(a_job: Callable[..., QLoRAJob]) -> None:
    """A field that is added to RunConfig must be filled from the job."""
    run = to_run_config(a_job(), uid="u", attempt=0, isa="avx2")

    assert set(RunConfig.model_fields) - run.model_fields_set == set()


def test_ranks_read_what_the_fetch_has_put_there(a_job: Callable[..., QLoRAJob]) -> None:
    """Remote sources are read from the workspace, in a folder of the revision that the fetch found."""
    job = a_job(
        workspace="pvc://team/work",
        model={"source": "hf://org/model"},
        dataset={"source": "s3://bucket/a/data.jsonl"},
    )
    known = ResolvedRevisions(model="c" * 40, dataset="d" * 64)
    run = to_run_config(job, uid="u", attempt=1, isa="avx2", fetched=known)

    assert (run.stage, run.fetched) == ("train", known)
    assert run.model_uri == f"pvc://team/work/sources/hf/org/model/{'c' * 40}"
    assert run.dataset_uris[0] == f"pvc://team/work/sources/s3/bucket/{'d' * 64}/a/data.jsonl"


def test_by_default_nothing_was_fetched_and_nothing_needs_it(a_job: Callable[..., QLoRAJob]) -> None:
    """A job on claims alone trains on them as they are."""
    run = to_run_config(a_job(), uid="u", attempt=0, isa="avx2")

    assert (run.stage, run.fetched, run.output) == ("train", ResolvedRevisions(), Output())
    assert (run.model_uri, run.dataset_uris[0]) == ("pvc://team/model", "pvc://team/data.jsonl")


# --- two forms


def bounds(form: type[BaseModel]) -> dict[str, Any]:
    """JSON name of each field -> what its schema accepts, and its default."""
    schema = form.model_json_schema(by_alias=True)["properties"]
    return {
        name: {key: value for key, value in node.items() if key not in ("title", "description")}
        for name, node in schema.items()
    }


@pytest.mark.parametrize("section", FORMS)
def test_both_forms_have_the_same_defaults_and_bounds(section: str) -> None:
    """A field means the same in both; one that is left out of run.json has the default that its user was promised."""
    written, read = map(bounds, FORMS[section])
    if section == "topology":  # memory is a quantity here and bytes there, and the launchers know the ranks
        del written["memoryPerRank"], read["memoryPerRank"], read["ranks"]
        del written["minPods"]  # an attempt's ranks know how many there are

    assert written == read


def test_every_field_of_the_spec_reaches_the_ranks_or_is_the_operators() -> None:
    """A field that a user may set does something."""
    only = {path.removeprefix("spec.").partition(".")[0] for path in OPERATOR_ONLY}
    fields = {str(info.alias) for info in v1alpha1.QLoRAJobSpec.model_fields.values()}
    carried = FORMS.keys() | {"workspace", "isa", "terminationGracePeriodSeconds", "progressDeadlineSeconds"}

    assert fields - carried == only - FORMS.keys() - {"isa"}
    assert carried - {"topology"} <= {str(info.alias) for info in RunConfig.model_fields.values()}


class RenamedAdapter(ApiModel):
    """The adapter of a version of the API in which alpha has another name."""

    method: str = "lora"
    rank: int = 16
    scale: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = ["all-linear"]  # noqa: RUF012 - pydantic copies it
    rslora: bool = False
    rank_pattern: dict[str, int] = {}  # noqa: RUF012
    alpha_pattern: dict[str, float] = {}  # noqa: RUF012
    lora_plus_ratio: float = 1.0
    initial_adapter: str | None = None
    initial_adapter_revision: str | None = None
    initial_adapter_credentials_secret: str | None = None
    num_virtual_tokens: int | None = None
    prompt_init: str = "random"
    prompt_init_text: str | None = None
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None


def test_several_sources_reach_the_ranks_each_with_its_own_settings(a_job: Callable[..., QLoRAJob]) -> None:
    """In their order, with what was fetched of each; no trainer of release 0.1.0 gets such a run.json."""
    job = a_job(
        dataset={
            "source": None,
            "sources": [
                {"source": "pvc://team/a.csv", "columns": {"prompt": "q"}, "weight": 2},
                {"source": "hf://datasets/org/b", "format": "chat", "evalSplit": "test"},
            ],
        }
    )
    run = to_run_config(job, uid="u", attempt=0, isa="avx2", fetched=ResolvedRevisions(sources=["", "beef"]))

    assert run.version == 2
    assert RunConfig.model_validate_json(run.to_json()) == run
    assert run.dataset.model_dump() == job.spec.dataset.model_dump()
    assert run.dataset_uris == ["pvc://team/a.csv", "pvc://team/work/sources/hf/datasets/org/b/beef"]
    assert [source.field for source in run.sources] == ["model", "dataset.sources[0]", "dataset.sources[1]"]


def test_a_renamed_field_of_the_api_changes_neither_run_json_nor_the_identity(
    a_job: Callable[..., QLoRAJob],
) -> None:
    """Another version of the API writes the same run.json, and its jobs find their folders."""
    run = to_run_config(a_job(adapter={"alpha": 8}), uid="u", attempt=0, isa="avx2")
    renamed = RenamedAdapter(scale=8)
    later = run.model_copy(update={"adapter": carry_over(wire.Adapter, renamed, alpha=renamed.scale)})

    assert later.to_json() == run.to_json()
    assert identity(later) == identity(run)


def test_what_a_job_does_not_set_is_not_in_its_run_json(a_job: Callable[..., QLoRAJob]) -> None:
    """A field of a later release is absent from the run.json of every job that does not use it."""
    text = to_run_config(a_job(), uid="u", attempt=0, isa="avx2").to_json()

    assert json.loads(text) == {
        "version": 1,
        "job": {"name": "small", "uid": "u", "attempt": 0},
        "workspace": "pvc://team/work",
        "model": {"source": "pvc://team/model"},
        "dataset": {"source": "pvc://team/data.jsonl"},
        "training": {"maxSteps": 1},
        "layout": {"cpusPerRank": 1, "memoryPerRank": 2**30, "pinning": "best-effort"},
        "isa": "avx2",
    }


@pytest.mark.parametrize(
    "written_out",
    [
        {"adapter": {"method": "lora"}},
        {"quantization": {"blockSize": 64}},
        {"training": {"overlong": "truncate"}},
    ],
    ids=["method", "blockSize", "overlong"],
)
def test_fields_with_one_value_are_accepted_and_say_nothing(
    written_out: dict[str, Any], a_job: Callable[..., QLoRAJob]
) -> None:
    """Files that set them stay valid, and run.json is as if they were not set."""
    plain, explicit = a_job(), a_job(**written_out)

    texts = [to_run_config(job, uid="u", attempt=0, isa="avx2").to_json() for job in (plain, explicit)]
    assert texts[0] == texts[1]
    assert config_hash(plain) == config_hash(explicit)


# --- versions


def begun(job: QLoRAJob, version: int | None) -> QLoRAJob:
    """The job after a first attempt whose image reads this version."""
    status = {"provenance": {"image": "old", "runConfigVersion": version}}
    document = job.model_dump(by_alias=True, mode="json", exclude_unset=True) | {"status": status}
    return QLoRAJob.model_validate(document)


@pytest.mark.parametrize(("fixed", "written"), [(None, 1), (1, 1), (2, 2)])
def test_a_job_gets_the_version_that_its_image_reads(
    fixed: int | None, written: int, a_job: Callable[..., QLoRAJob]
) -> None:
    """A job that has begun keeps its version; a new one gets the oldest that can say it."""
    job = begun(a_job(), fixed)

    assert cannot_write(job) is None
    assert to_run_config(job, uid="u", attempt=1, isa="avx2").version == written


def test_a_job_of_a_version_that_is_not_written_waits(a_job: Callable[..., QLoRAJob]) -> None:
    """After a rollback, or an upgrade over several releases: the reason names the versions and the way out."""
    message = cannot_write(begun(a_job(), 3))

    assert message is not None
    assert "version 3 of the RunConfig, and this operator writes versions 1 and 2" in message


def test_a_field_that_the_image_does_not_know_keeps_the_job_waiting(
    a_job: Callable[..., QLoRAJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose topology was changed while it was suspended is not started on an image that would refuse it."""
    monkeypatch.setattr(wire, "SINCE", {"layout.memoryTier=hbm": 2})
    job = a_job(topology={"memoryTier": "hbm"})

    message = cannot_write(begun(job, 1))
    assert message is not None
    assert "version 1 of the RunConfig and does not know layout.memoryTier=hbm" in message
    assert cannot_write(begun(job, 2)) is None
    assert cannot_write(begun(a_job(), 1)) is None
    assert cannot_write(job) is None
    assert (initial_version(job), initial_version(a_job())) == (2, 1)
