"""training_report.json."""

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builders import a_run
from qlora_contract.identity import identity_fields, identity_hash
from qlora_contract.run_config import ResolvedRevisions
from qlora_trainer.artifacts.checkpoint import LoopState
from qlora_trainer.artifacts.training_report import license_of, training_report
from qlora_trainer.data.packing import StepSchedule

pytestmark = pytest.mark.process

RUN = a_run(
    job={"attempt": 5},
    training={"epochs": 2, "globalBatchTokens": 64, "maxSequenceLength": 32, "seed": 9},
    layout={"pods": 2, "ranksPerPod": 2},
    isa="avx512",
)


def made(ranks: list[dict[str, Any]], **state: Any) -> dict[str, Any]:
    """The report of a job that is at some state."""
    schedule = StepSchedule(np.full(16, 16), RUN.training)
    return training_report(RUN, schedule, LoopState(**state), "fp32", 1.25, ranks)


def test_the_report_has_the_documented_keys() -> None:
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


def test_the_provenance_says_what_the_adapter_was_made_from() -> None:
    """Sources, the data's digest, the seed, the spec's hash and the versions are in the provenance."""
    provenance = made([{"peak_memory_bytes": 1}], dataset_sha256="ab")["provenance"]

    assert provenance["model_source"] == "pvc://data/model"
    assert (provenance["dataset_source"], provenance["dataset_sha256"]) == ("pvc://data/train.jsonl", "ab")
    assert (provenance["seed"], provenance["job_uid"]) == (9, "u-1")
    assert provenance["config_hash"] == identity_hash(identity_fields(RUN))
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["versions"]["python"] == platform.python_version()


def test_fetched_revisions_are_in_the_provenance() -> None:
    """What the remote sources stood for; nothing for those on a claim."""
    run = RUN.model_copy(update={"fetched": ResolvedRevisions(model="c0ffee")})
    schedule = StepSchedule(np.full(16, 16), run.training)
    report = training_report(run, schedule, LoopState(), "fp32", 1.0, [{"peak_memory_bytes": 1}])

    assert report["provenance"]["model_revision"] == "c0ffee"
    assert report["provenance"]["dataset_revision"] is None


@pytest.mark.parametrize("seconds", [0.0, 1e-12])
def test_a_job_that_took_no_step_has_rates_of_zero(seconds: float) -> None:
    """A job that was resumed at its end does not divide by zero, and the report is JSON."""
    report = made([{"peak_memory_bytes": 1}], seconds=seconds)

    assert report["tokens_per_second"] == 0.0
    assert json.loads(json.dumps(report)) == report


def test_an_inexact_resume_is_reported() -> None:
    """The reasons of all attempts are in the report."""
    reason = "world_size 4 -> 2"

    assert made([{"peak_memory_bytes": 1}], not_bit_exact=reason)["not_bit_exact"] == reason


CARDS: dict[str, tuple[str, str | None]] = {
    "of the Hub's": ("---\nlicense: apache-2.0\n---\n# m", "apache-2.0"),
    "with Windows' ends of lines": ("---\r\nlicense: 'mit'\r\n---\r\n", "mit"),
    "openrail++": ("---\nlicense: openrail++\n---\n", "openrail++"),
    "with a name": (
        "---\nlicense: other\nlicense_name: house-1.0\nlicense_link: LICENSE\n---\n",
        "house-1.0",
    ),
    "with a name first": ("---\nlicense_name: house-1.0\nlicense: other\n---\n", "house-1.0"),
    "without a name": ("---\nlicense: other\n---\n", "other"),
    "a name that is not its own": ("---\nlicense: mit\nlicense_name: x\n---\n", "mit"),
    "several": ("---\nlicense:\n- mit\n- gpl\n---\n", None),
    "no metadata": ("# m\nlicense: mit\n", None),
    "no card": ("", None),
}


@pytest.mark.parametrize(("card", "expected"), CARDS.values(), ids=CARDS)
def test_the_license_is_what_the_base_s_card_states(card: str, expected: str | None, tmp_path: Path) -> None:
    """By the Hub's name, or by its own where the Hub has none."""
    if card:
        (tmp_path / "README.md").write_text(card, newline="")

    assert license_of(tmp_path) == expected
