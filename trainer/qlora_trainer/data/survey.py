"""What can be said of data without a model: no tokens, and so no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qlora_contract.plan import BadRecords, SourceStats, SplitStats, TextSpan
from qlora_contract.run_config import Dataset
from qlora_trainer.data.bad_records import BadTally
from qlora_trainer.data.readers import BadRow, container_of
from qlora_trainer.data.records import Chat, Content, Document, PromptCompletion
from qlora_trainer.data.sources import Files, histogram, named, read_split, split_keys, unlearned_label
from qlora_trainer.errors import DataError

SHOWN = 3
"""Records that are shown."""


def survey(
    dataset: Dataset, files: Sequence[Files]
) -> tuple[SplitStats, SplitStats | None, list[list[TextSpan]]]:
    """The training split, the evaluation split, and the first records as text. Raises DataError.

    `files`: of each of the dataset's sources.
    """
    training, evaluation = [], []
    for number, (to_train, to_evaluate) in enumerate(files):
        with named(dataset.all_sources, number):
            part = _Part.read(dataset, number, to_train)
            held = split_keys(part.digests) < (0.0 if to_evaluate else dataset.eval_fraction)
            of_its_own = _Part.read(dataset, number, to_evaluate) if to_evaluate else None
        training.append(part.where(~held))
        evaluation.append(of_its_own or replace(part.where(held), bad=()))
    trained = np.concatenate([part.digests for part in training])
    held_out = None
    if any(len(part.digests) for part in evaluation):
        held_out = _stats(dataset, evaluation, trained)
    return _stats(dataset, training), held_out, [record for part in training for record in part.first][:SHOWN]


@dataclass(frozen=True, eq=False)
class _Part:
    """What the records of a source's split are, in a few numbers each."""

    digests: NDArray[np.uint64]
    lengths: NDArray[np.int64]
    """In characters."""
    format: str
    bad: tuple[BadRecords, ...]
    first: list[list[TextSpan]]
    label: str
    """See sources.unlearned_label."""

    @classmethod
    def read(cls, dataset: Dataset, number: int, files: Sequence[Path]) -> "_Part":
        """Of source `number`. Raises DataError."""
        rows, format_, interpretation = read_split(dataset.all_sources[number], files)
        label = unlearned_label(dataset.all_sources[number], files[0])
        tally = BadTally(dataset)
        digests, lengths = bytearray(), bytearray()
        first: list[list[TextSpan]] = []
        for record in interpretation(rows):
            if isinstance(record, BadRow):
                tally.add(record)
                continue
            runs = spoken(record.content)
            digests += record.digest[:8]
            lengths += sum(len(text) for text, _ in runs).to_bytes(8, "little")
            if len(first) < SHOWN:
                first.append([TextSpan(text=text, supervised=learned) for text, learned in runs])
        found = np.frombuffer(digests, ">u8").astype(np.uint64)
        bad = tally.finish(len(found))
        if not len(found):
            raise DataError(f"{files[0]}: holds no record; {container_of(files[0]).expects}")
        return cls(found, np.frombuffer(lengths, "<i8"), format_, bad, first, label)

    def where(self, chosen: NDArray[np.bool_]) -> "_Part":
        """The records that are chosen."""
        return replace(self, digests=self.digests[chosen], lengths=self.lengths[chosen])


def _stats(dataset: Dataset, parts: Sequence[_Part], trained: NDArray[np.uint64] | None = None) -> SplitStats:
    """Of a split's parts. Nothing is known of tokens. `trained`: what is trained on, where that is another split."""
    digests = np.concatenate([part.digests for part in parts])
    overlap = [0 if trained is None else int(np.isin(part.digests, trained).sum()) for part in parts]
    sources = [
        SourceStats(
            source=each.source,
            weight=each.weight,
            format=part.format,
            records=len(part.digests),
            bad=list(part.bad),
            duplicates=len(part.digests) - len(np.unique(part.digests)),
            overlap=known,
            samples=len(part.digests),
        )
        for each, part, known in zip(dataset.all_sources, parts, overlap, strict=True)
    ]
    return SplitStats(
        format=" and ".join(dict.fromkeys(part.format for part in parts if part.format)),
        records=len(digests),
        bad=[bad for part in parts for bad in part.bad],
        label=next((part.label for part in parts if part.label), ""),
        truncated=0,
        dropped=0,
        samples=len(digests),
        tokens=0,
        supervised_tokens=0,
        duplicates=len(digests) - len(np.unique(digests)),
        overlap=sum(overlap),
        lengths=list(histogram(np.concatenate([part.lengths for part in parts]))),
        sources=sources if dataset.sources is not None else [],
    )


def spoken(content: Content) -> list[tuple[str, bool]]:
    """A record as runs of text, and whether each is learned, without what a chat template adds."""
    match content:
        case Chat(messages):
            runs = []
            for message in messages:
                calls = "".join(
                    f"[calls {call['function']['name']}]" for call in message.extra.get("tool_calls", ())
                )
                learned = message.role == "assistant" and message.trained is not False
                runs += [(f"{message.role}: ", False), (f"{message.content}{calls}", learned), ("\n", False)]
            return runs
        case PromptCompletion(prompt, completion):
            return [(prompt, False), (completion, True)]
        case Document(text):
            return [(text, True)]
