"""What `qlora check` tells: what is in a job's data, what becomes of it, and what may not be as it was meant."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_contract import memory
from qlora_contract.memory import ModelShape
from qlora_contract.paths import resolve
from qlora_contract.plan import (
    CheckReport,
    DataFile,
    MemoryFigures,
    PlanReport,
    SourceStats,
    SplitStats,
    Steps,
    TextSpan,
    TimeEstimate,
    few_steps,
    ranks_without_work,
)
from qlora_contract.run_config import NOTHING_HELD_OUT, Dataset, RunConfig
from qlora_contract.speed import time_of
from qlora_trainer.data.readers import content_of
from qlora_trainer.data.sources import Files, find_files, named, unread_columns
from qlora_trainer.data.survey import SHOWN, survey
from qlora_trainer.errors import NothingLeft, TrainerError

if TYPE_CHECKING:
    from qlora_trainer.data.dataset import Facts, LoadedData, Samples
    from qlora_trainer.data.head import Head
    from qlora_trainer.data.packing import StepSchedule

FEW_RECORDS = 50
"""Fewer teach a style at best."""
MUCH = 0.05
"""Share of the records above which a loss is worth a warning."""
RAW = (
    "prompts and completions that are texts are trained on as raw text, but the model has a chat template: if it is "
    "asked through that one later, give messages, or name the columns instruction and output"
)


def check(run: RunConfig, volumes: Mapping[str, Path], *, with_model: bool) -> CheckReport:
    """Look at all of a job's data.

    Args:
        run: the job.
        volumes: claim -> directory.
        with_model: whether to tokenize them, which needs the model's tokenizer.

    Raises:
        TrainerError: what would end the job, but for single bad records: those are told in the report.
        InvalidUriError: a source is on a claim that has no directory here.
    """
    roots, files = _found(run, volumes)
    lenient = _lenient(run.dataset)  # all bad records are told, whatever the job would make of them
    told = ""
    steps: Steps | None = None
    time: TimeEstimate | None = None
    why_no_time: list[str] = []
    few: list[str] = []
    template = False
    if with_model:
        training, evaluation, samples, steps, template, told = _with_model(run, lenient, roots, volumes)
        try:
            time = time_on(run, resolve(run.model_uri, volumes), training, evaluation, steps)
        except TrainerError as error:
            why_no_time = [f"the model itself could not be trained on: {error}"]
        few = few_steps(steps, training.tokens, run.training)
    else:
        training, evaluation, samples = survey(lenient, files)
    cannot_improve = (
        evaluation is None and not run.dataset.eval_fraction and run.evaluation.require_improvement
    )
    return CheckReport(
        files=_data_files(files),
        unread=[
            column
            for source, (to_train, _) in zip(run.dataset.all_sources, files, strict=True)
            for column in unread_columns(source, to_train[0])
        ],
        unit="tokens" if with_model else "characters",
        training=training,
        evaluation=evaluation,
        steps=steps,
        time=time,
        samples=samples,
        problems=[
            *problems(run.dataset, training, "training"),
            *(problems(run.dataset, evaluation, "evaluation") if evaluation else []),
        ],
        warnings=[
            *([NOTHING_HELD_OUT] if cannot_improve else []),
            *warnings(training, evaluation, has_template=template),
            *few,
            *why_no_time,
        ],
        told=told,
    )


def preview(run: RunConfig, shape: ModelShape, volumes: Mapping[str, Path], head: "Head") -> CheckReport:
    """Look at the beginning of a job's data as its ranks will: for the condition DataChecked, before there are any.

    Args:
        run: the job.
        shape: the model's.
        volumes: claim -> directory; empty in a pod.
        head: bounds how much is read.

    Raises:
        TrainerError: what will surely end the job. NothingLeft may be raised of a beginning only, where that proves
            nothing: `head` knows.
        InvalidUriError: a source is on a claim that has no directory here.
    """
    from qlora_trainer.training.inputs import into_passing_files, load_inputs, step_schedule

    _, files = _found(run, volumes)
    # Where bad records are left out, how many may be is a share of all of them.
    skips = run.dataset.on_bad_record == "skip"
    looked_at = run.model_copy(update={"dataset": _lenient(run.dataset)}) if skips else run
    tokenizer, data = load_inputs(
        looked_at,
        shape,
        volumes,
        datetime.datetime.now().astimezone(),
        by=lambda source: into_passing_files(source, head),
    )
    training, evaluation = _stats(data)
    too_bad = [
        *problems(run.dataset, training, "training"),
        *(problems(run.dataset, evaluation, "evaluation") if evaluation else []),
    ]
    if too_bad and not head.cut:
        raise NothingLeft(f"{'; '.join(too_bad)}; {data.told()}")
    steps = None if head.cut else steps_of(run, step_schedule(run, data))
    return CheckReport(
        files=_data_files(files),
        unit="tokens",
        training=training,
        evaluation=evaluation,
        steps=steps,
        samples=[],
        problems=[],
        warnings=[
            *too_bad,
            *warnings(training, evaluation, has_template=bool(tokenizer.chat_template)),
            *(few_steps(steps, training.tokens, run.training) if steps else []),
            *_idle_ranks(run, steps),
        ],
        told=data.told(),
        first=head.looked_at if head.cut else None,
    )


def _idle_ranks(run: RunConfig, steps: Steps | None) -> list[str]:
    """That there is too little for all ranks to do, where their number and the steps are known."""
    if steps is None or (run.layout.ranks_per_pod == "auto" and run.layout.ranks is None):
        return []
    idle = ranks_without_work(steps.bins(run.training), steps.per_epoch, run.layout.world_size, run.training)
    return [] if idle is None else [idle]


def _found(run: RunConfig, volumes: Mapping[str, Path]) -> tuple[list[Path], list[Files]]:
    """Where each source is, and its files. Raises TrainerError or InvalidUriError."""
    roots = [resolve(uri, volumes) for uri in run.dataset_uris]
    files: list[Files] = []
    for number, (source, root) in enumerate(zip(run.dataset.all_sources, roots, strict=True)):
        with named(run.dataset.all_sources, number):
            files.append(find_files(source, root))
    return roots, files


def _lenient(dataset: Dataset) -> Dataset:
    """The dataset of a job that goes on without any bad record, however many they are."""
    return dataset.model_copy(update={"on_bad_record": "skip", "max_bad_share": 1.0})


def _data_files(files: Sequence[Files]) -> list[DataFile]:
    return [DataFile(name=path.name, content=content_of(path)) for to_train, _ in files for path in to_train]


def _stats(data: "LoadedData") -> tuple[SplitStats, SplitStats | None]:
    """Of training and evaluation."""
    evaluation = None
    if data.evaluation is not None and data.evaluation_facts is not None:
        evaluation = split_stats(data.evaluation, data.evaluation_facts)
    return split_stats(data.train, data.train_facts), evaluation


def _with_model(
    run: RunConfig, lenient: Dataset, roots: Sequence[Path], volumes: Mapping[str, Path]
) -> tuple[SplitStats, SplitStats | None, list[list[TextSpan]], Steps, bool, str]:
    from qlora_trainer.data.tokenization import render
    from qlora_trainer.modeling.families import read_tokenizer
    from qlora_trainer.training.inputs import (
        TokenSource,
        into_passing_files,
        step_schedule,
        tokenization_options,
    )

    folder = resolve(run.model_uri, volumes)
    tokenizer = read_tokenizer(folder)
    began = datetime.datetime.now().astimezone()
    options = tokenization_options(run, tokenizer, folder, roots, began)
    data = into_passing_files(TokenSource(lenient, roots, tokenizer, run.own_tokens, options))
    schedule = step_schedule(run, data)
    numbers = sorted({0, len(data.train) // 2, len(data.train) - 1})[:SHOWN]
    samples = [
        [
            TextSpan(text=text, supervised=learned)
            for text, learned in render(*data.train.sample(n), tokenizer)
        ]
        for n in numbers
    ]
    training, evaluation = _stats(data)
    return (
        training,
        evaluation,
        samples,
        steps_of(run, schedule),
        bool(tokenizer.chat_template),
        data.told(),
    )


def time_on(
    run: RunConfig, folder: Path, training: SplitStats, evaluation: SplitStats | None, steps: Steps
) -> TimeEstimate | None:
    """How long the steps and evaluations take with a model, by its config.json; None where it is not there.

    Args:
        run: the job, with the layout and the processors that it would have.
        folder: the model's.
        training: what is trained on.
        evaluation: what is held out, which evaluation.maxTokens bounds.
        steps: of the training.

    Raises TrainerError for a model that cannot be trained on.
    """
    from qlora_trainer.modeling.shape import model_shape
    from qlora_trainer.modeling.weight_files import has_weights
    from qlora_trainer.training.inputs import default_compute_dtype

    if not ((folder / "config.json").is_file() or has_weights(folder)):
        return None
    shape = model_shape(folder, run.adapter, weights=has_weights(folder))
    dtype = default_compute_dtype(run, [run.isa])
    chosen = memory.choose(shape, run, dtype, training.samples)
    if evaluation is not None and evaluation.tokens > run.evaluation.max_tokens:
        share = run.evaluation.max_tokens / evaluation.tokens
        bounded = ("samples", "tokens", "supervised_tokens")
        evaluation = evaluation.model_copy(
            update={name: max(1, round(share * getattr(evaluation, name))) for name in bounded}
        )
    plan = PlanReport(
        compute_dtype=dtype,
        shape=shape,
        memory=MemoryFigures.of(chosen),
        training=training,
        evaluation=evaluation,
        steps=steps,
        sample=[],
    )
    return time_of(run, plan)


def problems(dataset: Dataset, split: SplitStats, use: str) -> list[str]:
    """Why a job would refuse a split that was looked at leniently."""
    found = []
    parts: Sequence[SplitStats | SourceStats] = split.sources or [split]
    for part in parts:
        count = sum(bad.count for bad in part.bad)
        total = count + part.records
        if not count or (dataset.on_bad_record == "skip" and count <= dataset.max_bad_share * total):
            continue
        remedy = (
            "mend them, or set dataset.onBadRecord: skip (and dataset.maxBadShare, if they are many)"
            if dataset.on_bad_record == "fail"
            else f"more than dataset.maxBadShare {dataset.max_bad_share:g} allows"
        )
        of = f" of {part.source}" if isinstance(part, SourceStats) else ""
        found.append(f"{count:,} {use} record(s){of} cannot be trained on; {remedy}")
    return found


def warnings(training: SplitStats, evaluation: SplitStats | None, *, has_template: bool) -> list[str]:
    """What may not be as it was meant.

    Args:
        training: what is trained on.
        evaluation: what is held out.
        has_template: whether the model has a chat template.
    """
    records = training.records
    found = []
    if records < FEW_RECORDS:
        found.append(f"{records:,} record(s) to train on: enough to try things, hardly to learn from")
    if training.duplicates > MUCH * records:
        found.append(
            f"{training.duplicates:,} of {records:,} training records say the same as an earlier one, and count as "
            "often as they stand there"
        )
    if evaluation is not None and evaluation.overlap:
        found.append(
            f"{evaluation.overlap:,} of {evaluation.records:,} evaluation records are trained on as well, so the "
            "evaluation flatters; take them out of one of the two"
        )
    if training.truncated > MUCH * records:
        found.append(
            f"{training.truncated:,} of {records:,} training samples are longer than training.maxSequenceLength and "
            "lose their ends; raise it if the ends matter"
        )
    if cut := training.dropped - training.overlong:
        found.append(
            f"{cut:,} training samples are left out, because what is to be learned lies beyond "
            "training.maxSequenceLength"
        )
    if training.label:
        found.append(training.label)
    if training.raw and has_template:
        found.append(RAW)
    return found


def split_stats(samples: "Samples", facts: "Facts") -> SplitStats:
    """The counts of a split."""
    return SplitStats(
        format=facts.format,
        records=facts.records,
        bad=list(facts.bad),
        truncated=facts.truncated,
        dropped=facts.dropped,
        left_out=facts.records - facts.dropped - len(samples),
        samples=len(samples),
        tokens=len(samples.ids),
        supervised_tokens=int(samples.mask.sum(dtype="int64")),
        duplicates=facts.duplicates,
        overlap=facts.overlap,
        overlong=facts.overlong,
        raw=facts.raw,
        label=facts.label,
        lengths=list(facts.lengths),
        sources=list(facts.sources),
    )


def steps_of(run: RunConfig, schedule: "StepSchedule") -> Steps:
    """The steps of the first epoch and of the whole training."""
    tokens, per_epoch = schedule.first_epoch()
    return Steps(
        per_epoch=per_epoch,
        total=schedule.total_steps,
        epochs=schedule.epochs_done(schedule.total_steps),
        tokens_per_step=sum(tokens) / per_epoch,
        fill=sum(tokens) / (len(tokens) * run.training.max_sequence_length),
    )
