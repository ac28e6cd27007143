"""The training and evaluation samples of a dataset, the same on every rank."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from qlora_contract.files import sha256
from qlora_contract.run_config import MAX_EVAL_FRACTION, Dataset
from qlora_trainer.data.chat_template import ChatTemplate
from qlora_trainer.data.readers import READERS, reader_for
from qlora_trainer.data.records import Format, Record, interpret
from qlora_trainer.data.tokenization import Sample, Tokenization, TokenizationOptions
from qlora_trainer.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Samples:
    """Tokenized samples, end to end."""

    ids: NDArray[np.int32]
    """(tokens of all samples,)"""
    mask: NDArray[np.uint8]
    """As ids: 1 where token t is supervised, predicted from those before it; never a sample's first token."""
    offsets: NDArray[np.int64]
    """(samples + 1,): sample i is ids[offsets[i]:offsets[i + 1]]."""
    group_offsets: NDArray[np.int64] | None = None
    """(groups + 1,): group g is samples group_offsets[g] to group_offsets[g + 1], at least one. Packing
    keeps them in one bin, and so in one micro-batch of one rank (a preferred answer and the other one, say). None: each
    sample stands by itself."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> NDArray[np.int64]:
        """(samples,): tokens of each sample."""
        return np.diff(self.offsets)

    def supervised_counts(self) -> NDArray[np.int64]:
        """(samples,): supervised tokens of each sample; at least one."""
        return np.add.reduceat(self.mask, self.offsets[:-1], dtype=np.int64)

    def sample(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Ids and mask of sample i, as views."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[span], self.mask[span]

    def digest(self) -> str:
        """sha256 of everything here: equal on two ranks exactly if they train on the same tokens."""
        hashed = hashlib.sha256()
        for array in (self.ids, self.mask, self.offsets, self.group_offsets):
            if array is not None:
                hashed.update(array.tobytes())
        return hashed.hexdigest()


@dataclass(frozen=True)
class Facts:
    """What became of a split's records."""

    records: int
    truncated: int
    """Samples whose end was cut off, dropped ones among them."""
    dropped: int
    """Samples without a supervised token."""


@dataclass(frozen=True, eq=False)
class LoadedData:
    """A dataset, ready to train on."""

    train: Samples
    evaluation: Samples | None
    """None when evalFraction is 0 and there is no evalSplit."""
    sha256: str
    """Of the file's bytes; with an evalSplit, of what `sha256sum TRAIN.jsonl EVAL.jsonl` prints."""
    train_facts: Facts
    evaluation_facts: Facts | None
    template: ChatTemplate | None = None
    """What wrote the conversations; None without any."""


def load(
    dataset: Dataset,
    root: Path,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    options: TokenizationOptions | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> LoadedData:
    """Read, split and tokenize what `dataset` names; `root` is its source as a path.

    `advance` is called with the number of records that were just tokenized. What it raises ends the work.

    Raises DataError (the data), ConfigurationError (a dataset field that does
    not fit them) or ModelError (the tokenizer).
    """
    files = find_files(dataset, root)
    train, held_out = split_records(dataset, files)
    tokenization = Tokenization(tokenizer, max_length, options)
    samples, facts = make_samples(train, tokenization, "training", advance)
    evaluation, evaluation_facts = (
        make_samples(held_out, tokenization, "evaluation", advance) if held_out else (None, None)
    )
    return LoadedData(
        samples, evaluation, dataset_sha256(files), facts, evaluation_facts, tokenization.template_used
    )


def find_files(dataset: Dataset, root: Path) -> list[Path]:
    """The training file, and the evaluation file where dataset.evalSplit names one."""
    if root.is_dir():
        splits = [dataset.train_split, *([dataset.eval_split] if dataset.eval_split else [])]
        if len(set(splits)) < len(splits):
            raise ConfigurationError(
                f"dataset.evalSplit is the split that is trained on, {splits[0]!r}; name another"
            )
        return [split_file(root, split) for split in splits]
    if not root.exists():
        containers = " or ".join(reader.container for reader in READERS.values())
        raise DataError(f"{root}: no such file; dataset.source is a {containers}, or a folder of them")
    if dataset.eval_split:
        raise ConfigurationError(
            f"dataset.evalSplit needs a folder of splits, but {root} is a file: give its folder as the "
            "source, or leave evalSplit out and set evalFraction"
        )
    return [root]


def split_file(folder: Path, split: str) -> Path:
    """The file of a folder that holds a split: its name, with the suffix of a reader."""
    paths = [folder / f"{split}{suffix}" for suffix in READERS]
    found = [path for path in paths if path.is_file()]
    if len(found) == 1:
        return found[0]
    names = " or ".join(path.name for path in paths)
    if found:
        raise DataError(f"{folder}: has split {split!r} more than once ({names}); leave one file of it")
    splits = sorted({file.stem for suffix in READERS for file in folder.glob(f"*{suffix}")})
    raise DataError(f"{folder}: has no split {split!r} ({names}); its splits: {', '.join(splits) or 'none'}")


def read_records(path: Path, format: Literal["auto"] | Format = "auto") -> list[Record]:  # noqa: A002 - the API's word
    """All records of a file, in its order; `auto` goes by the first record.

    Raises DataError, which names the file, where in it, and what would be right.
    """
    reader = reader_for(path)
    records = list(interpret(reader.rows(path), format))
    if not records:
        raise DataError(f"{path}: holds no record; {reader.expects}")
    return records


def split_records(dataset: Dataset, files: list[Path]) -> tuple[list[Record], list[Record]]:
    """Records to train on and to evaluate on; the second is empty when no evaluation is asked for."""
    records = read_records(files[0], dataset.format)
    if len(files) > 1:
        return records, read_records(files[1], dataset.format)
    train, held_out = hold_out(records, dataset.eval_fraction)
    if not train:
        raise DataError(
            f"{files[0]}: evalFraction {dataset.eval_fraction} holds out every record; give more, or set 0"
        )
    if not held_out and dataset.eval_fraction:
        least = min(record.split_key for record in records)
        higher = f"set it above {least:.4f}, " if least < MAX_EVAL_FRACTION and len(records) > 1 else ""
        raise DataError(
            f"{files[0]}: evalFraction {dataset.eval_fraction} holds out none of the {len(records)} records: "
            f"give more, {higher}name an evalSplit, or set 0 for no evaluation"
        )
    return train, held_out


def hold_out(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """Records to train on, and those held out: the ones whose split key is below `fraction`.

    Neither the file's order nor its other records matter, and copies of one
    record stay on one side.
    """
    held_out = [record for record in records if record.split_key < fraction]
    return [record for record in records if record.split_key >= fraction], held_out


def make_samples(
    records: list[Record],
    tokenization: Tokenization,
    use: str,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Samples, Facts]:
    """The samples of records, without those that have no supervised token. Raises DataError when none is left."""
    kept: list[Sample] = []
    truncated = 0
    for sample in tokenization.samples(records):
        advance(1)
        truncated += sample.truncated
        if sample.mask.any():
            kept.append(sample)
    if not kept:
        raise DataError(
            f"no supervised token in the {use} data: all {len(records)} records lose their supervised tokens "
            f"when cut to maxSequenceLength {tokenization.max_length}; raise it, or shorten the prompts"
        )
    offsets = np.cumsum([0] + [len(sample.ids) for sample in kept], dtype=np.int64)
    ids = np.concatenate([sample.ids for sample in kept])
    mask = np.concatenate([sample.mask for sample in kept])
    return Samples(ids, mask, offsets), Facts(len(records), truncated, len(records) - len(kept))


def dataset_sha256(files: list[Path]) -> str:
    """sha256 of one file, or of what `sha256sum` prints for several."""
    if len(files) == 1:
        return sha256(files[0])
    listing = "".join(f"{sha256(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()
