"""What the base and the finished adapter answer to held-out prompts, side by side, for the report.

The answers hold text of the data, so they stay in the workspace: nothing of them is in what is uploaded.
"""

import json
import logging
import operator
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_contract.job_folder import ANSWERS
from qlora_contract.progress import Work
from qlora_contract.run_config import RunConfig
from qlora_trainer.data.dataset import Samples
from qlora_trainer.inference.generation import stream
from qlora_trainer.modeling.adapter_methods import adapters_disabled
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.storage.atomic import write_atomically
from qlora_trainer.training.context import RankContext, StopRequested, collective_seconds
from qlora_trainer.training.inputs import stop_ids
from qlora_trainer.training.setup import TrainState

log = logging.getLogger(__name__)

NEW_TOKENS = 32
"""Of an answer, at most: enough for one that can be compared, and seconds for a small model."""
MIN_PROMPT = 2
"""Tokens: what is learned from its beginning, as a plain text is, has no prompt."""
SECONDS_PER_PROMPT = 60.0
"""For both answers, on a slow or busy machine; as a rule it is far less."""
SHARE_OF_WAIT = 0.5
"""Of how long the other ranks wait for this one: all answers together take no more."""
PROMPT_CHARACTERS = 1_000
"""Of the end of a prompt, that are shown."""
MAX_LABELS = 20
"""Different answers of data that are taken for labels, at most, and each several times."""
LABEL_TOKENS = 8


@dataclass(frozen=True)
class HeldOut:
    """A held-out prompt, and what the data answer: token ids."""

    prompt: list[int]
    reference: list[int]


def answer_held_out(context: RankContext, state: TrainState) -> None:
    """Rank 0: answer the prompts and keep the answers. The other ranks wait.

    Raises:
        StopRequested: on every rank, when one was asked to stop in the meantime.
    """
    count, samples = context.run.evaluation.prompts, state.data.evaluation
    if count == 0 or samples is None:
        return
    if context.is_rank_zero:
        try:
            _answer(context, state, samples, count)
        except Exception as error:  # a report must not end a training
            log.warning("the held-out prompts could not be answered: %s", error)
        finally:
            context.progress.begin(None)
    if context.all_reduce_scalars({}).stop_requested:
        raise StopRequested


def _answer(context: RankContext, state: TrainState, samples: Samples, count: int) -> None:
    chosen = held_out(samples, count)
    if not chosen:
        return
    tokenizer = state.tokenizer
    ends = {each.reference[-1] for each in chosen} & set(tokenizer.all_special_ids)
    stops = {*stop_ids(state.model_folder), *ends}
    seconds = time_for(len(chosen), context.run)
    total = 2 * NEW_TOKENS * len(chosen)
    context.progress.begin(Work(name="answering held-out prompts", unit="tokens", total=total))
    room = state.memory.micro_batch_tokens

    def answers() -> tuple[list[str], bool]:
        """The texts, and whether there was time for all of them."""
        found: list[list[int]] = [[] for _ in chosen]
        deadline = time.monotonic() + seconds / 2
        for number, token in until(_tokens(state.model, chosen, stops, room), deadline, context):
            found[number].append(token)
        return list(map(text, found)), time.monotonic() < deadline

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    with adapters_disabled(state.model):
        base, base_in_time = answers()
    adapter, adapter_in_time = answers()
    if context.stop.is_set():
        return
    rows = [
        {"prompt": end_of(text(each.prompt)), "reference": text(each.reference), "base": b, "adapter": a}
        for each, b, a in zip(chosen, base, adapter, strict=True)
    ]
    in_time = base_in_time and adapter_in_time
    short = [row for row, each in zip(rows, chosen, strict=True) if len(each.reference) <= NEW_TOKENS]
    found = {
        "prompts": rows,
        # What was cut off cannot be compared.
        "scores": scores(short, labels=has_labels(samples)) if in_time else {},
        "longest": NEW_TOKENS,
        "in_time": in_time,
    }
    context.folder.check_fence()
    write_atomically(context.folder.path / ANSWERS, json.dumps(found, indent=1))


def time_for(count: int, run: RunConfig) -> float:
    """Seconds that so many prompts may take, of both sides."""
    return min(SECONDS_PER_PROMPT * count, SHARE_OF_WAIT * collective_seconds(run))


def held_out(samples: Samples, count: int) -> list[HeldOut]:
    """The first samples that have a prompt: what is learned last in each is the reference, all before it the prompt."""
    found: list[HeldOut] = []
    for number in range(len(samples)):
        ids, mask = samples.sample(number)
        start, stop = last_run(mask)
        if start >= MIN_PROMPT and len(found) < count:
            found.append(HeldOut(ids[:start].tolist(), ids[start:stop].tolist()))
    return found


def last_run(mask: Any) -> tuple[int, int]:
    """Where the last supervised tokens of a sample begin and end. `mask`: (tokens,), at least one of them set."""
    places = np.flatnonzero(mask)
    breaks = np.flatnonzero(np.diff(places) > 1)
    return int(places[breaks[-1] + 1 if len(breaks) else 0]), int(places[-1]) + 1


def has_labels(samples: Samples) -> bool:
    """Whether the answers of the data are labels: short, and few of them, each several times."""
    runs: set[bytes] = set()
    for number in range(len(samples)):
        ids, mask = samples.sample(number)
        start, stop = last_run(mask)
        runs.add(ids[start:stop].tobytes())
        if stop - start > LABEL_TOKENS or len(runs) > MAX_LABELS:
            return False
    return 1 < len(runs) <= len(samples) / 2


def _tokens(
    model: BaseModel, chosen: Sequence[HeldOut], stops: Collection[int], room: int
) -> Iterator[tuple[int, int]]:
    """(number of the prompt, token) of all answers, so many prompts at a time as have room.

    What attention keeps of a token is less than what training keeps of it, and `room` is of training.
    """
    for first, last in groups([len(each.prompt) + NEW_TOKENS for each in chosen], room):
        prompts = [each.prompt for each in chosen[first:last]]
        with closing(stream(model, prompts, max_new_tokens=NEW_TOKENS, stop_tokens=stops)) as tokens:  # type: ignore[type-var]
            for number, token in tokens:
                yield first + number, token


def groups(sizes: Sequence[int], room: int) -> Iterator[tuple[int, int]]:
    """Where consecutive groups begin and end that are no larger than `room`, or have one member."""
    first, used = 0, 0
    for number, size in enumerate(sizes):
        if used + size > room and number > first:
            yield first, number
            first, used = number, 0
        used += size
    if sizes:
        yield first, len(sizes)


def until(
    tokens: Iterable[tuple[int, int]], deadline: float, context: RankContext
) -> Iterator[tuple[int, int]]:
    """The tokens until the time is over, or this rank is asked to stop."""
    for item in tokens:
        context.progress.advance(1)
        yield item
        if time.monotonic() >= deadline or context.stop.is_set():
            return


def end_of(text: str) -> str:
    """The end of a prompt, without white space around it."""
    text = text.strip()
    return text if len(text) <= PROMPT_CHARACTERS else f"... {text[-PROMPT_CHARACTERS:]}"


def scores(rows: Sequence[dict[str, str]], *, labels: bool) -> dict[str, dict[str, float]]:
    """By measure and side (`base`, `adapter`) the share of answers that are right, of those that can be compared.

    Args:
        rows: with `reference`, `base` and `adapter`; only such whose reference is no longer than an answer may be.
        labels: whether the references are labels.
    """
    if not rows:
        return {}
    measures: dict[str, Callable[[str, str], bool]] = {"exact_match": operator.eq}
    if labels:
        measures["label_accuracy"] = lambda answer, reference: label(answer) == label(reference)
    if all(is_json(row["reference"]) for row in rows):
        measures["valid_json"] = lambda answer, _: is_json(answer)
    return {
        name: {
            side: sum(right(row[side], row["reference"]) for row in rows) / len(rows)
            for side in ("base", "adapter")
        }
        for name, right in measures.items()
    }


def label(answer: str) -> str:
    """The first line of an answer without case and punctuation around it."""
    first = answer.strip().partition("\n")[0]
    return first.strip(" \t.,;:!?\"'`*").casefold()


def is_json(text: str) -> bool:
    """Whether the text is a JSON object or array. A bare number or word is as good as any other text."""
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False
