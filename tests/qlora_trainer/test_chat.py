"""What a job's model answers, and when it refuses to."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_contract import entry_points
from qlora_contract.chat import Answer, ChatEvent, ChatReady, ChatRequest, OpenRequest, Question
from qlora_contract.env import VOLUMES_ENV
from qlora_contract.exit_codes import ExitCode
from qlora_contract.paths import resolve
from qlora_contract.run_config import Quantization
from qlora_trainer import chat
from qlora_trainer.chat import open_assistant, serve
from qlora_trainer.data.chat_template import ChatTemplate, TemplateSettings
from qlora_trainer.data.records import Chat, Message, Record
from qlora_trainer.data.tokenization import Tokenization
from qlora_trainer.inference.generation import generate
from qlora_trainer.inference.prompts import Prompt, Prompter, prompt_of_record
from qlora_trainer.modeling import image_cache
from qlora_trainer.modeling.adapter_methods import method_for
from qlora_trainer.modeling.image_cache import ImageCache
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.quantization.schemes import Unquantized
from trained_jobs import CLAIM, MakeJob, TrainedJob, a_chat_run, write_model

pytestmark = pytest.mark.process

SHORT = 12
"""Tokens of an answer."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer: Callable[..., Any]) -> Any:
    """One token for each byte, and ChatML."""
    return byte_tokenizer()


@pytest.fixture
def make_job(tmp_path: Path, tokenizer: Any) -> MakeJob:
    """make(**fields of the run) -> a job with its model, that has learned nothing yet."""

    def make(**fields: Any) -> TrainedJob:
        write_model(tmp_path / "model", tokenizer)
        return TrainedJob(tmp_path, a_chat_run(**fields))

    return make


def ask(job: TrainedJob, *requests: ChatRequest, base_only: bool = False) -> list[ChatEvent]:
    """What the program says: first whether it is ready."""
    events: list[ChatEvent] = []
    lines = [OpenRequest(base_only=base_only), *requests]
    serve(
        [line.model_dump_json(by_alias=True) for line in lines],
        events.append,
        lambda request: open_assistant(job.run, job.volumes, base_only=request.base_only),
    )
    return events


def ready(events: list[ChatEvent]) -> ChatReady:
    """What answers, which there must be."""
    assert events[0].ready is not None, events[0].error
    return events[0].ready


def request(*texts: str, **fields: Any) -> ChatRequest:
    """Questions of one message each."""
    return ChatRequest(questions=[Question(text=text) for text in texts], max_tokens=SHORT, **fields)


def answers(events: Iterable[ChatEvent]) -> list[Answer]:
    """All answers."""
    return [answer for event in events for answer in event.answers or ()]


def by_hand(job: TrainedJob, tokenizer: Any, text: str, seed: int | None) -> str:
    """The greedy answer to one message of a user, in ChatML; seed: of the adapter, None for the base."""
    model = load_model(job.model_folder, Unquantized(), torch.float32)
    if seed is not None:
        own = method_for(job.run.adapter).attach(model, seed=0, dropout=None)
        own.flat.data.copy_(job.adapter(seed)[0].flat.data)
    prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    stop = {tokenizer.eos_token_id}
    answer = generate(model, [ids], max_new_tokens=SHORT, stop_tokens=stop)[0]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def test_the_finished_adapter_answers_and_the_base_beside_it(make_job: MakeJob, tokenizer: Any) -> None:
    """Both answer as generation by hand does, in pieces that make up the whole."""
    job = make_job()
    adapter = job.finish(tokenizer.chat_template)
    job.save_checkpoint(tokenizer, 9)  # an older one may lie beside it
    events = ask(job, request("Is it?", "No?"), request("Is it?", adapter=False))
    first, second, base = answers(events)
    pieces = [event.piece for event in events if event.piece]

    assert ready(events).model_dump(exclude_defaults=True) == {
        "model": str(job.model_folder), "adapter": str(adapter), "step": 7, "finished": True, "scheme": "none",
        "compute_dtype": "fp32",
    }  # fmt: skip
    assert first.text == by_hand(job, tokenizer, "Is it?", seed=1)
    assert second.text == by_hand(job, tokenizer, "No?", seed=1)
    assert base.text == by_hand(job, tokenizer, "Is it?", seed=None) != first.text
    assert (first.prompt, second.prompt, first.expected) == ("Is it?", "No?", None)
    assert "".join(piece.text for piece in pieces if piece.question == 1) == second.text


def test_while_it_trains_the_newest_whole_checkpoint_answers(make_job: MakeJob, tokenizer: Any) -> None:
    """A newer one that is damaged is passed over; the folder is left as it is."""
    job = make_job()
    job.save_checkpoint(tokenizer, 3)
    newest = job.save_checkpoint(tokenizer, 5)
    damaged = job.save_checkpoint(tokenizer, 8)
    (damaged / "state.json").write_text("{}")
    before = sorted(path.name for path in job.folder.path.rglob("*"))
    events = ask(job, request("Is it?"))

    assert (ready(events).adapter, ready(events).step, ready(events).finished) == (str(newest), 5, False)
    assert answers(events)[0].text == by_hand(job, tokenizer, "Is it?", seed=5)
    assert sorted(path.name for path in job.folder.path.rglob("*")) == before


def test_the_image_that_the_job_has_left_is_mapped(
    make_job: MakeJob, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is not quantized again, and answers the same; where the image is damaged, it is."""
    monkeypatch.setattr(image_cache, "SETTLED_SECONDS", -1.0)
    job = make_job(quantization=Quantization())
    job.finish(tokenizer.chat_template)
    expected = answers(ask(job, request("Is it?")))
    workspace = resolve(job.run.workspace, job.volumes)
    images = ImageCache(workspace, ("uid", 0, 0), job.model_folder, job.run.quantization, torch.float32)
    assert images.can_keep(1, 1)
    key = images.write(1)
    assert key is not None

    with monkeypatch.context() as patched:
        patched.setattr(chat, "load_model", lambda *_, **__: pytest.fail("the model was quantized"))
        assert answers(ask(job, request("Is it?"))) == expected
    weights = images.folder / key / "weights"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert answers(ask(job, request("Is it?"))) == expected


def change_a_weight(job: TrainedJob) -> None:
    """One number of the base becomes another."""
    file = job.model_folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})


def change_the_template(job: TrainedJob) -> None:
    """The tokenizer brings another chat template."""
    file = job.model_folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant", "model"))


def of_another_spec(job: TrainedJob) -> None:
    """The folder's job had another seed."""
    other = a_chat_run(training={"seed": 5})
    (job.folder.path / "identity.json").unlink()
    TrainedJob(job.root, other)


REFUSED: dict[str, tuple[bool, Callable[[TrainedJob], None], ExitCode, str]] = {
    "another base, finished": (True, change_a_weight, ExitCode.MODEL_UNUSABLE, "an adapter means nothing on another"),
    "another base, training": (False, change_a_weight, ExitCode.MODEL_UNUSABLE, "an adapter means nothing on another"),
    "another template": (False, change_the_template, ExitCode.INVALID_CONFIGURATION, "restore the old one"),
    "another spec": (True, of_another_spec, ExitCode.INVALID_CONFIGURATION, "training.seed"),
}  # fmt: skip


@pytest.mark.parametrize(("finished", "damage", "code", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_adapter_that_does_not_belong_is_refused(
    finished: bool,
    damage: Callable[[TrainedJob], None],
    code: ExitCode,
    message: str,
    make_job: MakeJob,
    tokenizer: Any,
) -> None:
    """Neither on other weights, nor asked otherwise than it was trained, nor of another job."""
    job = make_job()
    if finished:
        job.finish(tokenizer.chat_template)
    else:
        job.save_checkpoint(tokenizer, 3)
    damage(job)
    events = ask(job, request("Is it?"))

    assert len(events) == 1
    assert events[0].error is not None
    assert events[0].error.code == code
    assert message in events[0].error.cause


def test_a_finished_adapter_keeps_its_own_template(make_job: MakeJob, tokenizer: Any) -> None:
    """What the adapter brings writes the prompts, whatever the tokenizer has become."""
    job = make_job()
    job.finish(tokenizer.chat_template)
    change_the_template(job)

    assert answers(ask(job, request("Is it?")))[0].text == by_hand(job, tokenizer, "Is it?", seed=1)


def test_the_base_alone_needs_no_job(make_job: MakeJob, tokenizer: Any) -> None:
    """Before a first checkpoint there is no adapter, which is said; the base answers."""
    job = make_job()
    refused = ask(job)[0].error
    events = ask(job, request("Is it?"), base_only=True)

    assert refused is not None
    assert "neither an adapter nor a checkpoint yet" in refused.cause
    assert ready(events).adapter is None
    assert answers(events)[0].text == by_hand(job, tokenizer, "Is it?", seed=None)


def test_an_unknown_base_is_said_to_be_unchecked(make_job: MakeJob, tokenizer: Any) -> None:
    """An adapter of a release that kept no hash is used, and the user is told."""
    job = make_job()
    job.finish(tokenizer.chat_template, provenance={})

    assert "not checked" in ready(ask(job)).notes[0]


def test_a_job_of_prompts_continues_texts(make_job: MakeJob, tokenizer: Any) -> None:
    """Without conversations there is no template: a prompt stands as it was trained, and ends as it ended."""
    job = make_job(dataset={"format": "prompt-completion"})
    job.finish(None)
    question = Question(record={"prompt": "2 + 2 = ", "completion": "4"})
    events = ask(job, request("2 + 2 = "), ChatRequest(questions=[question], max_tokens=SHORT))
    plain, record = answers(events)
    model = load_model(job.model_folder, Unquantized(), torch.float32)
    method_for(job.run.adapter).attach(model, seed=0, dropout=None).flat.data.copy_(
        job.adapter(1)[0].flat.data
    )
    ids = tokenizer("2 + 2 = ").input_ids
    expected = generate(model, [ids], max_new_tokens=SHORT, stop_tokens={tokenizer.eos_token_id})[0]

    assert not ready(events).conversation
    assert plain.text == record.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert record.expected == "4"


def test_a_question_that_cannot_be_asked_leaves_the_next_one(make_job: MakeJob, tokenizer: Any) -> None:
    """What is wrong is said for each request, and the program goes on."""
    job = make_job()
    job.finish(tokenizer.chat_template)
    long = request("x" * 600)
    nothing = ChatRequest(questions=[Question(record={"text": "a document"})])
    events = ask(job, long, nothing, request("Is it?"))
    causes = [event.error.cause for event in events if event.error]

    assert [("the model reads 512" in causes[0]), ("must be a conversation" in causes[1])] == [True, True]
    assert answers(events)[0].text == by_hand(job, tokenizer, "Is it?", seed=1)


def test_an_answer_may_not_be_longer_than_the_model_reads(make_job: MakeJob, tokenizer: Any) -> None:
    """Near the model's last position an answer is cut there."""
    job = make_job()
    job.finish(tokenizer.chat_template)
    used = len(tokenizer("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n").input_ids)
    events = ask(job, request("x" * (512 - used - 3)))

    assert answers(events)[0].tokens <= 3


RECORDS: dict[str, tuple[dict[str, Any], list[tuple[str, str]] | str, str | None]] = {
    "messages": (
        {"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]},
        [("user", "A?")], "B.",
    ),
    "a conversation that waits": (
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "A?"}]},
        [("system", "S"), ("user", "A?")], None,
    ),
    "a system message beside it": (
        {"messages": [{"role": "user", "content": "A?"}], "system": "S"}, [("system", "S"), ("user", "A?")], None,
    ),
    "alpaca": ({"instruction": "Do.", "input": "it", "output": "Done."}, [("user", "Do.\nit")], "Done."),
    "alpaca without an answer": ({"instruction": "Do."}, [("user", "Do.")], None),
    "prompt": ({"prompt": "A"}, "A", None),
    "prompt and completion": ({"prompt": "A", "completion": "B"}, "A", "B"),
    "messages as a prompt": ({"prompt": [{"role": "user", "content": "A?"}]}, [("user", "A?")], None),
}  # fmt: skip


@pytest.mark.parametrize(("record", "asked", "expected"), RECORDS.values(), ids=RECORDS.keys())
def test_a_record_asks_what_stands_before_its_answer(
    record: dict[str, Any], asked: list[tuple[str, str]] | str, expected: str | None
) -> None:
    """Records of every format, with or without the answer that training would need."""
    prompt = prompt_of_record(record, {})
    turns = (
        prompt.asked
        if isinstance(prompt.asked, str)
        else [(m.role, m.content) for m in prompt.asked.messages]
    )

    assert turns == asked
    assert prompt.expected == expected


def test_a_prompt_is_what_training_saw(tokenizer: Any) -> None:
    """The ids of a conversation's prompt begin the sample that is made of it with its answer."""
    asked = (Message("system", "Be brief."), Message("user", "Is it?"))
    answer = Message("assistant", "It is.")
    template = ChatTemplate(tokenizer, TemplateSettings())
    prompter = Prompter(tokenizer, template)
    record = Record("r", Chat((*asked, answer)), b"")
    sample = next(iter(Tokenization(tokenizer, 200).samples([record])))
    ids = prompter.ids(Prompt(Chat(asked)))
    first = int(sample.mask.argmax())

    assert ids == sample.ids[:first].tolist()
    assert int(sample.ids[-1]) in prompter.stop_tokens or int(sample.ids[-2]) in prompter.stop_tokens


def test_the_program_speaks_json_lines_alone(make_job: MakeJob, tokenizer: Any) -> None:
    """Each line of standard output is an event; the end of the input ends it."""
    job = make_job(quantization={"scheme": "nf4"})
    job.finish(tokenizer.chat_template)
    lines = [OpenRequest(), request("Is it?")]
    done = subprocess.run(
        [sys.executable, "-m", entry_points.CHAT, str(job.run_file)],
        input="".join(f"{line.model_dump_json(by_alias=True)}\n" for line in lines),
        env={**os.environ, VOLUMES_ENV: json.dumps({CLAIM: str(job.root)})},
        capture_output=True,
        text=True,
        check=False,
    )
    events = [ChatEvent.model_validate_json(line) for line in done.stdout.splitlines()]

    assert done.returncode == 0, done.stderr
    assert ready(events).scheme == "nf4"
    assert answers(events)[0].text == "".join(event.piece.text for event in events if event.piece)
