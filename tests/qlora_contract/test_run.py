"""RunConfig: what it accepts, refuses and keeps."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qlora_contract import run
from qlora_contract.run import Layout, RunConfig, Training

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
    ],
)
def test_what_does_not_shape_the_result_keeps_the_hash(path: str, value: Any) -> None:
    """Memory knobs, layout, and defaults that are written out leave a job's identity alone."""
    assert hash_of(parsed(path, value)) == hash_of(parsed("isa", "avx2"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.source", "pvc://team/other"),
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
