"""The identity of a job: what belongs to it, and what does not."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import OMIT, a_run, changed, run_fields
from qlora_contract import run_config
from qlora_contract.identity import (
    MOST_SHOWN,
    differences,
    identity,
    identity_fields,
    identity_hash,
    is_longer,
    same_identity,
)
from qlora_contract.run_config import RunConfig

MINIMAL = run_fields(
    workspace="pvc://team/qlora",
    model={"source": "pvc://team/model"},
    dataset={"source": "pvc://team/docs.jsonl"},
)


def parsed(path: str, value: Any) -> RunConfig:
    """RunConfig of MINIMAL with one field, by its dotted path, set."""
    return RunConfig.model_validate_json(json.dumps(changed(MINIMAL, {path: value})))


def hash_of(config: RunConfig) -> str:
    """The hash that identifies what a job folder holds."""
    return identity_hash(identity_fields(config))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.microBatchTokens", 4096),
        ("training.gradientCheckpointing", "full"),
        ("layout.pods", 2),
        ("layout.memoryPerRank", 2**40),
        ("evaluation.maxTokens", 1000),
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
    assert identity_hash(fields) == identity_hash(dict(reversed(fields.items())))


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
    fields = identity_fields(parsed("isa", "avx2"))

    assert set(fields["model"]) == {"source"}
    assert set(fields["dataset"]) == {"source", "format", "trainSplit", "evalSplit", "evalFraction"}


# --- other releases

HASH_OF_MINIMAL = "06d8aa826486006af87dd9e4c7f5d6dc0564c3438060800cbaeab03314368547"
"""As release 0.1.0 wrote it."""


def test_the_hash_is_that_of_every_release() -> None:
    """Folders in use are marked with it: whoever changes it refuses every one of them."""
    assert identity(parsed("isa", "avx2"))["hash"] == HASH_OF_MINIMAL


def test_a_version_of_run_json_is_not_a_part_of_the_identity() -> None:
    """A job keeps its folder when its operator and its image are upgraded."""
    assert identity(parsed("version", 1)) == identity(parsed("version", 2))


class LaterTraining(run_config.Training):
    """What a later release may add."""

    rslora: bool = False


class LaterRun(RunConfig):
    """A run of that release."""

    training: LaterTraining


@pytest.mark.parametrize(
    ("training", "same"),
    [({}, True), ({"rslora": False}, True), ({"rslora": True}, False)],
    ids=["unset", "at its default", "set"],
)
def test_a_field_that_is_added_changes_the_identity_only_when_it_is_used(
    training: dict[str, Any], same: bool
) -> None:
    """Jobs that do not use a new field keep their folders, without anything to be done for it."""
    later = LaterRun.model_validate_json(json.dumps({**MINIMAL, "training": {"epochs": 1, **training}}))

    assert (hash_of(later) == HASH_OF_MINIMAL) == same


def test_an_identity_is_compared_with_what_a_folder_holds() -> None:
    """The hash decides; a mark without one is an error."""
    mine = identity(parsed("isa", "avx2"))

    assert same_identity(json.loads(json.dumps(mine)), mine)
    assert not same_identity(identity(parsed("training.seed", 1)), mine)
    with pytest.raises(KeyError):
        same_identity({"fields": mine["fields"]}, mine)


@pytest.mark.parametrize(
    ("path", "value", "same"),
    [
        ("evaluation.requireImprovement", False, True),
        ("evaluation.everySteps", 7, True),
        ("evaluation.maxTokens", 7, True),
        ("output.destination", "s3://bucket/out", True),
        ("dataset.evalFraction", 0.1, False),
        ("training.learningRate", 0.1, False),
    ],
)
def test_what_decides_about_publishing_alone_makes_no_other_job(path: str, value: Any, same: bool) -> None:
    """Its folder is still the job's, so that nothing is trained again; held-out records are not trained on."""
    stored, mine = (identity(parsed(*change)) for change in (("isa", "avx2"), (path, value)))

    assert same_identity(json.loads(json.dumps(stored)), mine) is same
    assert same_identity(json.loads(json.dumps(mine)), stored) is same
    assert bool(differences(stored["fields"], mine["fields"])) is not same


def test_what_differs_is_named() -> None:
    """The first five fields, with both values."""
    old, new = parsed("training.seed", 1), parsed("adapter.rank", 8)

    assert (
        differences(identity_fields(old), identity_fields(new))
        == "adapter.rank: 16, now 8, training.seed: 1, now 0"
    )


def test_of_a_long_value_that_differs_the_beginning_is_shown() -> None:
    """A chat template may have thousands of characters."""
    old, new = ({"dataset": {"chatTemplate": letter * 5000}} for letter in "ab")

    assert differences(old, new) == (
        f'dataset.chatTemplate: "{"a" * (MOST_SHOWN - 1)}... (5,002 characters), now '
        f'"{"b" * (MOST_SHOWN - 1)}... (5,002 characters)'
    )


def mixed(*sources: dict[str, Any]) -> RunConfig:
    """RunConfig of several sources."""
    return RunConfig.model_validate_json(json.dumps({**MINIMAL, "dataset": {"sources": sources}}))


def test_several_sources_identify_a_job_by_order_and_weight() -> None:
    """Credentials do not, nor does what is written out though it is the default."""
    a, b = {"source": "pvc://c/a"}, {"source": "hf://datasets/org/b"}
    one = hash_of(mixed(a, b))

    assert hash_of(mixed(a | {"weight": 1.0, "format": "auto"}, b | {"credentialsSecret": "hub"})) == one
    for other in (
        mixed(b, a),
        mixed(a),
        mixed(a | {"weight": 0.5}, b),
        mixed(a, b | {"revision": "v1"}),
        mixed(a | {"trainSplit": "sft"}, b),
    ):
        assert hash_of(other) != one


@pytest.mark.parametrize(
    ("old", "new", "longer"),
    [
        ({"epochs": 1}, {"epochs": 2}, True),
        ({"epochs": OMIT, "maxSteps": 3}, {"epochs": OMIT, "maxSteps": 6}, True),
        ({"epochs": 2}, {"epochs": 1}, False),
        ({"epochs": 2}, {"epochs": 2}, False),
        ({"epochs": 1}, {"epochs": OMIT, "maxSteps": 6}, False),
        ({"epochs": 1}, {"epochs": 2, "seed": 1}, False),
    ],
)
def test_a_longer_training_is_known(old: dict[str, Any], new: dict[str, Any], longer: bool) -> None:
    """By its length alone."""
    assert is_longer(*(identity_fields(a_run(training=fields)) for fields in (old, new))) is longer
