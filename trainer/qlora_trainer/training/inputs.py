"""What ranks and `qlora plan` read alike: the tokenized data, and the type that a first attempt computes in."""

import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from qlora_contract.memory import Dtype
from qlora_contract.paths import resolve
from qlora_contract.run_config import BF16_NATIVE, BUNDLED, Dataset, RunConfig
from qlora_trainer.data.bundled_templates import bundled_template
from qlora_trainer.data.chat_template import TemplateSettings
from qlora_trainer.data.dataset import LoadedData, load
from qlora_trainer.data.tokenization import TokenizationOptions
from qlora_trainer.errors import ConfigurationError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_inputs(
    run: RunConfig,
    volumes: Mapping[str, Path],
    began: datetime.datetime,
    between_batches: Callable[[], None] = lambda: None,
) -> tuple[Any, LoadedData]:
    """The model's own tokenizer, and the data tokenized with it.

    Args:
        run: the job.
        volumes: claim -> directory; empty in a pod.
        began: when the first attempt began: what a chat template is told that asks for the date.
        between_batches: called now and then while the data are tokenized; it may raise.

    Raises:
        ModelError: the tokenizer is missing or cannot be read.
        DataError: the data cannot be trained on.
        ConfigurationError: an improvement is required that nothing could show, or there is no such chat template.
        InvalidUriError: a source is on a claim that has no directory here.
    """
    folder = resolve(run.model_uri, volumes)
    source = resolve(run.dataset_uri, volumes)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} has no tokenizer that can be read: {error}") from error
    options = TokenizationOptions(
        template=template_settings(run.dataset, tokenizer, began, stop_ids(folder)),
        train=run.dataset.train,
        between_batches=between_batches,
    )
    data = load(run.dataset, source, tokenizer, run.training.max_sequence_length, options)
    if data.evaluation is None and run.evaluation.require_improvement:
        raise ConfigurationError(
            "evaluation.requireImprovement needs data to evaluate on: set dataset.evalFraction above 0 or "
            "name a dataset.evalSplit, or set requireImprovement to false"
        )
    return tokenizer, data


def template_settings(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    began: datetime.datetime,
    stop_ids: tuple[int, ...],
) -> TemplateSettings:
    """What a job says of its chat template. Raises ConfigurationError for a bundled one that there is not."""
    source = dataset.chat_template
    if source is not None and source.startswith(BUNDLED):
        source = bundled_template(source.removeprefix(BUNDLED), tokenizer)
    variables = {name: _variable(text) for name, text in dataset.chat_template_kwargs.items()}
    return TemplateSettings(source, variables, began, stop_ids)


def _variable(text: str) -> bool | int | str:
    """A boolean or a whole number where the text is one as JSON has them; else the text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, bool | int) else text


def stop_ids(model_folder: Path) -> tuple[int, ...]:
    """The tokens at which the model's generation stops by its own configuration, besides its tokenizer's."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        try:
            ids = json.loads((model_folder / name).read_text()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        found.update(id_ for id_ in (ids if isinstance(ids, list) else [ids]) if isinstance(id_, int))
    return tuple(sorted(found))


def default_compute_dtype(run: RunConfig) -> Dtype:
    """As the job asks for, else what the tier's processors compute in natively."""
    asked = run.training.compute_dtype
    if asked != "auto":
        return asked
    return "bf16" if run.isa in BF16_NATIVE else "fp32"
