"""The RunConfig of a job."""

from collections.abc import Callable

from qlora_contract.run import Fetched, Output, RunConfig
from qlora_operator.api.types import QLoRAJob
from qlora_operator.desired.run_config import run_config

EMBEDDED = (
    "model",
    "dataset",
    "adapter",
    "quantization",
    "training",
    "evaluation",
    "checkpoint",
    "output",
    "distributed",
)


def test_every_setting_of_the_job_reaches_the_ranks(a_job: Callable[..., QLoRAJob]) -> None:
    """Settings are taken over as they stand, the topology with its memory in bytes."""
    job = a_job(
        adapter={"rank": 4},
        training={"maxSteps": 7, "seed": 3},
        output={"destination": "s3://bucket/adapters"},
        topology={"pods": 2, "ranksPerPod": 3, "memoryPerRank": "1500M"},
        terminationGracePeriodSeconds=40,
    )
    run = run_config(job, uid="u-1", attempt=2, isa="avx512")

    assert [getattr(run, name) for name in EMBEDDED] == [getattr(job.spec, name) for name in EMBEDDED]
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
    run = run_config(a_job(), uid="u", attempt=0, isa="avx2")

    assert RunConfig.model_validate_json(run.to_json()) == run


def test_no_field_of_the_run_is_left_to_its_default(a_job: Callable[..., QLoRAJob]) -> None:
    """A field that is added to RunConfig must be filled from the job."""
    run = run_config(a_job(), uid="u", attempt=0, isa="avx2")

    assert set(RunConfig.model_fields) - run.model_fields_set == {"version"}


def test_ranks_read_what_the_fetch_has_put_there(a_job: Callable[..., QLoRAJob]) -> None:
    """Remote sources are read from the workspace, in a folder of the revision that the fetch found."""
    job = a_job(
        workspace="pvc://team/work",
        model={"source": "hf://org/model"},
        dataset={"source": "s3://bucket/a/data.jsonl"},
    )
    known = Fetched(model="c" * 40, dataset="d" * 64)
    run = run_config(job, uid="u", attempt=1, isa="avx2", fetched=known)

    assert (run.stage, run.fetched) == ("train", known)
    assert run.model_uri == f"pvc://team/work/sources/hf/org/model/{'c' * 40}"
    assert run.dataset_uri == f"pvc://team/work/sources/s3/bucket/{'d' * 64}/a/data.jsonl"


def test_by_default_nothing_was_fetched_and_nothing_needs_it(a_job: Callable[..., QLoRAJob]) -> None:
    """A job on claims alone trains on them as they are."""
    run = run_config(a_job(), uid="u", attempt=0, isa="avx2")

    assert (run.stage, run.fetched, run.output) == ("train", Fetched(), Output())
    assert (run.model_uri, run.dataset_uri) == ("pvc://team/model", "pvc://team/data.jsonl")
