"""An adapter to go on from: another training's, in PEFT's format, as the start of this one's."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from qlora_contract.files import read_json, sha256
from qlora_contract.job_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_contract.run_config import Adapter
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.adapter_parameters import PEFT_PREFIX, AdapterParameters
from qlora_trainer.modeling.prompt_methods import EMBEDDING, PUBLISHED


@dataclass(frozen=True)
class Kind:
    """What PEFT writes of a method's adapters."""

    peft_type: str
    fields: Mapping[str, tuple[str, Any]]
    """Of PEFT's configuration: the field of a job that must be equal, and what stands for one that is not written."""


VIRTUAL_TOKENS: Mapping[str, tuple[str, Any]] = {"num_virtual_tokens": ("numVirtualTokens", None)}
KINDS: Mapping[str, Kind] = {
    "lora": Kind(
        "LORA",
        {
            "r": ("rank", 8),
            "lora_alpha": ("alpha", 8),
            "use_rslora": ("rslora", False),
            "rank_pattern": ("rankPattern", {}),
            "alpha_pattern": ("alphaPattern", {}),
        },
    ),
    "prompt-tuning": Kind("PROMPT_TUNING", VIRTUAL_TOKENS),
    "prefix-tuning": Kind("PREFIX_TUNING", VIRTUAL_TOKENS),
}
"""By `adapter.method`."""

UNSUPPORTED: Mapping[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "trainable_token_indices": None,
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
    kind = KINDS[adapter.method]
    if config.get("peft_type") != kind.peft_type:
        raise ModelError(
            f"adapter.initialAdapter: {folder} is of the type {config.get('peft_type')}, and must be {kind.peft_type}, "
            f"as adapter.method is {adapter.method}"
        )
    for name, supported in UNSUPPORTED.items():
        if config.get(name, supported) not in (supported, [] if supported is None else supported):
            raise ModelError(
                f"adapter.initialAdapter: {folder} has {name} {config[name]}, which cannot be trained here"
            )
    wanted = adapter.model_dump(by_alias=True)
    for name, (field, default) in kind.fields.items():
        value = config.get(name, default)
        if value != wanted[field]:
            raise ModelError(
                f"adapter.initialAdapter: {folder} was trained with {name} {json.dumps(value)}, and adapter.{field} is "
                f"{json.dumps(wanted[field])}: set adapter.{field} to {json.dumps(value)}"
            )
    found = tensor_shapes(folder)
    missing, unknown = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if (missing or unknown) and adapter.method != "lora":
        raise ModelError(
            f"adapter.initialAdapter: {folder} must hold one tensor, {PUBLISHED}, and holds "
            f"{', '.join(sorted(found)) or 'none'}: save the adapter again by PEFT"
        )
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
        config = read_json(folder / ADAPTER_CONFIG)
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
    """Name -> shape of the adapter's tensors, by the parameters' names. Raises ModelError."""
    path = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            return {parameter_of(n): tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ModelError(
            f"adapter.initialAdapter: {folder} has no {ADAPTER_WEIGHTS}; an adapter in another format must be saved "
            "again by PEFT, as safetensors"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(f"adapter.initialAdapter: {path} cannot be read: {error}") from error


def parameter_of(tensor: str) -> str:
    """The name of the parameter that a tensor of an adapter's file is."""
    return EMBEDDING if tensor == PUBLISHED else tensor.removeprefix(PEFT_PREFIX)


def load(folder: Path, parameters: AdapterParameters) -> str:
    """Set the parameters to those of an adapter that `check` has passed; sha256 of its file."""
    tensors = {parameter_of(name): tensor for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items()}
    parameters.load(tensors)
    return sha256(folder / ADAPTER_WEIGHTS)
