"""The training and evaluation samples of a dataset, the same on every rank."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlora_contract.plan import BadRecords, LengthBin, SourceStats
from qlora_contract.run_config import Dataset
from qlora_trainer.data.bad_records import BadTally, told
from qlora_trainer.data.batches import ALONE, Workers, tokenize
from qlora_trainer.data.chat_template import ChatTemplate
from qlora_trainer.data.head import Head
from qlora_trainer.data.packing import MixPart, epoch_order
from qlora_trainer.data.readers import container_of
from qlora_trainer.data.samples import Samples as Samples
from qlora_trainer.data.samples import SampleWriter
from qlora_trainer.data.sources import (
    Files,
    dataset_sha256,
    find_files,
    histogram,
    joined_sha256,
    named,
    read_split,
    split_keys,
    unlearned_label,
)
from qlora_trainer.data.tokenization import Tokenization, TokenizationOptions
from qlora_trainer.errors import DataError, NothingLeft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Facts:
    """What became of a split's records."""

    records: int
    truncated: int
    """Samples whose end was cut off, dropped ones among them."""
    dropped: int
    """Samples that are left out: those without a supervised token, and the overlong ones."""
    format: str = ""
    """What the records are, as dataset.format has it."""
    bad: tuple[BadRecords, ...] = ()
    """Records beside these that were left out, by reason, the most frequent first."""
    duplicates: int = 0
    """Records that say the same as an earlier one."""
    overlap: int = 0
    """Of the evaluation records, those that are trained on as well."""
    overlong: int = 0
    """Samples that training.overlong leaves out."""
    lengths: tuple[LengthBin, ...] = ()
    """Of the samples, in tokens."""
    raw: bool = False
    """Whether prompts and completions that are texts are among the records."""
    label: str = ""
    """That a label beside the texts is not learned, and how it would be; empty where there is none."""
    sources: tuple[SourceStats, ...] = ()
    """What of it each of several sources gives."""

    def report(self) -> dict[str, Any]:
        """As training_report.json has it."""
        return {
            "format": self.format,
            "records": self.records,
            "truncated": self.truncated,
            "dropped": self.dropped,
            "duplicates": self.duplicates,
            "overlap": self.overlap,
            "overlong": self.overlong,
            "raw": self.raw,
            "lengths": [bin_.model_dump(by_alias=True) for bin_ in self.lengths],
            "bad": [bad.model_dump(by_alias=True) for bad in self.bad],
            **({"label": self.label} if self.label else {}),
            **(
                {"sources": [each.model_dump(by_alias=True) for each in self.sources]} if self.sources else {}
            ),
        }

    @classmethod
    def of_report(cls, report: dict[str, Any]) -> "Facts":
        """What `report` was made from."""
        bad = tuple(map(BadRecords.model_validate, report["bad"]))
        lengths = tuple(map(LengthBin.model_validate, report["lengths"]))
        sources = tuple(map(SourceStats.model_validate, report.get("sources", ())))
        return cls(**report | {"bad": bad, "lengths": lengths, "sources": sources})

    def summary(self) -> str:
        """In one line."""
        text = f"{self.records:,} records in the {self.format} format"
        if self.sources:
            text += f" from {len(self.sources)} sources"
        if self.truncated:
            text += f"; {self.truncated:,} truncated to maxSequenceLength"
        if cut := self.dropped - self.overlong:
            text += f", {cut:,} of them dropped, because that left nothing to train on"
        if self.overlong:
            text += f"; {self.overlong:,} left out, because they are longer than maxSequenceLength"
        if self.duplicates:
            text += f"; {self.duplicates:,} say the same as an earlier one"
        if self.overlap:
            text += f"; {self.overlap:,} of them are trained on as well, so the evaluation flatters"
        if self.bad:
            reasons = "; ".join(map(told, self.bad))
            text += f"; {sum(bad.count for bad in self.bad):,} bad records left out: {reasons}"
        if self.label:
            text += f"; {self.label}"
        return text

    @property
    def lost(self) -> bool:
        """Whether less is trained on than there is."""
        return bool(self.truncated or self.dropped or self.bad or self.overlap or self.label)


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
    use: object = None
    """What keeps the files of the samples, as long as there is a reference to it."""

    def of_dataset(self, dataset: Dataset) -> "LoadedData":
        """The same, with the addresses and weights that a dataset has now: its tokens depend on neither."""

        def renamed(facts: Facts | None) -> Facts | None:
            if facts is None or not facts.sources:
                return facts
            pairs = zip(facts.sources, dataset.all_sources, strict=True)
            sources = [
                stats.model_copy(update={"source": each.source, "weight": each.weight})
                for stats, each in pairs
            ]
            return replace(facts, sources=tuple(sources))

        training = renamed(self.train_facts)
        assert training is not None, "there always is training data"
        return replace(self, train_facts=training, evaluation_facts=renamed(self.evaluation_facts))

    @property
    def mix(self) -> tuple[MixPart, ...]:
        """How many of the training samples come from each of several sources, in their order; empty for one."""
        return tuple(MixPart(each.samples, each.weight) for each in self.train_facts.sources)

    @property
    def epoch_samples(self) -> int:
        """Samples of the first epoch, each as often as it is in it."""
        return len(epoch_order(len(self.train), 0, 0, self.mix)) if self.mix else len(self.train)

    def told(self) -> str:
        """What there is, what is lost of it, and what it is in tokens, split by split, in one line."""
        parts = []
        for use, facts in self.facts().items():
            samples = self.train if facts is self.train_facts else self.evaluation
            assert samples is not None, "where there are facts there are samples"
            tokens, learned = len(samples.ids), int(samples.supervised_counts().sum())
            parts.append(
                f"{use}: {facts.summary()}; {len(samples):,} samples of {tokens:,} tokens, "
                f"{100 * learned / tokens:.0f} % of them learned"
            )
        return "; ".join(parts)

    def facts(self) -> dict[str, Facts]:
        """Of each split that there is, by what it is for."""
        splits = {"training": self.train_facts, "evaluation": self.evaluation_facts}
        return {use: facts for use, facts in splits.items() if facts is not None}


def load(
    dataset: Dataset,
    roots: Path | Sequence[Path],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    options: TokenizationOptions | None = None,
    *,
    folder: Path | None = None,
    sha256: Sequence[str] | None = None,
    workers: Workers = ALONE,
    head: Head | None = None,
) -> LoadedData:
    """Read, split and tokenize what `dataset` names. Memory holds a few numbers of each record, and no text.

    Args:
        dataset: the job's.
        roots: its source as a path; of several sources, theirs.
        tokenizer: the model's.
        max_length: tokens of a sample, at most.
        options: how records become tokens besides.
        folder: where the tokens are written, to be mapped; None: they stay in memory.
        sha256: of each source's files, where it is known.
        workers: which processes tokenize.
        head: what bounds how much of it is read; None: nothing.

    Raises:
        DataError: the data; NothingLeft where all of them together are too few, or their beginning is.
        ConfigurationError: a dataset field that does not fit them.
        ModelError: the tokenizer.
        OSError: the folder cannot be written to.
    """
    roots = [roots] if isinstance(roots, Path) else roots
    sources = dataset.all_sources
    files: list[Files] = []
    for number, (source, root) in enumerate(zip(sources, roots, strict=True)):
        with named(sources, number):
            files.append(find_files(source, root))
    tokenization = Tokenization(tokenizer, max_length, options)
    places = (None, None) if folder is None else (folder / "training", folder / "evaluation")
    of_training, of_evaluation = [], []
    with SampleWriter(places[0]) as trained, SampleWriter(places[1]) as evaluated:
        for number, (to_train, to_evaluate) in enumerate(files):
            fraction = 0.0 if to_evaluate else dataset.eval_fraction
            with named(sources, number):
                training, held_out = _tokenize(
                    dataset, number, to_train, tokenization, (trained, evaluated), fraction, workers, head
                )
                if to_evaluate:
                    held_out, _ = _tokenize(
                        dataset,
                        number,
                        to_evaluate,
                        tokenization,
                        (evaluated, evaluated),
                        0.0,
                        workers,
                        head,
                    )
            of_training.append(training)
            of_evaluation.append(held_out)
        samples, evaluation = trained.finish(), evaluated.finish()
    training, held_out = _joined(of_training), _joined(of_evaluation)
    if dataset.eval_fraction and not any(of for _, of in files) and not (len(training) and len(held_out)):
        for place in places:
            if place is not None:
                shutil.rmtree(place)  # what is mapped stays
        training, held_out, samples, evaluation = _split_anyhow(
            dataset, files[0][0][0], training, held_out, samples, evaluation, places
        )
    digests = sha256 or [
        dataset_sha256(root, [*each[0], *each[1]]) for root, each in zip(roots, files, strict=True)
    ]
    evaluation_facts = None
    if len(held_out):
        evaluation_facts = _facts(
            held_out, evaluation, tokenization, "evaluation", dataset, digests, training.digests
        )
    facts = _facts(training, samples, tokenization, "training", dataset, digests)
    return LoadedData(
        samples,
        evaluation if evaluation_facts else None,
        joined_sha256(digests),
        facts,
        evaluation_facts,
        tokenization.template if training.chats or held_out.chats else None,
    )


@dataclass(frozen=True, eq=False)
class _Records:
    """What became of the good records of a split, in their order."""

    digests: NDArray[np.uint64]
    """The first 64 bits of Record.digest."""
    lengths: NDArray[np.int64]
    """Tokens of each; 0: nothing is left to learn."""
    truncated: NDArray[np.bool_]
    chats: bool
    """Whether there is a conversation among them, or a record that was made one."""
    raw: bool
    """Whether there are prompts and completions that are texts among them."""
    sources: NDArray[np.uint8]
    """Which of the sources each comes from."""
    bad: tuple[tuple[BadRecords, ...], ...] = ()
    """Those beside them that were left out, of each source, by reason, the most frequent first."""
    formats: tuple[str, ...] = ()
    """Of each source."""
    label: str = ""
    """See sources.unlearned_label: of the first source with one."""

    def __len__(self) -> int:
        return len(self.digests)

    def where(self, chosen: NDArray[np.bool_]) -> "_Records":
        """Those that are chosen."""
        return replace(
            self,
            digests=self.digests[chosen],
            lengths=self.lengths[chosen],
            truncated=self.truncated[chosen],
            sources=self.sources[chosen],
        )


def _joined(parts: Sequence[_Records]) -> _Records:
    """The records of all sources, in their order."""
    return _Records(
        digests=np.concatenate([part.digests for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        truncated=np.concatenate([part.truncated for part in parts]),
        chats=any(part.chats for part in parts),
        raw=any(part.raw for part in parts),
        sources=np.concatenate([part.sources for part in parts]),
        bad=tuple(bad for part in parts for bad in part.bad),
        formats=tuple(format_ for part in parts for format_ in part.formats),
        label=next((part.label for part in parts if part.label), ""),
    )


def _tokenize(
    dataset: Dataset,
    number: int,
    files: Sequence[Path],
    tokenization: Tokenization,
    writers: tuple[SampleWriter, SampleWriter],
    fraction: float,
    workers: Workers,
    head: Head | None,
) -> tuple[_Records, _Records]:
    """Write the samples of a source's files: the records with a split key of `fraction` or more, and the others.

    `number`: the source's. Raises DataError, which names the file, where in it, and what would be right.
    """
    rows, found, interpretation = read_split(dataset.all_sources[number], files)
    if head is not None:
        rows = head.of(rows)
    tally = BadTally(dataset)
    numbers: list[list[NDArray[Any]]] = [[], [], []]
    good, seen, chats, raw = 0, 0, False, False
    for batch in tokenize(rows, interpretation, tokenization, workers):
        for bad in batch.bad:
            tally.add(bad)
        good += len(batch.lengths)
        seen += batch.rows
        chats |= batch.chats
        raw |= batch.raw
        tally.check(seen)
        if head is not None:
            head.spend(len(batch.ids))
        numbers[0].append(batch.digests)
        numbers[1].append(batch.lengths)
        numbers[2].append(batch.truncated)
        held = split_keys(batch.digests) < fraction
        for writer, side in zip(writers, (~held, held), strict=True):
            tokens = np.repeat(side, batch.lengths)
            lengths = batch.lengths[side]
            writer.add(batch.ids[tokens], batch.mask[tokens], lengths[lengths > 0])
    by_reason = tally.finish(good)
    if not good:
        raise DataError(f"{files[0]}: holds no record; {container_of(files[0]).expects}")
    digests, lengths, truncated = map(np.concatenate, numbers)
    sources = np.full(len(digests), number, np.uint8)
    label = unlearned_label(dataset.all_sources[number], files[0])
    records = _Records(digests, lengths, truncated, chats, raw, sources, (by_reason,), (found,), label)
    held = split_keys(digests) < fraction
    # Which side a bad record would be on is not known.
    return records.where(~held), replace(records.where(held), bad=((),))


def _split_anyhow(
    dataset: Dataset,
    file: Path,
    training: _Records,
    held_out: _Records,
    samples: Samples,
    evaluation: Samples,
    places: tuple[Path | None, Path | None],
) -> tuple[_Records, _Records, Samples, Samples]:
    """Two sides, neither empty, where the fraction leaves one of them empty.

    Then the records with the lowest key are held out, or those with the highest trained on.

    Raises DataError when there are not two different records for the two.
    """
    records = training if len(training) else replace(held_out, bad=training.bad)
    pool = samples if len(training) else evaluation
    keys = split_keys(records.digests)
    limit = np.nextafter(keys.min(), 1) if len(training) else keys.max()
    held = keys < limit
    if held.all() or not held.any():
        copies = "1 record" if len(records) == 1 else f"{len(records)} records, all the same"
        raise NothingLeft(
            f"{file}: has {copies}, so evalFraction {dataset.eval_fraction} can hold out none: give more, name an "
            f"evalSplit, or set 0 for no evaluation{_beside(records.bad)}"
        )
    kept = held[records.lengths > 0]
    with SampleWriter(places[0]) as trained, SampleWriter(places[1]) as evaluated:
        for number in range(len(pool)):
            ids, mask = pool.sample(number)
            writer = evaluated if kept[number] else trained
            writer.add(ids, mask, np.array([len(ids)]))
        sides = trained.finish(), evaluated.finish()
    return records.where(~held), replace(records.where(held), bad=((),) * len(records.bad)), *sides


def _beside(bad: tuple[tuple[BadRecords, ...], ...]) -> str:
    """The records that cannot be used, in a clause: they may be why there are too few."""
    faults = [fault for of_source in bad for fault in of_source]
    if not faults:
        return ""
    count, first = sum(fault.count for fault in faults), faults[0]
    return f"; beside it {count} cannot be used, the first at {first.places[0]}: {first.reason}"


def _facts(
    records: _Records,
    samples: Samples,
    tokenization: Tokenization,
    use: str,
    dataset: Dataset,
    sha256: Sequence[str],
    trained: NDArray[np.uint64] | None = None,
) -> Facts:
    """What became of a split's records. Raises DataError when none is left.

    `trained`: digests of what is trained on, where that is another split.
    """
    overlap = np.zeros(len(records), np.bool_) if trained is None else np.isin(records.digests, trained)
    if not len(samples):
        lose = (
            "are left out"
            if tokenization.options.overlong == "drop"
            else "lose their supervised tokens when cut"
        )
        raise NothingLeft(
            f"no supervised token in the {use} data: all {len(records)} records {lose} "
            f"to maxSequenceLength {tokenization.max_length}; raise it, or shorten the prompts"
        )
    drops = tokenization.options.overlong == "drop"

    def counts(chosen: NDArray[np.bool_]) -> dict[str, int]:
        too_long = int(records.truncated[chosen].sum())
        return {
            "records": int(chosen.sum()),
            "truncated": 0 if drops else too_long,
            "overlong": too_long if drops else 0,
            "dropped": int((records.lengths[chosen] == 0).sum()),
            "duplicates": int(chosen.sum()) - len(np.unique(records.digests[chosen])),
            "overlap": int(overlap[chosen].sum()),
        }

    per_source = []
    for number, each in enumerate(dataset.all_sources if dataset.sources is not None else ()):
        chosen = records.sources == number
        per_source.append(
            SourceStats(
                source=each.source,
                weight=each.weight,
                sha256=sha256[number],
                format=records.formats[number],
                bad=list(records.bad[number]),
                samples=int((records.lengths[chosen] > 0).sum()),
                tokens=int(records.lengths[chosen].sum()),
                **counts(chosen),
            )
        )
    return Facts(
        **counts(np.ones(len(records), np.bool_)),
        format=" and ".join(dict.fromkeys(filter(None, records.formats))),
        bad=tuple(bad for of_source in records.bad for bad in of_source),
        lengths=histogram(samples.lengths()),
        raw=records.raw,
        label=records.label if trained is None else "",
        sources=tuple(per_source),
    )
