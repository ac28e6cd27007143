"""The table of the forms that weights are stored in, and which of them a model has."""

from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_contract.units import first_line
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.stored import awq, bitsandbytes, compressed_tensors, fp8, gguf, gptq, mxfp4
from qlora_trainer.modeling.stored.format import Format, Matcher

FORMATS: tuple[Matcher, ...] = (
    fp8.matches,
    compressed_tensors.matches,
    bitsandbytes.matches,
    mxfp4.matches,
    gptq.matches,
    awq.matches,
)


def _numbers(_parts: Any) -> Tensor:
    raise ValueError("config.json has no quantization_config that says what the numbers mean")


AS_NUMBERS = Format("unquantized", _numbers)


def format_of(config: Any) -> Format | str:
    """The form that transformers' configuration names, or why the model is refused, to be read after its folder."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return AS_NUMBERS
    try:
        settings = settings if isinstance(settings, dict) else settings.to_dict()
        matching = [found for matches in FORMATS if (found := matches(settings)) is not None]
    except Exception as error:  # whatever stands where something else should
        return f"has a quantization_config that makes no sense ({type(error).__name__}: {first_line(error)[:200]})"
    for found in matching:
        if isinstance(found, str):
            return f"is stored in {found[:200]}; use another copy of the model, such as the unquantized one"
        return found
    known = "fp8, compressed-tensors, bitsandbytes, mxfp4, gptq, awq"
    method = str(settings.get("quant_method"))[:40]
    return f"is quantized by {method!r}, which is not read; read are {known} and GGUF files, and unquantized models"


def refusal(config: Any) -> str | None:
    """Why a model is refused for what it is stored in; None: it is not."""
    found = format_of(config)
    return found if isinstance(found, str) else None


def description(folder: Path, config: Any) -> str:
    """For people: what the model in a folder is stored in. Raises ModelError."""
    file = gguf.gguf_file(folder)
    return gguf.description(file) if file is not None else format_in(folder, config).description


def is_quantized(folder: Path, config: Any) -> bool:
    """Whether the weights in a folder are anything but plain numbers in safetensors. Raises ModelError."""
    return gguf.gguf_file(folder) is not None or format_in(folder, config) is not AS_NUMBERS


def format_in(folder: Path, config: Any) -> Format:
    """The form of the safetensors of a model folder. Raises ModelError for one that is refused."""
    found = format_of(config)
    if isinstance(found, str):
        raise ModelError(f"{folder} {found}")
    return found
