"""The training and evaluation samples of a dataset, the same on every rank."""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlora_contract.containers import CONTAINERS
from qlora_contract.files import sha256
from qlora_contract.plan import BadRecords
from qlora_contract.run_config import Dataset
from qlora_trainer.data.chat_template import ChatTemplate
from qlora_trainer.data.layout import split_files
from qlora_trainer.data.readers import BadRow, container_of, read_rows
from qlora_trainer.data.records import Format, Record, interpret
from qlora_trainer.data.tokenization import Sample, Tokenization, TokenizationOptions
from qlora_trainer.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BAD_LISTED = 10
"""Bad records that the error names which ends a job."""
MAX_BAD_PLACES = 5
"""Places that are kept of each reason for which records are left out."""
MAX_DEPTH = 3
"""Folders that a split's files may be below the dataset's."""


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
    format: str = ""
    """What the records are, as dataset.format has it."""
    bad: tuple[BadRecords, ...] = ()
    """Records beside these that were left out, by reason, the most frequent first."""

    def report(self) -> dict[str, Any]:
        """As training_report.json has it."""
        return {
            "format": self.format,
            "records": self.records,
            "truncated": self.truncated,
            "dropped": self.dropped,
            "bad": [bad.model_dump(by_alias=True) for bad in self.bad],
        }

    def summary(self) -> str:
        """In one line."""
        text = f"{self.records:,} records in the {self.format} format"
        if self.truncated:
            text += f"; {self.truncated:,} truncated to maxSequenceLength"
        if self.dropped:
            text += f", {self.dropped:,} of them dropped, because that left nothing to train on"
        if self.bad:
            reasons = "; ".join(f"{bad.count:,} {bad.reason} ({', '.join(bad.places)})" for bad in self.bad)
            text += f"; {sum(bad.count for bad in self.bad):,} bad records left out: {reasons}"
        return text

    @property
    def lost(self) -> bool:
        """Whether less is trained on than there is."""
        return bool(self.truncated or self.dropped or self.bad)


@dataclass(frozen=True, eq=False)
class LoadedData:
    """A dataset, ready to train on."""

    train: Samples
    evaluation: Samples | None
    """None when evalFraction is 0 and there is no evalSplit."""
    sha256: str
    """Of the file's bytes; of several files, of what `sha256sum TRAIN.jsonl EVAL.jsonl` prints."""
    train_facts: Facts
    evaluation_facts: Facts | None
    template: ChatTemplate | None = None
    """What wrote the conversations; None without any."""

    def facts(self) -> dict[str, Facts]:
        """Of each split that there is, by what it is for."""
        splits = {"training": self.train_facts, "evaluation": self.evaluation_facts}
        return {use: facts for use, facts in splits.items() if facts is not None}


def load(
    dataset: Dataset,
    root: Path,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    options: TokenizationOptions | None = None,
) -> LoadedData:
    """Read, split and tokenize what `dataset` names; `root` is its source as a path.

    Raises DataError (the data), ConfigurationError (a dataset field that does
    not fit them) or ModelError (the tokenizer).
    """
    training_files, evaluation_files = find_files(dataset, root)
    training = read_records(dataset, training_files)
    if evaluation_files:
        train, held_out = training.records, read_records(dataset, evaluation_files)
    else:
        train, records = split_records(dataset, training_files[0], training.records)
        held_out = Records(records, training.format)
    tokenization = Tokenization(tokenizer, max_length, options)
    samples, facts = make_samples(train, tokenization, "training")
    evaluation, evaluation_facts = None, None
    if held_out.records:
        evaluation, evaluation_facts = make_samples(held_out.records, tokenization, "evaluation")
        evaluation_facts = replace(evaluation_facts, format=held_out.format, bad=held_out.bad)
    digest = dataset_sha256(root, [*training_files, *evaluation_files])
    facts = replace(facts, format=training.format, bad=training.bad)
    return LoadedData(samples, evaluation, digest, facts, evaluation_facts, tokenization.template_used)


def find_files(dataset: Dataset, root: Path) -> tuple[list[Path], list[Path]]:
    """The files to train on, and those to evaluate on where dataset.evalSplit names some."""
    if root.is_dir():
        splits = [dataset.train_split, *([dataset.eval_split] if dataset.eval_split else [])]
        if len(set(splits)) < len(splits):
            raise ConfigurationError(
                f"dataset.evalSplit is the split that is trained on, {splits[0]!r}; name another"
            )
        names, readme = list_folder(root)
        train, *evaluation = (
            [root / name for name in split_files(names, split, str(root), readme)] for split in splits
        )
        return train, evaluation[0] if evaluation else []
    if not root.exists():
        kinds = ", ".join(dict.fromkeys(c.name.removesuffix(" file") for c in CONTAINERS.values()))
        raise DataError(f"{root}: no such file; dataset.source is a file ({kinds}), or a folder of them")
    if dataset.eval_split:
        raise ConfigurationError(
            f"dataset.evalSplit needs a folder of splits, but {root} is a file: give its folder as the "
            "source, or leave evalSplit out and set evalFraction"
        )
    return [root], []


def list_folder(root: Path) -> tuple[list[str], str]:
    """The files of a folder and of those below it, as paths relative to it; and the text of its README.md."""
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        within = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if not name.startswith(".") and len(within.parts) < MAX_DEPTH]
        names += [(within / name).as_posix() for name in files if not name.startswith(".")]
    readme = root / "README.md"
    try:
        return sorted(names), readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    except OSError:
        return sorted(names), ""


@dataclass(frozen=True)
class Records:
    """The records of a split."""

    records: list[Record]
    format: str
    """What they are, as dataset.format has it."""
    bad: tuple[BadRecords, ...] = ()
    """Those beside them that were left out, by reason, the most frequent first."""


def read_records(dataset: Dataset, files: Sequence[Path]) -> Records:
    """All records of a split's files, in their order; format `auto` goes by the first of them.

    Raises DataError, which names the file, where in it, and what would be right.
    """
    formats: list[Format] = []
    rows = chain.from_iterable(map(read_rows, files))
    items = interpret(rows, dataset.format, dataset.columns.model_dump(exclude_none=True), formats.append)
    records, bad = without_bad(items, dataset)
    if not records and not bad:
        raise DataError(f"{files[0]}: holds no record; {container_of(files[0]).expects}")
    return Records(records, formats[0], bad)


def without_bad(
    items: Iterable[Record | BadRow], dataset: Dataset
) -> tuple[list[Record], tuple[BadRecords, ...]]:
    """The records that can be trained on, and the others by reason.

    Raises DataError when dataset.onBadRecord is `fail` and there is a bad one, which names the first ten; and when more
    than dataset.maxBadShare are bad.
    """
    records: list[Record] = []
    first: list[BadRow] = []
    count = 0
    reasons: dict[str, BadRecords] = {}
    for item in items:
        if isinstance(item, Record):
            records.append(item)
            continue
        count += 1
        if len(first) < MAX_BAD_LISTED:
            first.append(item)
        elif dataset.on_bad_record == "fail":
            break
        reason = re.sub(r"\d+", "N", item.reason)
        known = reasons.get(reason) or BadRecords(reason=reason, count=0, places=[])
        reasons[reason] = BadRecords(
            reason=reason,
            count=known.count + 1,
            places=[*known.places, item.location][:MAX_BAD_PLACES],
        )
    by_reason = tuple(sorted(reasons.values(), key=lambda bad: -bad.count))
    if not first:
        return records, ()
    if dataset.on_bad_record == "fail":
        raise DataError(_refusal(first, more=count > len(first)))
    total = count + len(records)
    if not records or count > dataset.max_bad_share * total:
        listed = "; ".join(f"{bad.count:,} {bad.reason} ({', '.join(bad.places)})" for bad in by_reason)
        raise DataError(
            f"{count:,} of {total:,} records cannot be trained on, more than dataset.maxBadShare "
            f"{dataset.max_bad_share:g} allows: {listed}"
        )
    return records, by_reason


def _refusal(bad: Sequence[BadRow], *, more: bool) -> str:
    """The sentence about the first bad records."""
    if len(bad) == 1:
        return str(bad[0])
    listed = " ".join(f"({number}) {row}" for number, row in enumerate(bad, start=1))
    return (
        f"{len(bad)}{' and more' if more else ''} records cannot be trained on; mend them, or leave them out with "
        f"dataset.onBadRecord: skip: {listed}"
    )


def split_records(dataset: Dataset, file: Path, records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Records to train on and to evaluate on; the second is empty when no evaluation is asked for.

    Raises DataError when there are not two different records for the two.
    """
    train, held_out = hold_out(records, dataset.eval_fraction)
    if dataset.eval_fraction and not (train and held_out):
        copies = "1 record" if len(records) == 1 else f"{len(records)} records, all the same"
        raise DataError(
            f"{file}: has {copies}, so evalFraction {dataset.eval_fraction} can hold out none: give more, name an "
            "evalSplit, or set 0 for no evaluation"
        )
    return train, held_out


def hold_out(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """Records to train on, and those held out: the ones whose split key is below `fraction`.

    Neither the file's order nor its other records matter, and copies of one record stay on one side. But where that
    leaves a side empty, the record with the lowest key is held out, or the one with the highest trained on.
    """
    keys = [record.split_key for record in records]
    limit = fraction
    if fraction and keys and min(keys) >= fraction:
        limit = math.nextafter(min(keys), 1)
    elif fraction and keys and max(keys) < fraction:
        limit = max(keys)
    held_out = [record for record, key in zip(records, keys, strict=True) if key < limit]
    return [record for record, key in zip(records, keys, strict=True) if key >= limit], held_out


def make_samples(records: list[Record], tokenization: Tokenization, use: str) -> tuple[Samples, Facts]:
    """The samples of records, without those that have no supervised token. Raises DataError when none is left."""
    kept: list[Sample] = []
    truncated = 0
    for sample in tokenization.samples(records):
        tokenization.options.advance(1)
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


def dataset_sha256(root: Path, files: Sequence[Path]) -> str:
    """sha256 of one file, or of what `sha256sum` prints for several by their names within the dataset's folder."""
    if len(files) == 1:
        return sha256(files[0])
    listing = "".join(f"{sha256(path)}  {path.relative_to(root).as_posix()}\n" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()
