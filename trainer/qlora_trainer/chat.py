"""Answers questions with a job's model, as it was trained: for `qlora chat` and `qlora compare`.

    python -m qlora_trainer.chat [RUN_JSON]

Reads requests from standard input and writes events to standard output, as qlora_contract.chat says. RUN_JSON: the
job's; without it, where pods have it. The job's folder is only read, also while the job trains.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from qlora_contract.chat import Answer, ChatEvent, ChatReady, ChatRequest, OpenRequest, Piece, Question
from qlora_contract.env import RUN_CONFIG_ENV
from qlora_contract.exit_codes import ExitCode
from qlora_contract.job_folder import (
    CHAT_TEMPLATE,
    IdentityError,
    finished_report,
    has_identity,
    job_path,
)
from qlora_contract.paths import RUN_CONFIG_PATH, resolve, volume_map
from qlora_contract.plan import PlanError
from qlora_contract.run_config import RunConfig
from qlora_contract.units import first_line
from qlora_trainer.artifacts import checkpoint
from qlora_trainer.artifacts.adapter import reload_adapter
from qlora_trainer.data.chat_template import ChatTemplate
from qlora_trainer.data.records import Chat, Message
from qlora_trainer.errors import ConfigurationError, DataError, ModelError, TrainerError, expected
from qlora_trainer.host.isa import probe_isa
from qlora_trainer.inference.generation import Sampling, stream
from qlora_trainer.inference.prompts import GrowingText, Prompt, Prompter, prompt_of_record
from qlora_trainer.modeling.adapter_methods import adapters_disabled, method_for
from qlora_trainer.modeling.adapter_parameters import AdapterParameters
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.families import read_config, read_tokenizer
from qlora_trainer.modeling.image_cache import ImageCache
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.shape import positions
from qlora_trainer.modeling.weight_files import WeightsHash
from qlora_trainer.quantization.schemes import scheme_of
from qlora_trainer.run_file import RunFileError, load_run
from qlora_trainer.storage.job_folder import JobFolder
from qlora_trainer.training.inputs import default_compute_dtype, stop_ids, template_settings
from qlora_trainer.training.setup import DTYPES
from qlora_trainer.transfer.revisions import with_pinned_revisions

USAGE = "usage: python -m qlora_trainer.chat [RUN_JSON]"
LOOKS = 3
"""How often the newest checkpoint is looked for: while a job trains, an old one may vanish as it is read."""
CHAT_POD = -1
"""Among those that use a workspace's cache, no pod of the job, which may be training meanwhile."""
CONVERSATION_FORMATS = ("chat", "alpaca")

Tell = Callable[[ChatEvent], None]


@dataclass(frozen=True)
class TrainedAdapter:
    """What a job has learned so far."""

    path: Path
    finished: bool
    """Whether it is the finished adapter; else a checkpoint."""
    step: int | None
    weights_sha256: str
    """Of the base that it was trained on (LoopState.weights_sha256); empty where that is not known."""
    template_digest: str | None
    """Of a checkpoint: ChatTemplate.digest() of what its conversations were written with; empty without any. None: not
    known."""

    @property
    def template_file(self) -> Path:
        """The chat template that a finished adapter of conversations brings."""
        return self.path / CHAT_TEMPLATE

    @property
    def conversation(self) -> bool | None:
        """Whether it was trained on conversations; None: not known."""
        if self.finished:
            return self.template_file.is_file()
        return None if self.template_digest is None else bool(self.template_digest)

    def load(self, parameters: AdapterParameters) -> None:
        """Load its tensors. Raises TrainerError when they are of other layers or shapes."""
        if self.finished:
            reload_adapter(self.path, parameters)
        else:
            checkpoint.load_adapter(self.path, parameters)


def find_adapter(folder: JobFolder) -> TrainedAdapter:
    """The job's finished adapter, or its newest checkpoint.

    Raises:
        ConfigurationError: the folder belongs to another spec, or holds neither.
    """
    try:
        has_identity(folder.path, folder.run)
    except IdentityError as error:
        raise ConfigurationError(str(error)) from error
    newest = checkpoint.newest_valid(folder)
    state = checkpoint.read_state(newest) if newest else None
    if (report := finished_report(folder.path)) is not None:
        by_report = report.get("provenance", {}).get("weights_sha256")
        weights = by_report or (state.weights_sha256 if state else "")
        return TrainedAdapter(
            folder.adapter,
            finished=True,
            step=report.get("steps"),
            weights_sha256=weights,
            template_digest=None,
        )
    if newest is None or state is None:
        raise ConfigurationError(
            f"{folder.path} has neither an adapter nor a checkpoint yet: wait for the first checkpoint, or ask the "
            "base alone"
        )
    return TrainedAdapter(
        newest,
        finished=False,
        step=state.step,
        weights_sha256=state.weights_sha256,
        template_digest=state.token_digests.get("chat template"),
    )


@dataclass(frozen=True)
class Assistant:
    """A job's model, ready to answer."""

    model: BaseModel
    prompter: Prompter
    positions: int | None
    """The longest sequence, in tokens."""
    columns: Mapping[str, str]
    """dataset.columns of the job."""
    ready: ChatReady

    def answer(self, request: ChatRequest, tell: Tell) -> None:
        """Answer a request.

        Raises:
            DataError: a question cannot be asked.
        """
        prompts = [self._prompt(question, request.system) for question in request.questions]
        ids = [self.prompter.ids(prompt) for prompt in prompts]
        limit = request.max_tokens
        if self.positions is not None:
            longest = max(map(len, ids))
            limit = min(limit, self.positions - self.model.virtual_tokens - longest)
            if limit < 1:
                raise DataError(
                    f"the conversation has {longest} tokens, and the model reads {self.positions}: begin a new one, "
                    "or shorten it"
                )
        sampling = Sampling(request.temperature, request.top_p, request.seed)
        texts = [GrowingText(self.prompter.text) for _ in ids]

        def run() -> None:
            for number, token in stream(
                self.model,
                ids,
                max_new_tokens=limit,
                stop_tokens=self.prompter.stop_tokens,
                sampling=sampling,
            ):
                _tell_piece(tell, number, texts[number].add(token))
            for number, text in enumerate(texts):
                _tell_piece(tell, number, text.end())

        if request.adapter:
            run()
        else:
            with adapters_disabled(self.model):
                run()
        answers = [
            Answer(
                prompt=prompt.last,
                text=self.prompter.text(text.ids),
                tokens=len(text.ids),
                cut=len(text.ids) == limit,
                expected=prompt.expected,
            )
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        tell(ChatEvent(answers=answers))

    def _prompt(self, question: Question, system: str | None) -> Prompt:
        if question.record is not None:
            return prompt_of_record(question.record, self.columns)
        if question.turns is not None:
            turns = tuple(Message(turn.role, turn.content) for turn in question.turns)
            return Prompt(Chat(turns))
        assert question.text is not None
        if not self.ready.conversation:
            return Prompt(question.text)
        first = (Message("system", system),) if system else ()
        return Prompt(Chat((*first, Message("user", question.text))))


def _tell_piece(tell: Tell, number: int, text: str) -> None:
    if text:
        tell(ChatEvent(piece=Piece(question=number, text=text)))


def open_assistant(run: RunConfig, volumes: Mapping[str, Path], *, base_only: bool) -> Assistant:
    """Load a job's base, its adapter, and what writes its prompts.

    Args:
        run: the job.
        volumes: claim -> directory; empty in a pod.
        base_only: without the adapter.

    Raises:
        TrainerError: there is no adapter, the model cannot be read, or the adapter belongs to another base.
        InvalidUriError: a claim has no directory here.
    """
    run = with_pinned_revisions(run, volumes, ["model"])
    folder = JobFolder(job_path(run.workspace, run.job.name, volumes), run)
    adapter = None if base_only else find_adapter(folder)
    model_folder = resolve(run.model_uri, volumes)
    config = read_config(model_folder)
    tokenizer = read_tokenizer(model_folder)
    template = _template(run, folder, tokenizer, adapter, model_folder, volumes)
    dtype = default_compute_dtype(run, [probe_isa()])
    model, weights = _load_base(run, model_folder, DTYPES[dtype], volumes)
    notes: list[str] = []
    if adapter is not None:
        notes += _check_base(adapter, weights, model_folder)
        adapter = _attach(run, model, folder, adapter)
    return Assistant(
        model,
        Prompter(tokenizer, template, stop_ids(model_folder)),
        positions(config),
        run.dataset.columns.model_dump(exclude_none=True),
        ChatReady(
            model=str(model_folder),
            adapter=str(adapter.path) if adapter else None,
            step=adapter.step if adapter else None,
            finished=adapter is not None and adapter.finished,
            conversation=template is not None,
            scheme=run.quantization.scheme,
            compute_dtype=dtype,
            notes=notes,
        ),
    )


def _load_base(
    run: RunConfig, model_folder: Path, dtype: torch.dtype, volumes: Mapping[str, Path]
) -> tuple[BaseModel, str]:
    """The quantized base, and the hash of its weights: mapped where the job has left its image, else quantized anew.

    Raises ModelError: the weights cannot be used.
    """
    threads = torch.get_num_threads()
    owner = (run.job.uid, run.job.attempt, CHAT_POD)
    images = ImageCache(resolve(run.workspace, volumes), owner, model_folder, run.quantization, dtype)
    if (key := images.known()) is not None and (image := images.read(key, threads)) is not None:
        return image.model(dtype), image.weights_sha256
    weights_hash = WeightsHash(threads)
    model = load_model(model_folder, scheme_of(run.quantization), dtype, weights_hash=weights_hash)
    return model, weights_hash.hexdigest()


def _template(
    run: RunConfig,
    folder: JobFolder,
    tokenizer: Any,
    adapter: TrainedAdapter | None,
    model_folder: Path,
    volumes: Mapping[str, Path],
) -> ChatTemplate | None:
    """What the job's conversations are written with; None where it has none.

    Raises ConfigurationError when that is not what the adapter was trained with.
    """
    dataset = run.dataset
    brought = adapter is not None and adapter.finished and adapter.template_file.is_file()
    if brought:  # what the job names may be gone by now
        dataset = dataset.model_copy(update={"chat_template": None})
    folders = (*_data_folder(run, volumes), model_folder)
    settings = template_settings(dataset, tokenizer, folder.began(), stop_ids(model_folder), folders=folders)
    conversation = adapter.conversation if adapter else None
    if conversation is None:
        known = run.dataset.format != "auto"
        has_template = bool(settings.source or tokenizer.chat_template)
        conversation = run.dataset.format in CONVERSATION_FORMATS if known else has_template
    if not conversation:
        return None
    if brought and adapter is not None:
        settings = replace(settings, source=adapter.template_file.read_text(encoding="utf-8"))
    template = ChatTemplate(tokenizer, settings)
    if adapter is not None and adapter.template_digest and template.digest() != adapter.template_digest:
        raise ConfigurationError(
            f"the chat template is not the one that {adapter.path} was trained with, so the model would be asked "
            "otherwise than it was trained: restore the old one"
        )
    return template


def _data_folder(run: RunConfig, volumes: Mapping[str, Path]) -> list[Path]:
    """Where a template may lie beside the data; nowhere where they are not at hand."""
    try:
        roots = [resolve(uri, volumes) for uri in run.dataset_uris]
    except ValueError:  # not fetched, or on a claim that has no directory here
        return []
    return [root if root.is_dir() else root.parent for root in roots]


def _check_base(adapter: TrainedAdapter, weights: str, model_folder: Path) -> list[str]:
    """What to say of a base that cannot be compared. Raises ModelError for another than the adapter's."""
    if not adapter.weights_sha256:
        return [
            "the job's release kept no hash of the base's weights: whether this is the same base is not checked"
        ]
    if adapter.weights_sha256 != weights:
        raise ModelError(
            f"the weights of {model_folder} are not those that {adapter.path} was trained on (sha256 "
            f"{adapter.weights_sha256[:12]}, now {weights[:12]}): an adapter means nothing on another base; restore "
            "the old model"
        )
    return []


def _attach(run: RunConfig, model: BaseModel, folder: JobFolder, adapter: TrainedAdapter) -> TrainedAdapter:
    """Give the model its adapter; the one that was loaded, which is a newer one where that has vanished meanwhile."""
    parameters = method_for(run.adapter).attach(model, seed=run.training.seed, dropout=None)
    for look in range(LOOKS):
        try:
            adapter.load(parameters)
            break
        except FileNotFoundError:
            if look == LOOKS - 1:
                raise
            newer = find_adapter(folder)
            if newer.weights_sha256 != adapter.weights_sha256:
                raise
            adapter = newer
    return adapter


def serve(lines: Iterable[str], tell: Tell, opened: Callable[[OpenRequest], Assistant]) -> int:
    """Answer requests until there are no more; the exit code.

    Args:
        lines: requests.
        tell: takes events.
        opened: loads the model.
    """
    requests = iter(lines)
    first = next(requests, None)
    if first is None:
        return 0
    try:
        assistant = opened(OpenRequest.model_validate_json(first))
    except Exception as error:  # whatever it is, whoever asks must read why
        failure = _failure(error, "loading the model")
        tell(ChatEvent(error=failure))
        return failure.code
    tell(ChatEvent(ready=assistant.ready))
    for line in requests:
        try:
            assistant.answer(ChatRequest.model_validate_json(line), tell)
        except BrokenPipeError:
            raise
        except Exception as error:  # the next question may be another
            tell(ChatEvent(error=_failure(error, "answering")))
    return 0


def _failure(error: Exception, doing: str) -> PlanError:
    """The code and sentence for a failure."""
    if isinstance(error, RunFileError):
        return PlanError(code=error.code, cause=str(error))
    if isinstance(error, ValidationError):
        return PlanError(code=ExitCode.INVALID_CONFIGURATION, cause=f"no request: {first_line(error)}")
    known = expected(error, doing) or TrainerError(f"unexpected {type(error).__name__}: {first_line(error)}")
    return PlanError(code=known.exit_code, cause=str(known))


def main(arguments: Sequence[str]) -> int:
    """The program; its exit code."""
    match arguments:
        case []:
            path = Path(os.environ.get(RUN_CONFIG_ENV, RUN_CONFIG_PATH))
        case [name]:
            path = Path(name)
        case _:
            print(USAGE, file=sys.stderr)
            return 2
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no event

    def tell(event: ChatEvent) -> None:
        print(json.dumps(event.model_dump(by_alias=True, exclude_none=True)), file=events, flush=True)

    def opened(request: OpenRequest) -> Assistant:
        return open_assistant(load_run(path), volume_map(), base_only=request.base_only)

    try:
        return serve(sys.stdin, tell, opened)
    except (BrokenPipeError, KeyboardInterrupt):
        return 0  # nobody listens any more


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
