"""What can be said of data without a model: no tokens, and so no torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qlora_contract.plan import BadRecords, SplitStats, TextSpan
from qlora_contract.run_config import Dataset
from qlora_trainer.data.bad_records import BadTally
from qlora_trainer.data.readers import BadRow, container_of
from qlora_trainer.data.records import Chat, Content, Document, PromptCompletion
from qlora_trainer.data.sources import histogram, read_split, split_keys
from qlora_trainer.errors import DataError

SHOWN = 3
"""Records that are shown."""


def survey(
    dataset: Dataset, training_files: Sequence[Path], evaluation_files: Sequence[Path]
) -> tuple[SplitStats, SplitStats | None, list[list[TextSpan]]]:
    """The training split, the evaluation split, and the first records as text. Raises DataError."""
    training = _Split(dataset, training_files)
    held = split_keys(training.digests) < (0.0 if evaluation_files else dataset.eval_fraction)
    evaluation = None
    if evaluation_files:
        of_its_own = _Split(dataset, evaluation_files)
        overlap = int(np.isin(of_its_own.digests, training.digests).sum())
        everything = np.ones(len(of_its_own.digests), np.bool_)
        evaluation = of_its_own.stats(everything, of_its_own.bad, overlap)
    elif held.any():
        evaluation = training.stats(held)
    return training.stats(~held, training.bad), evaluation, training.first


class _Split:
    """What the records of a split are, in a few numbers each."""

    def __init__(self, dataset: Dataset, files: Sequence[Path]) -> None:
        rows, self.format, interpretation = read_split(dataset, files)
        tally = BadTally(dataset)
        digests, lengths = bytearray(), bytearray()
        self.first: list[list[TextSpan]] = []
        for record in interpretation(rows):
            if isinstance(record, BadRow):
                tally.add(record)
                continue
            runs = spoken(record.content)
            digests += record.digest[:8]
            lengths += sum(len(text) for text, _ in runs).to_bytes(8, "little")
            if len(self.first) < SHOWN:
                self.first.append([TextSpan(text=text, supervised=learned) for text, learned in runs])
        self.digests = np.frombuffer(digests, ">u8").astype(np.uint64)
        self.lengths = np.frombuffer(lengths, "<i8")
        self.bad = tally.finish(len(self.digests))
        if not len(self.digests):
            raise DataError(f"{files[0]}: holds no record; {container_of(files[0]).expects}")

    def stats(
        self, chosen: NDArray[np.bool_], bad: tuple[BadRecords, ...] = (), overlap: int = 0
    ) -> SplitStats:
        """Of the records that are chosen. Nothing is known of tokens."""
        records = int(chosen.sum())
        return SplitStats(
            format=self.format,
            records=records,
            bad=list(bad),
            truncated=0,
            dropped=0,
            samples=records,
            tokens=0,
            supervised_tokens=0,
            duplicates=records - len(np.unique(self.digests[chosen])),
            overlap=overlap,
            lengths=list(histogram(self.lengths[chosen])),
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
