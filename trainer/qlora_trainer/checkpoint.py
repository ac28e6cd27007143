"""Checkpoints: all that a restart needs, whole or not there.

`checkpoints/step-00000010/` holds the adapter and the optimiser's moments
(safetensors), state.json, and manifest.json, written last, with the sha256 of
the others. The folder is made under a temporary name and renamed, and only
while the fence still names this attempt.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_contract import places
from qlora_trainer import storage
from qlora_trainer.adapter import AdapterParameters
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.storage import JobFolder, storing

log = logging.getLogger(__name__)

FORMAT = 1
ADAPTER_FILE = "adapter.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


@dataclass
class LoopState:
    """Where the loop stands. The data position is the step: which samples a step holds depends on nothing else."""

    step: int = 0
    """Steps completed."""
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    """Spent in training steps, over all attempts."""
    base_eval_loss: float | None = None
    """Of the base as stored, computed in fp32; None when not measured."""
    base_eval_loss_quantized: float | None = None
    dataset_sha256: str = ""
    conditions: dict[str, Any] = field(default_factory=dict)
    """What bit-exactness depends on: see `not_bit_exact`."""
    not_bit_exact: str | None = None
    """Why it continued, but does not repeat an undisturbed run bit for bit: the reasons of all attempts."""


def save(
    folder: JobFolder,
    parameters: AdapterParameters,
    optimizer: torch.optim.Optimizer,
    state: LoopState,
    keep: int,
) -> Path:
    """Write a checkpoint of the state, then remove all but the newest `keep`."""
    final = folder.checkpoints / f"step-{state.step:08d}"
    temporary = folder.checkpoints / f".{final.name}.{folder.run.job.uid}-{folder.run.job.attempt}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with storing(f"writing checkpoint {final}"):
            temporary.mkdir()
            _write(temporary, parameters, optimizer, state)
            folder.check_fence()
            storage.replace_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(final, keep)
    return final


def _write(
    folder: Path, parameters: AdapterParameters, optimizer: torch.optim.Optimizer, state: LoopState
) -> None:
    storage.save_tensors({n: p.data for n, p in parameters.named.items()}, folder / ADAPTER_FILE)
    storage.save_tensors(optimizer_tensors(parameters, optimizer), folder / OPTIMIZER_FILE)
    (folder / STATE_FILE).write_text(json.dumps(asdict(state), indent=1))
    storage.publish_folder(folder, {"format": FORMAT, "step": state.step, "time": now()})


def optimizer_tensors(parameters: AdapterParameters, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step count; empty before the first step."""
    return {name: t for name, t in optimizer.state[parameters.flat].items() if isinstance(t, Tensor)}


def newest_valid(folder: JobFolder) -> Path | None:
    """The newest checkpoint whose files are all as they were written; damaged ones are named in the log."""
    for path in sorted(folder.checkpoints.glob("step-*"), reverse=True):
        if storage.read_manifest(path) is not None:
            return path
        log.warning("checkpoint %s is damaged or unfinished; trying an older one", path)
    return None


def load(path: Path, parameters: AdapterParameters, optimizer: torch.optim.Optimizer) -> LoopState:
    """Put a checkpoint's tensors where they belong and return its state."""
    adapter = load_file(path / ADAPTER_FILE)
    wanted = {name: p.shape for name, p in parameters.named.items()}
    if {name: t.shape for name, t in adapter.items()} != wanted:
        raise ConfigurationError(f"{path} holds an adapter of other layers or rank; remove it to start anew")
    for name, parameter in parameters.named.items():
        parameter.data.copy_(adapter[name])
    # Fresh tensors: those of the file lie wherever its header ends, and sums may depend on alignment.
    moments = {name: t.clone() for name, t in load_file(path / OPTIMIZER_FILE).items()}
    optimizer.state[parameters.flat].update(moments)
    return read_state(path)


def read_state(path: Path) -> LoopState:
    """The loop state of a checkpoint.

    Raises:
        ConfigurationError: another version of the trainer wrote it, in another format.
    """
    written = json.loads((path / places.MANIFEST).read_text()).get("format")
    if written != FORMAT:
        raise ConfigurationError(
            f"{path} is a checkpoint of format {written}, and this trainer reads format {FORMAT}; "
            "go on with the version that wrote it, or remove it to start anew"
        )
    return LoopState(**json.loads((path / STATE_FILE).read_text()))


def not_bit_exact(then: dict[str, Any], now_: dict[str, Any]) -> str | None:
    """Why continuing under `now_` what began under `then` is not bit-exact; None when it is."""
    changed = [
        f"{key} {then.get(key)} -> {now_.get(key)}"
        for key in sorted({*then, *now_})
        if then.get(key) != now_.get(key)
    ]
    return ", ".join(changed) or None


def now() -> str:
    """The time as RFC 3339, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _prune(newest: Path, keep: int) -> None:
    # Later ones are damaged, or this attempt would have started from them: they do not count.
    known = [path for path in sorted(newest.parent.glob("step-*")) if path.name <= newest.name]
    for path in known[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
