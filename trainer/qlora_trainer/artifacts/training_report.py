"""training_report.json: what was trained, on what, how fast, and with what result."""

import platform
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from qlora_contract.identity import identity_fields, identity_hash
from qlora_contract.run_config import RunConfig
from qlora_contract.units import now
from qlora_trainer.artifacts.checkpoint import LoopState
from qlora_trainer.data.packing import StepSchedule
from qlora_trainer.quantization import kernels


def training_report(
    run: RunConfig,
    schedule: StepSchedule,
    state: LoopState,
    dtype: str,
    eval_loss: float | None,
    ranks: list[dict[str, Any]],
) -> dict[str, Any]:
    """The report. Rates are over all training steps of all attempts, without evaluations and checkpoints.

    Args:
        run: the job.
        schedule: its steps.
        state: where the loop ended.
        dtype: the compute dtype.
        eval_loss: of the reloaded adapter; None without evaluation data.
        ranks: `RankContext.rank_stats()` of every rank.
    """
    seconds = max(state.seconds, 1e-9)
    return {
        "job": run.job.name,
        "base_eval_loss": state.base_eval_loss,
        "base_eval_loss_quantized": state.base_eval_loss_quantized,
        "eval_loss": eval_loss,
        "steps": state.step,
        "total_steps": schedule.total_steps,
        "published_step": state.step if state.best_step is None else state.best_step,
        "epochs": schedule.epochs_done(state.step),
        "tokens": state.tokens,
        "supervised_tokens": state.supervised_tokens,
        "seconds": state.seconds,
        "tokens_per_second": state.tokens / seconds,
        "supervised_tokens_per_second": state.supervised_tokens / seconds,
        "world_size": run.layout.world_size,
        "isa": run.isa,
        "compute_dtype": dtype,
        "kernel": kernels.name(run.quantization.scheme),
        "peak_memory_bytes": max(rank["peak_memory_bytes"] for rank in ranks),
        "ranks": ranks,
        "attempt": run.job.attempt,
        "not_bit_exact": state.not_bit_exact,
        "finished": now(),
        "provenance": provenance(run, state),
        "configuration": configuration(run),
    }


def configuration(run: RunConfig) -> dict[str, Any]:
    """All settings of the job, defaults too, as run.json spells them. Names of Secrets are nobody's business."""
    fields = run.model_dump(mode="json", by_alias=True, exclude={"version", "stage", "job", "fetched"})
    for section in (*fields.values(), *(fields["dataset"]["sources"] or ())):
        if isinstance(section, dict):
            section.pop("credentialsSecret", None)
    return fields


def license_of(model_folder: Path) -> str | None:
    """The license that the base model's card states, as hubs name it; None without such a card.

    Of one that hubs have no name for (`license: other`) the name that the card gives it, if any.
    """
    try:
        card = (model_folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\n(.*?)\n---\n", card.replace("\r\n", "\n"), re.DOTALL)
    lines = r"""^(license|license_name): *["']?([a-z0-9.+-]+)["']? *$"""
    stated = dict(re.findall(lines, front[1] if front else "", re.MULTILINE))
    license_ = stated.get("license")
    return stated.get("license_name", license_) if license_ == "other" else license_


def provenance(run: RunConfig, state: LoopState) -> dict[str, Any]:
    """What the adapter was made from, and with which versions."""
    return {
        "model_source": run.model.source,
        "model_revision": run.fetched.model,
        "weights_sha256": state.weights_sha256,
        "initial_adapter": run.adapter.initial_adapter,
        "initial_adapter_revision": run.fetched.adapter,
        "initial_adapter_sha256": state.initial_adapter_sha256,
        "initial_adapter_eval_loss": state.initial_eval_loss,
        "dataset_source": run.dataset.source,
        "dataset_revision": run.fetched.dataset,
        **(
            {
                "dataset_sources": [each.source for each in run.dataset.sources],
                "dataset_revisions": run.fetched.sources,
            }
            if run.dataset.sources is not None
            else {}
        ),
        "dataset_sha256": state.dataset_sha256,
        "seed": run.training.seed,
        "config_hash": identity_hash(identity_fields(run)),
        "job_uid": run.job.uid,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
