"""What ranks and `qlora plan` read alike: the tokenized data, and the type that a first attempt computes in."""

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlora_contract.files import read_json
from qlora_contract.memory import Dtype, ModelShape
from qlora_contract.paths import resolve
from qlora_contract.run_config import (
    BF16_NATIVE,
    BUNDLED,
    NOTHING_HELD_OUT,
    TEMPLATE_FILE,
    Dataset,
    RunConfig,
)
from qlora_contract.scratch import scratch_folder
from qlora_trainer.data.batches import ALONE, Workers
from qlora_trainer.data.bundled_templates import bundled_template
from qlora_trainer.data.chat_template import TemplateSettings
from qlora_trainer.data.dataset import LoadedData, Samples, load
from qlora_trainer.data.head import Head
from qlora_trainer.data.packing import StepSchedule
from qlora_trainer.data.sources import Files, dataset_sha256, find_files, named
from qlora_trainer.data.token_cache import cache_key
from qlora_trainer.data.tokenization import TokenizationOptions
from qlora_trainer.errors import ConfigurationError, DataError, ModelError
from qlora_trainer.modeling import initial_adapter
from qlora_trainer.modeling.families import read_tokenizer
from qlora_trainer.modeling.shape import adapter_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEMPLATE_BYTES = 1 << 20
"""The largest file of a chat template; those of models have some tens of thousands."""


@dataclass(frozen=True)
class TokenSource:
    """What tokens are made from."""

    dataset: Dataset
    roots: Sequence[Path]
    """The dataset's sources."""
    tokenizer: Any
    max_length: int
    options: TokenizationOptions

    def load(
        self, folder: Path | None = None, workers: Workers = ALONE, head: Head | None = None
    ) -> LoadedData:
        """The tokens, made now: in files of a folder, or in memory. Raises as dataset.load does.

        `head`: bounds how much is read; then nothing is hashed, which would read it all.
        """
        return load(
            self.dataset,
            self.roots,
            self.tokenizer,
            self.max_length,
            self.options,
            folder=folder,
            sha256=self.sha256 if head is None else [""] * len(self.roots),
            workers=workers,
            head=head,
        )

    def key(self) -> str:
        """What the token cache calls them. Reads all files, and raises as find_files does."""
        names = [[[path.name for path in paths] for paths in files] for files in self._files]
        return cache_key(self.dataset, names, self.sha256, self.tokenizer, self.max_length, self.options)

    def size(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for files in self._files for paths in files for path in paths)

    @cached_property
    def sha256(self) -> list[str]:
        """Of each source's files."""
        pairs = zip(self.roots, self._files, strict=True)
        return [dataset_sha256(root, [path for paths in files for path in paths]) for root, files in pairs]

    @cached_property
    def _files(self) -> list[Files]:
        found = []
        for number, (source, root) in enumerate(zip(self.dataset.all_sources, self.roots, strict=True)):
            with named(self.dataset.all_sources, number):
                found.append(find_files(source, root))
        return found


Load = Callable[[TokenSource], LoadedData]


def into_passing_files(source: TokenSource, head: Head | None = None) -> LoadedData:
    """Tokens that are mapped from files without a name, so that they need no memory; `head` as TokenSource.load has
    it."""
    with scratch_folder("tokens") as folder:
        return source.load(folder, head=head)


def check_initial_adapter(run: RunConfig, model_folder: Path, volumes: Mapping[str, Path]) -> None:
    """Make sure that the job can go on from adapter.initialAdapter, if it names one. Raises ModelError."""
    if (uri := run.initial_adapter_uri) is not None:
        folder = resolve(uri, volumes)
        initial_adapter.check(folder, run.adapter, adapter_shapes(model_folder, run.adapter))


def load_inputs(
    run: RunConfig,
    shape: ModelShape,
    volumes: Mapping[str, Path],
    began: datetime.datetime,
    advance: Callable[[int], None] = lambda _: None,
    by: "Load | None" = None,
) -> tuple[Any, LoadedData]:
    """The model's own tokenizer, and the data tokenized with it, the evaluation samples bounded.

    Args:
        run: the job.
        shape: the model's.
        volumes: claim -> directory; empty in a pod.
        began: when the first attempt began: what a chat template is told that asks for the date.
        advance: called with the number of records that were just tokenized; it may raise.
        by: loads the data, from a cache, say; None: they are tokenized into files that are gone afterwards.

    Raises:
        ModelError: the tokenizer is missing, cannot be read or makes tokens that the model does not have; or the
            model cannot tell the places of maxSequenceLength tokens.
        DataError: the data cannot be trained on.
        ConfigurationError: an improvement or the best step is asked for, and nothing could show it; or there is no such
            chat template.
        InvalidUriError: a source is on a claim that has no directory here.
    """
    folder = resolve(run.model_uri, volumes)
    longest = run.training.max_sequence_length
    if shape.positions is not None and longest > shape.positions:
        raise ModelError(
            f"training.maxSequenceLength is {longest}, but {folder} has only {shape.positions} positions "
            "(max_position_embeddings, or what scaled rotary embeddings reach): lower it to "
            f"{shape.positions} or less, or take a model for longer texts"
        )
    roots = [resolve(uri, volumes) for uri in run.dataset_uris]
    tokenizer = read_tokenizer(folder)
    options = tokenization_options(run, tokenizer, folder, roots, began, advance)
    source = TokenSource(run.dataset, roots, tokenizer, run.own_tokens, options)
    data = (by or into_passing_files)(source).of_dataset(run.dataset)
    if not data.epoch_samples:
        raise DataError(
            "the weights of dataset.sources leave no sample for an epoch; raise one, or leave them out"
        )
    check_tokens(data, tokenizer, shape, folder)
    if data.evaluation is None and run.evaluation.require_improvement:
        raise ConfigurationError(NOTHING_HELD_OUT)
    if data.evaluation is None and run.evaluation.keep_best:
        raise ConfigurationError(
            "evaluation.keepBest needs data to evaluate on: set dataset.evalFraction above 0 or name a "
            "dataset.evalSplit"
        )
    if data.evaluation is not None:
        data = replace(data, evaluation=bounded(data.evaluation, run.evaluation.max_tokens))
    return tokenizer, data


def lengths_in_rows(samples: Samples, run: RunConfig) -> NDArray[np.int64]:
    """(samples,): what each takes of a row and of a step, its virtual tokens included."""
    return samples.lengths() + run.adapter.virtual_tokens


def tokenization_options(
    run: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    roots: Sequence[Path],
    began: datetime.datetime,
    advance: Callable[[int], None] = lambda _: None,
) -> TokenizationOptions:
    """How a job's records become tokens. Raises ConfigurationError for a bundled template that there is not.

    Args:
        run: the job.
        tokenizer: the model's.
        folder: the model's.
        roots: the dataset's sources; a template may be a file beside the data, or of the model.
        began, advance: as load_inputs has them.
    """
    return TokenizationOptions(
        template=template_settings(
            run.dataset,
            tokenizer,
            began,
            stop_ids(folder),
            folders=(*(root if root.is_dir() else root.parent for root in roots), folder),
        ),
        train=run.dataset.train,
        overlong=run.training.overlong,
        advance=advance,
    )


def step_schedule(run: RunConfig, data: LoadedData) -> StepSchedule:
    """Every step of a job's training."""
    return StepSchedule(lengths_in_rows(data.train, run), run.training, data.train.group_offsets, data.mix)


def check_tokens(data: LoadedData, tokenizer: Any, shape: ModelShape, folder: Path) -> None:
    """Raise ModelError for a token that has no row in the embedding. Nothing is said of the data but that token."""
    highest = max(int(samples.ids.max()) for samples in (data.train, data.evaluation) if samples is not None)
    if highest >= shape.vocabulary:
        raise ModelError(
            f"the tokenizer of {folder} makes token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) of the "
            f"data, but the model's embedding has {shape.vocabulary} rows (vocab_size): tokens were added to the "
            "tokenizer without resizing the embedding; take the tokenizer that belongs to the model"
        )


def bounded(samples: Samples, max_tokens: int) -> Samples:
    """The samples that are evaluated: all of them, or as many as `max_tokens` allows, at least one, in their order.

    They are taken in the order of hashes of their tokens. The choice is thus a fair one, depends neither on the order
    of the file nor on ranks, and hardly changes when a few records are added.
    """
    if len(samples.ids) <= max_tokens:
        return samples
    groups = samples.group_offsets  # a group is taken as a whole, as it is packed
    bounds = np.arange(len(samples) + 1) if groups is None else groups
    ends = samples.offsets[bounds]
    units = [samples.ids[start:stop] for start, stop in pairwise(ends)]
    order = sorted(range(len(units)), key=lambda unit: hashlib.sha256(units[unit].tobytes()).digest())
    within = np.cumsum([len(units[unit]) for unit in order]) <= max_tokens
    chosen = sorted(order[: max(1, int(within.sum()))])
    parts = [samples.sample(number) for unit in chosen for number in range(bounds[unit], bounds[unit + 1])]
    return Samples(
        np.concatenate([ids for ids, _ in parts]),
        np.concatenate([mask for _, mask in parts]),
        np.cumsum([0, *(len(ids) for ids, _ in parts)], dtype=np.int64),
        None if groups is None else np.cumsum([0, *np.diff(bounds)[chosen]], dtype=np.int64),
    )


def template_settings(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    began: datetime.datetime,
    stop_ids: tuple[int, ...],
    folders: Sequence[Path] = (),
) -> TemplateSettings:
    """What a job says of its chat template; `folders`: where it may be a file, the first that has it.

    Raises ConfigurationError for a bundled one, or a file, that there is not.
    """
    source = dataset.chat_template
    if source is not None and source.startswith(BUNDLED):
        source = bundled_template(source.removeprefix(BUNDLED), tokenizer, began)
    elif source is not None and source.startswith(TEMPLATE_FILE):
        source = _template_file(source.removeprefix(TEMPLATE_FILE), folders)
    variables = {name: _variable(text) for name, text in dataset.chat_template_kwargs.items()}
    return TemplateSettings(source, variables, began, stop_ids)


def _template_file(name: str, folders: Sequence[Path]) -> str:
    """The text of a template. Raises ConfigurationError."""
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        places = " nor ".join(map(str, folders))
        raise ConfigurationError(f"dataset.chatTemplate: there is no file {name} in {places}")
    if path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise ConfigurationError(f"dataset.chatTemplate: {path} is larger than {MAX_TEMPLATE_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"dataset.chatTemplate: {path} cannot be read as UTF-8 text: {error}"
        ) from error


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
            ids = read_json(model_folder / name).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        found.update(id_ for id_ in (ids if isinstance(ids, list) else [ids]) if isinstance(id_, int))
    return tuple(sorted(found))


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
