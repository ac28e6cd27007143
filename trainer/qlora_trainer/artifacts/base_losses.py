"""base_losses.json of a job's folder: how good the base model is without an adapter, measured once for each job.

It does not change from attempt to attempt, and measuring it may take long: what one attempt has found out is kept at
once, not only with the next checkpoint.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from qlora_contract.files import read_json
from qlora_contract.job_folder import BASE_LOSSES
from qlora_trainer.storage.atomic import write_atomically
from qlora_trainer.storage.job_folder import JobFolder


@dataclass(frozen=True)
class BaseLosses:
    """The base's eval losses, and what they are of. None: not measured."""

    measured_on: dict[str, str]
    """Names and digests of all that they depend on. Losses of something else do not count."""
    quantized: float | None = None
    """Of the base as it is trained on."""
    unquantized: float | None = None
    """Of the base as it is stored."""


def read(folder: JobFolder, measured_on: dict[str, str]) -> BaseLosses | None:
    """What is known of these very things: nothing of others. None: no attempt has kept any losses."""
    try:
        stored: dict[str, Any] = read_json(folder.path / BASE_LOSSES)
        losses = BaseLosses(
            dict(stored["measured_on"]), _loss(stored["quantized"]), _loss(stored["unquantized"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return losses if losses.measured_on == measured_on else BaseLosses(measured_on)


def write(folder: JobFolder, losses: BaseLosses) -> None:
    """Keep losses durably. Raises Fenced, StorageFull."""
    folder.check_fence()
    write_atomically(folder.path / BASE_LOSSES, json.dumps(asdict(losses), indent=1))


def _loss(value: Any) -> float | None:
    return None if value is None else float(value)
