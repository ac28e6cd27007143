"""RunConfig: what it accepts, refuses and keeps."""

import hashlib
import json
from typing import Any

import pytest
from pydantic import ValidationError

from builders import OMIT, changed, run_fields
from qlora_contract import run_config
from qlora_contract.run_config import (
    RUN_CONFIG_VERSION,
    RUN_CONFIG_VERSIONS,
    Layout,
    ResolvedRevisions,
    RunConfig,
    Training,
    newer_than,
    oldest_version,
)

MINIMAL = run_fields(
    version=1,
    workspace="pvc://team/qlora",
    model={"source": "pvc://team/model"},
    dataset={"source": "pvc://team/docs.jsonl"},
)


def parsed(path: str, value: Any) -> RunConfig:
    """RunConfig of MINIMAL with one field, by its dotted path, set; None: removed."""
    fields = changed(MINIMAL, {path: OMIT if value is None else value})
    return RunConfig.model_validate_json(json.dumps(fields))


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
    assert (config.stage, config.fetched) == ("train", ResolvedRevisions())
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
        pytest.param("version", 3, id="another version"),
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
    found = asked.with_rank_counts([4, 2, 2])

    assert asked.pod_cpus == 9
    assert (found.world_size, found.ranks_per_pod, found.cpus_per_rank, found.memory_per_rank) == (
        8,
        4,
        2,
        25,
    )
    with pytest.raises(ValueError, match="the launchers have not yet agreed on the number of ranks"):
        _ = asked.world_size


def test_a_layout_of_given_ranks_is_settled() -> None:
    """What the launchers tell one another changes nothing."""
    asked = Layout(pods=2, ranks_per_pod=3, cpus_per_rank=2, memory_per_rank=100)

    assert asked.with_rank_counts([3, 3]) == asked
    assert asked.pod_cpus == 6


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

    assert (config.model_uri, config.dataset_uris[0]) == ("pvc://team/model", "pvc://team/docs.jsonl")


def test_what_was_fetched_is_read_from_the_workspace() -> None:
    """The place of a remote source has the revision that the fetch found."""
    config = remote(fetched={"model": COMMIT, "dataset": "d0"})

    assert config.model_uri == f"pvc://team/qlora/sources/hf/org/model/{COMMIT}"
    assert config.dataset_uris[0] == "pvc://team/qlora/sources/hf/datasets/org/data/d0/train.jsonl"


@pytest.mark.parametrize(
    ("name", "uri"), [("model_uri", "hf://org/model"), ("dataset_uris", "hf://datasets/org")]
)
def test_what_was_not_fetched_has_no_place(name: str, uri: str) -> None:
    """Ranks never train on whatever lies where a source would be."""
    with pytest.raises(ValueError, match=f"{uri}.* was not fetched"):
        getattr(remote(), name)


# --- versions


@pytest.mark.parametrize("version", RUN_CONFIG_VERSIONS)
def test_defaults_are_left_out_of_the_text(version: int) -> None:
    """What a job does not set does not stand in run.json: a later release's field is in none that does not use it."""
    fields = {**MINIMAL, "version": version}
    written_out = {**fields, "adapter": {"rank": 16, "method": "lora"}, "stage": "train"}

    assert json.loads(RunConfig.model_validate(written_out).to_json()) == fields


def test_the_text_keeps_its_version() -> None:
    """A run is written for the image that reads it."""
    texts = [RunConfig.model_validate({**MINIMAL, "version": version}).to_json() for version in (1, 2)]

    assert [json.loads(text)["version"] for text in texts] == [1, 2]


def test_an_operator_writes_its_own_version_and_the_one_before() -> None:
    """An upgrade by one release strands no job."""
    assert RUN_CONFIG_VERSIONS == (RUN_CONFIG_VERSION - 1, RUN_CONFIG_VERSION)


SINCE = {
    "adapter.rank": 2,
    "dataset.chatTemplateKwargs": 2,
    "quantization.scheme=none": 2,
    "training.schedule=linear": 2,
}


@pytest.mark.parametrize(
    ("fields", "newer"),
    [
        ({}, []),
        ({"adapter": {"rank": 16}}, []),
        ({"adapter": {"rank": 8}}, ["adapter.rank"]),
        (
            {"dataset": {"source": "pvc://c/d", "chatTemplateKwargs": {"a": "1"}}},
            ["dataset.chatTemplateKwargs"],
        ),
        ({"quantization": {"scheme": "none"}}, ["quantization.scheme=none"]),
        ({"quantization": {"scheme": "nf4"}, "training": {"epochs": 1, "schedule": "constant"}}, []),
    ],
    ids=["nothing set", "a default", "a field", "a map", "a value", "other values"],
)
def test_what_a_version_lacks_is_named(
    fields: dict[str, Any], newer: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field, or a value of one, that came with a later version is what a trainer of an earlier one does not know."""
    monkeypatch.setattr(run_config, "SINCE", SINCE)
    run = RunConfig.model_validate({**MINIMAL, **fields})

    assert newer_than(run, 1) == newer
    assert newer_than(run, 2) == []
    assert oldest_version(run) == (2 if newer else 1)


def shape(schema: Any, classes: dict[str, Any]) -> Any:
    """A JSON schema without words and names of classes: what a reader of the JSON can see."""
    if isinstance(schema, list):
        return [shape(item, classes) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        schema = {**classes[schema["$ref"].rpartition("/")[2]], **schema}
    return {
        key: shape(value, classes)
        for key, value in schema.items()
        if key not in ("$ref", "$defs") and not (key in ("title", "description") and isinstance(value, str))
    }


PINNED = {2: "c0ebd4a897cef357"}
"""Version of run.json -> hash over its schema."""


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        ({"evalFraction": 0.1}, "exactly one of source and sources"),
        ({"source": "pvc://c/d", "sources": [{"source": "pvc://c/e"}]}, "exactly one of source and sources"),
        (
            {"sources": [{"source": "pvc://c/e"}], "trainSplit": "sft", "format": "chat"},
            "with sources, format and trainSplit must be given for each",
        ),
    ],
)
def test_data_are_one_source_or_several(dataset: dict[str, Any], why: str) -> None:
    """A rank refuses what an operator would not write."""
    with pytest.raises(ValidationError, match=why):
        RunConfig.model_validate_json(json.dumps({**MINIMAL, "dataset": dataset}))


def test_another_schema_is_another_version() -> None:
    """Trainer images of this version are in use, and fail a job whose run.json they do not understand."""
    schema = RunConfig.model_json_schema(by_alias=True)
    text = json.dumps(shape(schema, schema["$defs"]), sort_keys=True)
    found = hashlib.sha256(text.encode()).hexdigest()[:16]

    assert found == PINNED.get(RUN_CONFIG_VERSION), (
        f"run.json's schema is no longer that of version {RUN_CONFIG_VERSION}. If a release has been made since that "
        "version came, raise RUN_CONFIG_VERSION, keep the version before it in RUN_CONFIG_VERSIONS, name the new "
        f"fields and values in SINCE, and add the new version with {found!r} to PINNED. If not, or if every release "
        f"reads what every other writes, as with a wider bound, put {found!r} here"
    )
