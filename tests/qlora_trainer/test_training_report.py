"""training_report.json."""

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_contract.run import Fetched, ModelSource, RunConfig, config_hash, run_shaping_fields
from qlora_trainer.checkpoint import LoopState
from qlora_trainer.packing import Plan
from qlora_trainer.training_report import base_model, training_report

RUN = RunConfig.model_validate(
    {
        "job": {"name": "smollm2", "uid": "u-1", "attempt": 5},
        "workspace": "pvc://data/work",
        "model": {"source": "pvc://data/model"},
        "dataset": {"source": "pvc://data/train.jsonl"},
        "training": {"epochs": 2, "globalBatchTokens": 64, "maxSequenceLength": 32, "seed": 9},
        "layout": {"pods": 2, "ranksPerPod": 2, "memoryPerRank": 2**30},
        "isa": "avx512",
    }
)


def made(ranks: list[dict[str, Any]], **state: Any) -> dict[str, Any]:
    """The report of a job that is at some state."""
    plan = Plan(np.full(16, 16), RUN.training)
    return training_report(RUN, plan, LoopState(**state), "fp32", 1.25, ranks, None)


def test_it_has_the_promised_keys() -> None:
    """Losses with and without the adapter, rates, ranks and memory are there under their documented names."""
    report = made(
        [{"peak_memory_bytes": 5}, {"peak_memory_bytes": 9}],
        step=8, tokens=1000, supervised_tokens=250, seconds=10.0, base_eval_loss=2.0, base_eval_loss_quantized=2.1,
    )  # fmt: skip
    promised = {
        "base_eval_loss": 2.0,
        "base_eval_loss_quantized": 2.1,
        "eval_loss": 1.25,
        "tokens_per_second": 100.0,
        "supervised_tokens_per_second": 25.0,
        "world_size": 4,
        "peak_memory_bytes": 9,
    }

    assert promised.items() <= report.items()
    assert (report["steps"], report["epochs"], report["attempt"], report["isa"]) == (8, 2.0, 5, "avx512")


def test_it_says_what_it_was_made_from() -> None:
    """Sources, the data's digest, the seed, the spec's hash and the versions are in the provenance."""
    provenance = made([{"peak_memory_bytes": 1}], dataset_sha256="ab")["provenance"]

    assert provenance["model_source"] == "pvc://data/model"
    assert (provenance["dataset_source"], provenance["dataset_sha256"]) == ("pvc://data/train.jsonl", "ab")
    assert (provenance["seed"], provenance["job_uid"]) == (9, "u-1")
    assert provenance["config_hash"] == config_hash(run_shaping_fields(RUN))
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["versions"]["python"] == platform.python_version()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param("pvc://data/model", "/volumes/data/model", id="claim"),
        pytest.param("hf://org/name", "org/name", id="hub"),
        pytest.param("s3://team/models/name", "/volumes/data/model", id="s3"),
    ],
)
def test_the_base_is_named_so_that_it_can_be_loaded(source: str, expected: str) -> None:
    """By its name on the Hub, from where stock tools fetch it; else by its folder."""
    run = RUN.model_copy(update={"model": ModelSource(source=source)})

    assert base_model(run, Path("/volumes/data/model")) == expected


def test_fetched_revisions_are_in_the_provenance() -> None:
    """What the remote sources stood for; nothing for those on a claim."""
    run = RUN.model_copy(update={"fetched": Fetched(model="c0ffee")})
    report = training_report(
        run, Plan(np.full(16, 16), run.training), LoopState(), "fp32", 1.0, [{"peak_memory_bytes": 1}], None
    )

    assert report["provenance"]["model_revision"] == "c0ffee"
    assert report["provenance"]["dataset_revision"] is None


@pytest.mark.parametrize("seconds", [0.0, 1e-12])
def test_a_job_without_a_step_has_rates_all_the_same(seconds: float) -> None:
    """A job that was resumed at its end divides by nothing, and the report is JSON."""
    report = made([{"peak_memory_bytes": 1}], seconds=seconds)

    assert report["tokens_per_second"] == 0.0
    assert json.loads(json.dumps(report)) == report
