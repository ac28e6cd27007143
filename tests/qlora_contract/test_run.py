"""RunConfig: what it accepts, refuses and keeps."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qlora_contract import run
from qlora_contract.run import Fetched, Layout, RunConfig, Training

MINIMAL: dict[str, Any] = {
    "version": 1,
    "job": {"name": "demo", "uid": "0f", "attempt": 1},
    "workspace": "pvc://team/qlora",
    "model": {"source": "pvc://team/model"},
    "dataset": {"source": "pvc://team/docs.jsonl"},
    "training": {"epochs": 1},
    "layout": {"memoryPerRank": 2**30},
    "isa": "avx2",
}


def changed(path: str, value: Any) -> str:
    """The JSON of MINIMAL with one field, by its dotted path, set; None: removed."""
    fields = json.loads(json.dumps(MINIMAL))
    *parents, last = path.split(".")
    parent = fields
    for name in parents:
        parent = parent.setdefault(name, {})
    if value is None:
        del parent[last]
    else:
        parent[last] = value
    return json.dumps(fields)


def parsed(path: str, value: Any) -> RunConfig:
    """RunConfig of MINIMAL with one field set."""
    return RunConfig.model_validate_json(changed(path, value))


def test_defaults_are_those_of_the_api() -> None:
    """A minimal file gets the documented defaults."""
    config = RunConfig.model_validate_json(json.dumps(MINIMAL))

    assert (config.adapter.rank, config.adapter.alpha, config.adapter.target_modules) == (
        16,
        32,
        ["all-linear"],
    )
    assert (config.quantization.scheme, config.quantization.double_quantization) == ("nf4", True)
    assert (config.training.global_batch_tokens, config.training.max_sequence_length) == (8192, 1024)
    assert (config.training.learning_rate, config.training.warmup_ratio) == (2e-4, 0.03)
    assert (config.checkpoint.every_seconds, config.checkpoint.keep) == (600, 2)
    assert (config.distributed.timeout_seconds, config.distributed.rendezvous_timeout_seconds) == (300, 1800)
    assert (config.layout.world_size, config.layout.cpus_per_rank, config.layout.pinning) == (1, 4, "strict")
    assert config.evaluation.require_improvement
    assert config.termination_grace_period_seconds == 300
    assert (config.stage, config.fetched) == ("train", Fetched())
    assert (config.model.revision, config.dataset.revision) == ("main", "main")
    assert (config.output.destination, config.output.credentials_secret) == (None, None)


def test_json_survives_the_round_trip() -> None:
    """What is written is camelCase and is read back as the same."""
    config = parsed("training.microBatchTokens", 512)

    assert '"microBatchTokens": 512' in config.to_json()
    assert RunConfig.model_validate_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param("version", 2, id="another version"),
        pytest.param("extra", 1, id="unknown field"),
        pytest.param("training.learningrate", 1e-4, id="misspelt field"),
        pytest.param("adapter.rank", "16", id="number as text"),
        pytest.param("adapter.rank", 0, id="rank 0"),
        pytest.param("adapter.rank", 16.5, id="fractional rank"),
        pytest.param("adapter.dropout", 1.0, id="everything dropped"),
        pytest.param("adapter.targetModules", [], id="nothing to adapt"),
        pytest.param("training.learningRate", 0, id="no learning"),
        pytest.param("training.maxSteps", 10, id="epochs and steps"),
        pytest.param("training.globalBatchTokens", 512, id="a bin larger than a step"),
        pytest.param("training.schedule", "polynomial", id="unknown schedule"),
        pytest.param("training.seed", 2**32, id="seed beyond 32 bits"),
        pytest.param("dataset.evalFraction", 0.9, id="too much held out"),
        pytest.param("dataset.trainSplit", "../x", id="a split that is a path"),
        pytest.param("model.source", "/models/x", id="a path"),
        pytest.param("model.source", "pvc://../x", id="a claim that is a path"),
        pytest.param("model.source", "hf://name", id="a model without an organisation"),
        pytest.param("model.source", "hf://datasets/org/name", id="a dataset as model"),
        pytest.param("model.source", "https://hub.example/org/name", id="a model of the web"),
        pytest.param("dataset.source", "hf://org/name", id="a model as dataset"),
        pytest.param("workspace", "s3://bucket/work", id="a workspace in a bucket"),
        pytest.param("output.destination", "pvc://team/out", id="a destination on a claim"),
        pytest.param("model.revision", "-x", id="a revision that is an option"),
        pytest.param("model.credentialsSecret", "a/b", id="a Secret that is a path"),
        pytest.param("fetched.model", "c" * 129, id="a revision that is too long"),
        pytest.param("fetched.model", "", id="a revision without a name"),
        pytest.param("fetched.model", "../../other", id="a revision that is a path"),
        pytest.param("fetched.dataset", "..", id="a revision that climbs"),
        pytest.param("stage", "upload", id="unknown stage"),
        pytest.param("layout.memoryPerRank", None, id="no memory"),
        pytest.param("layout.pods", 0, id="no pods"),
        pytest.param("isa", "sse2", id="unknown tier"),
        pytest.param("job.uid", "", id="empty uid"),
        pytest.param("terminationGracePeriodSeconds", 0, id="no grace"),
    ],
)
def test_what_is_wrong_is_refused(path: str, value: Any) -> None:
    """A wrong value is refused, and MINIMAL is right but for it."""
    RunConfig.model_validate_json(json.dumps(MINIMAL))
    with pytest.raises(ValidationError):
        parsed(path, value)


def test_steps_or_epochs_must_be_given() -> None:
    """A training without an end is refused."""
    with pytest.raises(ValidationError, match="exactly one of epochs and maxSteps"):
        Training()


def test_the_world_is_pods_times_ranks() -> None:
    """worldSize counts the ranks of all pods."""
    assert Layout(pods=3, ranks_per_pod=4, memory_per_rank=1).world_size == 12


def test_a_layout_is_settled_by_the_launchers() -> None:
    """With `auto` a pod's memory and CPUs are shared by as many ranks as the fullest pod has."""
    asked = Layout(pods=3, ranks_per_pod="auto", cpus_per_rank=9, memory_per_rank=100)
    found = asked.settled([4, 2, 2])

    assert asked.pod_cpus == 9
    assert (found.world_size, found.ranks_per_pod, found.cpus_per_rank, found.memory_per_rank) == (
        8,
        4,
        2,
        25,
    )
    with pytest.raises(ValueError, match="the launchers settle the number of ranks"):
        _ = asked.world_size


def test_a_layout_of_given_ranks_is_settled() -> None:
    """What the launchers tell one another changes nothing."""
    asked = Layout(pods=2, ranks_per_pod=3, cpus_per_rank=2, memory_per_rank=100)

    assert asked.settled([3, 3]) == asked
    assert asked.pod_cpus == 6


def hash_of(config: RunConfig) -> str:
    """The hash that identifies what a job folder holds."""
    return run.config_hash(run.run_shaping_fields(config))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.microBatchTokens", 4096),
        ("training.gradientCheckpointing", "full"),
        ("layout.pods", 2),
        ("layout.memoryPerRank", 2**40),
        ("checkpoint.keep", 5),
        ("distributed.timeoutSeconds", 60),
        ("isa", "amx_bf16"),
        ("job.attempt", 9),
        ("adapter.rank", 16),
        ("output.destination", "s3://bucket/out"),
        ("stage", "fetch"),
        ("fetched", {"model": "c0ffee"}),
        ("model.credentialsSecret", "hub"),
        ("model.revision", "main"),
    ],
)
def test_what_does_not_shape_the_result_keeps_the_hash(path: str, value: Any) -> None:
    """Memory knobs, layout, and defaults that are written out leave a job's identity alone."""
    assert hash_of(parsed(path, value)) == hash_of(parsed("isa", "avx2"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.source", "pvc://team/other"),
        ("model.source", "hf://org/model"),
        ("dataset.evalFraction", 0.1),
        ("adapter.rank", 8),
        ("quantization.scheme", "none"),
        ("training.seed", 1),
        ("training.epochs", 2),
        ("evaluation.requireImprovement", False),
    ],
)
def test_what_shapes_the_result_changes_the_hash(path: str, value: Any) -> None:
    """Model, data, adapter, quantisation, training and evaluation identify a job."""
    assert hash_of(parsed(path, value)) != hash_of(parsed("isa", "avx2"))


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.booleans()), min_size=2))
def test_the_hash_does_not_depend_on_the_order_of_fields(fields: dict[str, Any]) -> None:
    """Equal fields in another order have the same hash."""
    assert run.config_hash(fields) == run.config_hash(dict(reversed(fields.items())))


# --- remote sources

REMOTE = {
    **MINIMAL,
    "model": {"source": "hf://org/model"},
    "dataset": {"source": "hf://datasets/org/data/train.jsonl"},
}
COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"


def remote(**fields: Any) -> RunConfig:
    """RunConfig of REMOTE with fields set."""
    return RunConfig.model_validate_json(json.dumps({**REMOTE, **fields}))


def test_what_lies_on_a_claim_is_read_where_it_is() -> None:
    """A source that needs no fetch is its own place, whatever else was fetched."""
    config = parsed("fetched", {"model": "c0ffee"})

    assert (config.model_uri, config.dataset_uri) == ("pvc://team/model", "pvc://team/docs.jsonl")


def test_what_was_fetched_is_read_from_the_workspace() -> None:
    """The place of a remote source has the revision that the fetch found."""
    config = remote(fetched={"model": COMMIT, "dataset": "d0"})

    assert config.model_uri == f"pvc://team/qlora/sources/hf/org/model/{COMMIT}"
    assert config.dataset_uri == "pvc://team/qlora/sources/hf/datasets/org/data/d0/train.jsonl"


@pytest.mark.parametrize(
    ("name", "uri"), [("model_uri", "hf://org/model"), ("dataset_uri", "hf://datasets/org")]
)
def test_what_was_not_fetched_has_no_place(name: str, uri: str) -> None:
    """Ranks never train on whatever lies where a source would be."""
    with pytest.raises(ValueError, match=f"{uri}.* was not fetched"):
        getattr(remote(), name)


@pytest.mark.parametrize(
    ("revision", "same"),
    [("main", True), ("v1", False)],
    ids=["the default, written out", "another"],
)
def test_the_revision_of_the_hub_identifies_a_job(revision: str, same: bool) -> None:
    """The branch, tag or commit that was asked for shapes the result; what it stood for is kept elsewhere."""
    for part in ("model", "dataset"):
        asked = remote(**{part: {**REMOTE[part], "revision": revision}})
        assert (hash_of(asked) == hash_of(remote(fetched={"model": COMMIT}))) == same


def test_credentials_do_not_identify_a_job() -> None:
    """A Secret of another name fetches the same bytes."""
    for part in ("model", "dataset"):
        assert hash_of(remote(**{part: {**REMOTE[part], "credentialsSecret": "hub"}})) == hash_of(remote())


def test_the_identity_of_jobs_on_claims_is_as_it_was() -> None:
    """What a workspace holds of releases that knew no remote sources is still the same job's."""
    fields = run.run_shaping_fields(parsed("isa", "avx2"))

    assert set(fields["model"]) == {"source"}
    assert set(fields["dataset"]) == {"source", "format", "trainSplit", "evalSplit", "evalFraction"}
