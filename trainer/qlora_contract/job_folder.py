"""The format of `jobs/<name>` in a workspace: what its files are called, whose it is, and whether its job is done.

`qlora run` and the trainer both read it, and a folder that an earlier release wrote must stay readable. The trainer
writes everything but run.json, the lock and the logs, which are there only with `qlora run`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_contract.files import read_json, sha256
from qlora_contract.identity import differences, identity, is_longer, same_identity
from qlora_contract.paths import resolve
from qlora_contract.run_config import RunConfig

FENCE = "fence.json"
"""The attempt that may write: {"uid": ..., "attempt": ...}."""
IDENTITY = "identity.json"
"""The fields of the spec that shape the result: {"hash": ..., "fields": {...}}."""
BEGAN = "began.json"
"""When the first attempt began: {"time": ...}."""
RUN_CONFIG = "run.json"
"""The newest attempt's RunConfig."""
LOCK = "lock"
"""Held by `qlora run` and its launchers."""
LOGS = "logs"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
EXPORTS = "exports"
"""Holds a folder of each form that was made of the adapter (qlora_contract.export)."""
EXPORT_REPORT = "export_report.json"
"""In each of them: what it is, and how far it is the adapter's model."""
METRICS = "metrics.jsonl"
BASE_LOSSES = "base_losses.json"
"""What the base model scores without an adapter; internal to the trainer."""
TRAINING_REPORT = "training_report.json"
LOSS_CURVE = "loss_curve.png"
ATTEMPTS = "attempts.json"
"""What each attempt took: a list of cost.AttemptRecord."""
ANSWERS = "answers.json"
"""What base and adapter answer to held-out prompts. It holds data, and is never uploaded."""
EVENTS = "tensorboard"
"""Event files of TensorBoard, one for each attempt."""
MLFLOW_RUN = "mlflow.json"
"""The job's run at a tracking server: {"uri", "experiment", "run_id"}."""
REPORT_PAGE = "report.html"
"""The report for people, as of the newest checkpoint or the end."""
REPORT_FACTS = "report.json"
"""What is known of a job that is not finished, with the names of training_report.json."""

MANIFEST = "manifest.json"
"""Of a checkpoint or an adapter, written last: {"files": {name: sha256}, ...}. A folder without one is incomplete."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
"""Of an adapter that was trained on conversations: what wrote them."""


class IdentityError(ValueError):
    """A job folder that does not belong to the spec at hand."""


class DamagedIdentityError(IdentityError):
    """identity.json is not what a trainer writes."""


def job_path(workspace: str, name: str, volumes: Mapping[str, Path]) -> Path:
    """The path of `jobs/<name>` in a workspace. Raises InvalidUriError."""
    return resolve(f"{workspace.rstrip('/')}/jobs/{name}", volumes)


def job_uri(run: RunConfig, *names: str) -> str:
    """The URI of the job's folder, or of something in it."""
    return "/".join([run.workspace.rstrip("/"), "jobs", run.job.name, *names])


def adapter_uri(run: RunConfig) -> str:
    """The URI of the finished adapter."""
    return job_uri(run, ADAPTER)


def identity_text(run: RunConfig) -> str:
    """The text of identity.json for this spec."""
    return json.dumps(identity(run), indent=1)


def has_identity(folder: Path, run: RunConfig) -> bool:
    """Whether the folder is marked as this spec's; False while it has no mark at all, or that of the same training with
    fewer steps, which the spec goes on with.

    Raises:
        IdentityError: it belongs to another spec; says what differs.
        DamagedIdentityError: the mark cannot be understood.
        OSError: it cannot be read.
    """
    path, mine = folder / IDENTITY, identity(run)
    try:
        theirs = read_json(path)
        same, fields = same_identity(theirs, mine), dict(theirs["fields"])
        longer = not same and is_longer(fields, mine["fields"])
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedIdentityError(f"{path} is damaged; remove {folder} to start over") from error
    if longer and run.training.schedule == "constant":
        return False
    if not same:
        why = (
            "; a job can be made longer only with training.schedule constant, since the learning rate of the steps "
            f"that are done depends on the last one with {run.training.schedule}"
            if longer
            else ""
        )
        raise IdentityError(
            f"{folder} holds the results of another spec ({differences(fields, mine['fields'])}){why}; "
            "choose another metadata.name, or remove the folder"
        )
    return True


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder all of whose files are present and unchanged; None otherwise."""
    try:
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        # By name alone: a manifest names files of its own folder, and a pipe or a device has no end.
        intact = all(
            "/" not in name and (folder / name).is_file() and sha256(folder / name) == digest
            for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return manifest if intact else None


def finished_report(folder: Path) -> dict[str, Any] | None:
    """training_report.json of a job whose adapter is complete and intact; None otherwise."""
    try:
        report = read_json(folder / TRAINING_REPORT)
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and read_manifest(folder / ADAPTER) is not None else None


def is_exported(folder: Path, adapter_sha256: str) -> bool:
    """Whether the folder of a form is complete, and of this adapter.

    Args:
        folder: of one form.
        adapter_sha256: over the adapter's weights.
    """
    manifest = read_manifest(folder)
    return manifest is not None and manifest.get("adapter_sha256") == adapter_sha256
