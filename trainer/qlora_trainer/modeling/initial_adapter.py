"""An adapter to go on from: another training's, in PEFT's format, as the start of this one's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from qlora_contract.files import sha256
from qlora_contract.job_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_contract.run_config import Adapter
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.adapter_methods import PEFT_PREFIX
from qlora_trainer.modeling.adapter_parameters import AdapterParameters

FIELDS: Mapping[str, tuple[str, Any]] = {
    "r": ("rank", 8),
    "lora_alpha": ("alpha", 8),
    "use_rslora": ("rslora", False),
    "rank_pattern": ("rankPattern", {}),
    "alpha_pattern": ("alphaPattern", {}),
}
"""Of PEFT's configuration: the field of a job that must be equal, and what stands for one that is not written."""

UNSUPPORTED: Mapping[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "lora_bias": False,
}
"""Of PEFT's configuration: what must be as it is by default."""


def check(folder: Path, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Make sure that a job can go on from an adapter; no weights are read.

    Args:
        folder: adapter.initialAdapter of the job.
        adapter: the job's settings.
        shapes: name -> shape of what the job trains.

    Raises:
        ModelError: there is no adapter, or it is not of the same kind and layers.
    """
    config = read_config(folder)
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"adapter.initialAdapter: {folder} is of the type {config.get('peft_type')}, and must be LORA"
        )
    for name, supported in UNSUPPORTED.items():
        if config.get(name, supported) not in (supported, [] if supported is None else supported):
            raise ModelError(
                f"adapter.initialAdapter: {folder} has {name} {config[name]}, which cannot be trained here"
            )
    wanted = adapter.model_dump(by_alias=True)
    for name, (field, default) in FIELDS.items():
        value = config.get(name, default)
        if value != wanted[field]:
            raise ModelError(
                f"adapter.initialAdapter: {folder} was trained with {name} {json.dumps(value)}, and adapter.{field} is "
                f"{json.dumps(wanted[field])}: set adapter.{field} to {json.dumps(value)}"
            )
    found = tensor_shapes(folder)
    missing, unknown = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which is not trained here"
        raise ModelError(
            f"adapter.initialAdapter: {folder} {what}: adapter.targetModules must name its layers "
            f"({', '.join(sorted(map(str, config.get('target_modules') or [])))}), and the base must be the same"
        )
    for name, shape in shapes.items():
        if found[name] != shape:
            raise ModelError(
                f"adapter.initialAdapter: {name} of {folder} has the shape {list(found[name])}, and this job's "
                f"{list(shape)}: it is of another base model"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder. Raises ModelError where there is none."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
    except FileNotFoundError as error:
        raise ModelError(
            f"adapter.initialAdapter: {folder} has no {ADAPTER_CONFIG}: it must be the folder of an adapter as PEFT "
            "writes it, such as jobs/NAME/adapter of a workspace"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"adapter.initialAdapter: {folder}/{ADAPTER_CONFIG} cannot be read: {error}"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"adapter.initialAdapter: {folder}/{ADAPTER_CONFIG} is not a JSON object")
    return config


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the adapter's tensors, without PEFT's prefix. Raises ModelError."""
    path = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            return {n.removeprefix(PEFT_PREFIX): tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ModelError(
            f"adapter.initialAdapter: {folder} has no {ADAPTER_WEIGHTS}; an adapter in another format must be saved "
            "again by PEFT, as safetensors"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(f"adapter.initialAdapter: {path} cannot be read: {error}") from error


def load(folder: Path, parameters: AdapterParameters) -> str:
    """Set the parameters to those of an adapter that `check` has passed; sha256 of its file."""
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    with torch.no_grad():
        for name, parameter in parameters.named.items():
            parameter.copy_(tensors[f"{PEFT_PREFIX}{name}"])
    return sha256(folder / ADAPTER_WEIGHTS)
