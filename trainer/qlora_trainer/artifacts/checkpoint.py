"""Checkpoints: all that a restart needs, complete or not there.

`checkpoints/step-00000010/` holds the adapter as PEFT has it, so that PEFT opens the folder; the parameters and the
optimizer's moments (safetensors), state.json, and manifest.json, written last, with the sha256 of the others. It is
written under a temporary name and renamed, and only while the fence still names this attempt.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlora_contract.files import read_json
from qlora_contract.job_folder import MANIFEST, read_manifest
from qlora_contract.units import first_line, now
from qlora_trainer.artifacts.adapter import base_model, write_peft
from qlora_trainer.artifacts.tensors import save_tensors
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.modeling.adapter_parameters import AdapterParameters
from qlora_trainer.storage.atomic import replace_folder, seal_folder, translate_os_errors
from qlora_trainer.storage.job_folder import JobFolder

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised when an older trainer could not continue from what this one writes; a new field alone does not need it."""
ADAPTER_FILE = "adapter.safetensors"
"""The parameters by their names, which a resume reads: PEFT's file has what an adapter computes with, not always
what is trained (prefix tuning trains a network that makes it). Release 0.1.0 reads nothing else, after a rollback."""
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
    """Of the base as trained on."""
    dataset_sha256: str = ""
    weights_sha256: str = ""
    """Of the base's tensors (modeling.weight_files.WeightsHash); empty in checkpoints of releases that took none."""
    initial_adapter_sha256: str = ""
    """Of the weights of adapter.initialAdapter, as the first attempt read them; empty without one."""
    initial_eval_loss: float | None = None
    """Of that adapter, before the first step; None without one, without evaluation data, and where the release that
    wrote the checkpoint did not measure it."""
    token_digests: dict[str, str] = field(default_factory=dict)
    """Hashes of the samples of `training` and of `evaluation` and, to tell what changed them, of the `chat template`
    and the `tokenizer`. Empty where the release that wrote the checkpoint did not know it."""
    determinism_key: dict[str, Any] = field(default_factory=dict)
    """What decides in which order numbers are added up: a resume repeats an undisturbed run bit for bit only under the
    same. Called `conditions` in state.json."""
    best_step: int | None = None
    """Whose adapter had the lowest eval loss; None while none was evaluated, or none is to be kept."""
    best_eval_loss: float | None = None
    evaluations_since_best: int = 0
    not_bit_exact: str | None = None
    """Why the run, resumed, does not repeat an undisturbed one bit for bit: the reasons of all attempts."""


_STORED_NAMES = {"determinism_key": "conditions"}
"""Fields of LoopState that are called otherwise in state.json, which releases before and after this one read."""


def save(
    folder: JobFolder,
    parameters: AdapterParameters,
    optimizer: torch.optim.Optimizer,
    state: LoopState,
    keep: int,
) -> Path:
    """Write a checkpoint of the state, then remove all but the newest `keep` and the best; the checkpoint's folder.

    Raises:
        Fenced: a newer attempt has taken over; nothing is left of the checkpoint.
        StorageFull: it does not fit; nothing is left of it.
    """
    final = path_of(folder, state.step)
    temporary = folder.checkpoints / f".{final.name}.{folder.run.job.uid}-{folder.run.job.attempt}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with translate_os_errors(f"writing checkpoint {final}"):
            temporary.mkdir()
            write_peft(temporary, folder.run, parameters, base_model(folder.run))
            save_tensors({name: p.data for name, p in parameters.named.items()}, temporary / ADAPTER_FILE)
            save_tensors(optimizer_tensors(parameters, optimizer), temporary / OPTIMIZER_FILE)
            stored = {_STORED_NAMES.get(name, name): value for name, value in asdict(state).items()}
            (temporary / STATE_FILE).write_text(json.dumps(stored, indent=1))
            seal_folder(temporary, {"format": FORMAT, "step": state.step, "time": now()})
            folder.check_fence()
            replace_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # Later ones are damaged, or this attempt would have started from them: they do not count.
    known = [path for path in sorted(folder.checkpoints.glob("step-*")) if path.name <= final.name]
    best = None if state.best_step is None else path_of(folder, state.best_step)
    for path in known[:-keep]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)
    return final


def path_of(folder: JobFolder, step: int) -> Path:
    """The folder of the checkpoint after a step."""
    return folder.checkpoints / f"step-{step:08d}"


def optimizer_tensors(parameters: AdapterParameters, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments, (n,) as the flat parameters, and its step count, (); empty before the first step."""
    return {name: t for name, t in optimizer.state[parameters.flat].items() if isinstance(t, Tensor)}


def newest_valid(folder: JobFolder) -> Path | None:
    """The newest checkpoint whose files are all as they were written; the log names those passed over."""
    for path in sorted(folder.checkpoints.glob("step-*"), reverse=True):
        if read_manifest(path) is not None:
            return path
        log.warning("checkpoint %s is damaged or incomplete; trying an older one", path)
    return None


def load(path: Path, parameters: AdapterParameters, optimizer: torch.optim.Optimizer) -> LoopState:
    """Load a checkpoint's tensors into the adapter and the optimizer, and return its state.

    Raises:
        ConfigurationError: as load_adapter and read_state.
    """
    state = read_state(path)
    # Fresh tensors: those of the file lie wherever its header ends, and sums may depend on alignment.
    moments = {name: t.clone() for name, t in _tensors(path / OPTIMIZER_FILE).items()}
    of_moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameters.flat.shape)
    shapes = {name: t.shape for name, t in moments.items() if t.dtype == torch.float32}
    if moments and shapes != {"step": torch.Size(()), **of_moments}:
        raise ConfigurationError(
            f"{path / OPTIMIZER_FILE} does not hold the moments of this adapter; remove {path} to go on from an "
            "older one"
        )
    load_adapter(path, parameters)
    optimizer.state[parameters.flat].update(moments)
    return state


def load_adapter(path: Path, parameters: AdapterParameters) -> None:
    """Load a checkpoint's adapter.

    Raises:
        ConfigurationError: it is of other layers or shapes; nothing is loaded.
    """
    adapter = _tensors(path / ADAPTER_FILE)
    expected = {name: p.shape for name, p in parameters.named.items()}
    if {name: t.shape for name, t in adapter.items()} != expected:
        raise ConfigurationError(
            f"{path} holds an adapter for other layers or of another rank; remove it to start over"
        )
    parameters.load(adapter)


def read_state(path: Path) -> LoopState:
    """The loop state of a checkpoint. Fields that this trainer does not know are passed over: see FORMAT.

    Raises:
        ConfigurationError: another version of the trainer wrote it, in another format.
    """
    manifest = _facts(path / MANIFEST)
    written = manifest.get("format")
    if written != FORMAT:
        raise ConfigurationError(
            f"{path} is a checkpoint of format {str(written)[:20]}, and this trainer reads format {FORMAT}; "
            "continue with the version that wrote it, or remove it to start over"
        )
    stored = _facts(path / STATE_FILE)
    names = {field.name: _STORED_NAMES.get(field.name, field.name) for field in fields(LoopState)}
    try:
        state = _STATE.validate_python({name: stored[key] for name, key in names.items() if key in stored})
    except ValidationError as error:
        wrong = ".".join(map(str, error.errors()[0]["loc"]))
        raise ConfigurationError(
            f"{path / STATE_FILE} is not what a trainer writes ({wrong}); remove {path} to go on from an older one"
        ) from error
    if state.step != manifest.get("step"):
        raise ConfigurationError(f"{path} is of two steps; remove it to go on from an older one")
    return state


_STATE = TypeAdapter(LoopState)


def _facts(path: Path) -> dict[str, Any]:
    """What a JSON file of a checkpoint holds. Raises ConfigurationError."""
    try:
        facts = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(facts, dict):
        raise ConfigurationError(
            f"{path} is not what a trainer writes; remove its folder to go on from an older one"
        )
    return facts


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's file. Raises ConfigurationError."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({first_line(error)}); remove {path.parent} to go on from an older one"
        ) from error
    return tensors


NOT_ALWAYS_KNOWN = {"tier", "processor", "hosts", "transformers", "warmup_steps"}
"""What release 0.1.0 did not record of a determinism key. There is nothing to compare with then."""


def changes(then: dict[str, Any], now_: dict[str, Any]) -> str | None:
    """What differs between two determinism keys, `threads 2 -> 4, ...`; None when a resume is bit-exact."""
    known = {*then, *now_} - (NOT_ALWAYS_KNOWN - then.keys())
    changed = [
        f"{key} {then.get(key)} -> {now_.get(key)}" for key in sorted(known) if then.get(key) != now_.get(key)
    ]
    return ", ".join(changed) or None
