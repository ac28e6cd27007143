"""What ranks and `qlora plan` read alike: the tokenized data, and the type that a first attempt computes in."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qlora_contract.memory import Dtype
from qlora_contract.paths import resolve
from qlora_contract.run_config import BF16_NATIVE, RunConfig
from qlora_trainer.data.dataset import LoadedData, load
from qlora_trainer.errors import ConfigurationError, ModelError


def load_inputs(run: RunConfig, volumes: Mapping[str, Path]) -> tuple[Any, LoadedData]:
    """The model's own tokenizer, and the data tokenized with it.

    Args:
        run: the job.
        volumes: claim -> directory; empty in a pod.

    Raises:
        ModelError: the tokenizer is missing or cannot be read.
        DataError: the data cannot be trained on.
        ConfigurationError: an improvement is required that nothing could show.
        InvalidUriError: a source is on a claim that has no directory here.
    """
    folder = resolve(run.model_uri, volumes)
    source = resolve(run.dataset_uri, volumes)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} has no tokenizer that can be read: {error}") from error
    data = load(run.dataset, source, tokenizer, run.training.max_sequence_length)
    if data.evaluation is None and run.evaluation.require_improvement:
        raise ConfigurationError(
            "evaluation.requireImprovement needs data to evaluate on: set dataset.evalFraction above 0 or "
            "name a dataset.evalSplit, or set requireImprovement to false"
        )
    return tokenizer, data


def default_compute_dtype(run: RunConfig, tiers: Iterable[str]) -> Dtype:
    """As the job asks for, else bf16 where every processor computes in it natively.

    Args:
        run: the job.
        tiers: those of all ranks' processors. The tier that their nodes were chosen by may be a lesser one: it says
            what they have at least.
    """
    asked = run.training.compute_dtype
    if asked != "auto":
        return asked
    return "bf16" if BF16_NATIVE.issuperset(tiers) else "fp32"
