"""What happens before the first step: agreement, the base's losses, a resume."""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from qlora_contract.env import CPUS_ENV, PARENT_DEATH_ENV
from qlora_contract.memory import MemoryEstimate
from qlora_contract.paths import resolve
from qlora_contract.progress import Work
from qlora_trainer.artifacts import checkpoint
from qlora_trainer.data.dataset import LoadedData
from qlora_trainer.data.tokenization import Tokenization
from qlora_trainer.distributed import Group, World
from qlora_trainer.errors import ConfigurationError, DataError, ModelError
from qlora_trainer.modeling.shape import model_shape
from qlora_trainer.training import loop, setup
from qlora_trainer.training.context import RankContext, StopHere
from qlora_trainer.training.inputs import TokenSource, load_inputs
from qlora_trainer.training.loop import one_step, save
from qlora_trainer.training.setup import (
    agree_on_inputs,
    allreduce_of,
    check_memory,
    check_same_on_all_ranks,
    check_weights,
    once_per_pod,
    pod_cpus,
    prepare,
    sums_that_vary,
)

pytestmark = pytest.mark.process

Ready = Callable[..., RankContext]


def test_nothing_is_evaluated_before_the_first_step(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user sees it as soon as the model is loaded."""
    monkeypatch.setattr(loop, "evaluate", lambda *_: pytest.fail("evaluates"))
    context = ready()
    state = prepare(context)
    one_step(context, state)

    assert state.loop.step == 1
    assert (state.loop.base_eval_loss, state.loop.base_eval_loss_quantized) == (None, None)


def test_all_that_is_done_before_the_first_step_is_counted(
    ready: Ready, smoke_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records and bytes of weights advance the live report, so that a long start is not taken for a hang."""
    context = ready()
    begin, seen = context.progress.begin, {}

    def noted(work: Work | None) -> None:
        if work is not None:
            seen[work.name] = context.progress.report.advances
        begin(work)

    monkeypatch.setattr(context.progress, "begin", noted)
    prepare(context)
    records = len((smoke_folder / "data.jsonl").read_text().splitlines())
    weights = (smoke_folder / "model" / "model.safetensors").stat().st_size
    advances = context.progress.report.advances

    assert seen == {"tokenizing": None, "loading the model": records}
    assert advances is not None
    assert 0.9 * weights < advances - records <= weights


@pytest.mark.parametrize(
    ("change", "known"),
    [
        pytest.param({}, True, id="the same"),
        pytest.param({"evaluation": {"maxTokens": 100}}, False, id="other samples"),
    ],
)
def test_the_base_is_measured_once_for_each_job(ready: Ready, change: dict[str, Any], known: bool) -> None:
    """What one attempt has found out the next one knows, even without any checkpoint; unless it is of other things."""
    context = ready()
    state = prepare(context)
    one_step(context, state)
    loop.measure_base(context, state, None)
    found = prepare(ready(**change)).loop.base_eval_loss_quantized

    assert state.loop.base_eval_loss_quantized is not None
    assert found == (state.loop.base_eval_loss_quantized if known else None)


@pytest.mark.parametrize(("bound", "known"), [(65_536, True), (100, False)])
def test_losses_in_an_old_checkpoint_count_while_all_samples_are_evaluated(
    ready: Ready, bound: int, known: bool
) -> None:
    """Release 0.1.0 knew no bound, and kept them there alone."""
    context = ready()
    state = prepare(context)
    one_step(context, state)
    state.loop.base_eval_loss, state.loop.base_eval_loss_quantized = 4.0, 4.5
    save(context, state)
    again = prepare(ready(evaluation={"maxTokens": bound})).loop

    losses = (again.base_eval_loss, again.base_eval_loss_quantized)
    assert losses == ((4.0, 4.5) if known else (None, None))


def test_a_resume_continues_bit_for_bit(ready: Ready) -> None:
    """Adapter, moments, losses and position are those of the checkpoint, so the next step is that of the old run."""
    context = ready()
    first = prepare(context)
    one_step(context, first)
    save(context, first)
    again = prepare(ready())
    metrics = [one_step(context, state)[0] for state in (first, again)]

    assert again.loop.not_bit_exact is None
    assert again.loop.base_eval_loss == first.loop.base_eval_loss
    assert metrics[0].line() == {
        **metrics[1].line(),
        **{name: metrics[0].line()[name] for name in ("seconds", "memory_peak")},
    }
    assert torch.equal(again.parameters.flat, first.parameters.flat)


def test_a_resume_under_another_key_says_that_it_is_not_bit_exact(ready: Ready) -> None:
    """The reason names what changed, after those of earlier attempts."""
    context = ready()
    state = prepare(context)
    one_step(context, state)
    state.loop.determinism_key["threads"] = 64
    state.loop.not_bit_exact = "world_size 4 -> 1"
    save(context, state)

    assert prepare(ready()).loop.not_bit_exact == "world_size 4 -> 1; threads 64 -> 1"


@pytest.mark.parametrize("what", ["tier", "processor", "hosts", "transformers"])
def test_another_processor_layout_or_library_is_said(ready: Ready, what: str) -> None:
    """Each may change bits; a checkpoint of a release that did not record it says nothing."""
    context = ready()
    state = prepare(context)
    one_step(context, state)
    now = state.loop.determinism_key[what]
    state.loop.determinism_key[what] = "another"
    save(context, state)

    assert prepare(ready()).loop.not_bit_exact == f"{what} another -> {now}"

    state.loop.step += 1
    del state.loop.determinism_key[what]
    save(context, state)

    assert prepare(ready()).loop.not_bit_exact is None


@pytest.mark.parametrize(
    ("backend", "ranks", "algorithm", "varies"),
    [
        ("ccl", 2, "direct", False),
        ("ccl", 3, "ring", False),
        ("ccl", 3, "direct", True),
        ("mpi", 4, "direct", False),
        ("gloo", 4, "direct", False),
    ],
)
def test_a_backend_whose_sums_vary_promises_no_bits(
    backend: str, ranks: int, algorithm: str, varies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum of two numbers has one rounding; oneCCL is told to take the ring, unless the user wants something else."""
    monkeypatch.setenv("CCL_ALLREDUCE", algorithm)

    assert (sums_that_vary({"allreduce": allreduce_of(backend, ranks)}) is not None) == varies


@pytest.mark.parametrize("probability", [0.0, 0.1], ids=["no dropout", "dropout"])
def test_masks_of_the_release_before_are_not_taken_for_these(ready: Ready, probability: float) -> None:
    """A checkpoint that names no generator is of masks that torch drew: where there were any, the resume says so."""
    context = ready(adapter={"dropout": probability})
    state = prepare(context)
    one_step(context, state)
    before = state.loop.determinism_key.pop("dropout")
    save(context, state)

    reason = prepare(ready(adapter={"dropout": probability})).loop.not_bit_exact

    assert reason == ("dropout None -> philox4x32-10" if probability else None)
    assert before == ("philox4x32-10" if probability else None)


def test_auto_keeps_the_compute_dtype_that_the_job_began_with(ready: Ready) -> None:
    """A job that moves to a processor with bf16 goes on in fp32."""
    context = ready(training={"computeDtype": "auto"})
    context.isa = "avx512"
    state = prepare(context)
    one_step(context, state)
    save(context, state)
    moved = ready(training={"computeDtype": "auto"})
    moved.isa = "amx_bf16"

    assert agree_on_inputs(moved).dtype == "fp32"


@pytest.mark.parametrize(("peer", "dtype"), [("avx512_bf16", "bf16"), ("avx512", "fp32")])
def test_the_least_of_all_ranks_processors_decides_the_compute_dtype(
    ready: Ready, monkeypatch: pytest.MonkeyPatch, peer: str, dtype: str
) -> None:
    """Not the tier that the nodes were chosen by, which here is the lowest."""
    context = ready(training={"computeDtype": "auto"})
    context.isa = "amx_bf16"
    gather = context.group.all_gather_object

    def with_a_peer(mine: Any) -> list[Any]:
        return [mine, (None, peer, *mine[2:])] if isinstance(mine, tuple) else gather(mine)

    monkeypatch.setattr(context.group, "all_gather_object", with_a_peer)

    assert context.run.isa == "avx2"
    assert agree_on_inputs(context).dtype == dtype


def test_a_checkpoint_of_other_data_is_refused(ready: Ready) -> None:
    """A data position means nothing in data that changed."""
    context = ready()
    state = prepare(context)
    one_step(context, state)
    state.loop.dataset_sha256 = "ab" * 32
    save(context, state)

    with pytest.raises(
        DataError, match=r"the data changed since step-00000001 was written \(sha256 abababababab, now"
    ):
        agree_on_inputs(ready())


def test_a_checkpoint_of_other_weights_is_refused(ready: Ready) -> None:
    """Nor is an adapter of a model that was replaced under the same name; an old checkpoint does not say."""
    context = ready()
    state = prepare(context)
    one_step(context, state)
    save(context, state)
    inputs, ours = agree_on_inputs(ready()), state.loop.weights_sha256

    check_weights(context, inputs, ours)
    with pytest.raises(
        ModelError, match=rf"changed since step-00000001 .*sha256 {ours[:12]}, now abababababab"
    ):
        check_weights(context, inputs, "ab" * 32)
    inputs.loop.weights_sha256 = ""
    check_weights(context, inputs, "ab" * 32)


def test_pods_with_other_weights_do_not_train_together(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same names and shapes are not the same model."""
    context = ready()
    inputs = agree_on_inputs(context)
    monkeypatch.setattr(context.group, "all_gather_object", lambda mine: ["cd" * 32, mine])

    with pytest.raises(ConfigurationError, match="are not those of rank 0's pod"):
        check_weights(context, inputs, "ab" * 32)


def _with_template(ready: Ready, tmp_path: Path, template: str) -> RankContext:
    """The small job, on a model of its own that has this template."""
    context = ready()
    if not (tmp_path / "smoke").exists():
        shutil.copytree(context.volumes["smoke"], tmp_path / "smoke")
    (tmp_path / "smoke" / "model" / "chat_template.jinja").write_text(template)
    context.volumes = {**context.volumes, "smoke": tmp_path / "smoke"}
    return context


TEMPLATE = (
    "Today is {{ strftime_now('%d %b %Y') }}.{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_a_template_is_told_the_date_of_the_first_attempt(ready: Ready, tmp_path: Path) -> None:
    """A template that writes the date makes the same tokens on another day."""
    context = _with_template(ready, tmp_path, TEMPLATE)
    (context.folder.path / "began.json").write_text('{"time": "2025-02-03T23:59:00+00:00"}')
    state = prepare(context)
    one_step(context, state)
    save(context, state)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smoke" / "model")

    assert tokenizer.decode(state.data.train.sample(0)[0]).startswith("Today is 03 Feb 2025.")
    assert prepare(_with_template(ready, tmp_path, TEMPLATE)).loop.not_bit_exact is None


@pytest.mark.parametrize(
    ("file", "old", "new", "what"),
    [
        ("chat_template.jinja", "Today is", "Now it is", "chat template"),
        ("tokenizer.json", '"rstrip": false', '"rstrip": true', "tokenizer"),
    ],
)
def test_a_checkpoint_of_other_tokens_is_refused(
    ready: Ready, tmp_path: Path, file: str, old: str, new: str, what: str
) -> None:
    """The same data make other tokens: what changed is named, and nothing goes on as if it were the same run."""
    context = _with_template(ready, tmp_path, TEMPLATE)
    state = prepare(context)
    one_step(context, state)
    save(context, state)
    changed = tmp_path / "smoke" / "model" / file
    text = changed.read_text().replace(old, new)
    again = _with_template(ready, tmp_path, TEMPLATE)
    changed.write_text(text)

    with pytest.raises(
        DataError, match=f"other tokens than when step-00000001 was written, because the {what} changed"
    ):
        agree_on_inputs(again)


def test_what_is_lost_to_the_longest_length_is_told(ready: Ready, caplog: pytest.LogCaptureFixture) -> None:
    """One warning for each use counts the records that are cut and those that are left out."""
    agree_on_inputs(ready(training={"maxSequenceLength": 30}))

    assert re.search(
        r"\d+ of \d+ training records are longer than maxSequenceLength 30: their ends are cut off, and \d+ of them "
        "lose all that is to be learned",
        caplog.text,
    )


def test_what_the_data_are_is_told_with_their_tokens(ready: Ready, caplog: pytest.LogCaptureFixture) -> None:
    """For the condition DataChecked: each split with its samples, its tokens, and how many of them are learned."""
    context = ready()
    agree_on_inputs(context)

    said = context.progress.report.data
    assert said is not None
    assert re.fullmatch(
        r"training: \d+ records in the chat format; \d+ samples of [\d,]+ tokens, \d+ % of them learned; "
        r"evaluation: \d+ records in the chat format; \d+ samples of [\d,]+ tokens, \d+ % of them learned",
        said,
    )
    assert "raw text" not in caplog.text


def test_raw_prompts_beside_a_chat_template_are_warned_of(
    ready: Ready, tmp_path: Path, smoke_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They train, but the model will hardly be asked as it learned to answer."""
    shutil.copytree(smoke_folder / "model", tmp_path / "smoke" / "model")
    lines = [json.dumps({"prompt": f"{number}?", "completion": "yes"}) + "\n" for number in range(30)]
    (tmp_path / "smoke" / "data.jsonl").write_text("".join(lines))
    context = ready()
    context.volumes = {**context.volumes, "smoke": tmp_path / "smoke"}
    agree_on_inputs(context)

    assert "are trained on as raw text, but the model has a chat template" in caplog.text


def test_virtual_tokens_leave_the_samples_fewer(ready: Ready) -> None:
    """They count in the longest length, in bins and in steps, on the ranks as in the plan."""
    virtual = {"adapter": {"method": "prefix-tuning", "numVirtualTokens": 20}}
    context = ready(**virtual)
    inputs = agree_on_inputs(context)
    step = inputs.schedule.step(0)
    lengths = inputs.data.train.lengths()

    assert int(lengths.max()) <= 96 - 20
    assert step.bin_tokens == [sum(int(lengths[n]) + 20 for n in bin_) for bin_ in step.bins]
    assert max(step.bin_tokens) <= 96


@pytest.mark.parametrize(
    ("adapter", "rate", "told"),
    [
        ({"method": "prompt-tuning", "numVirtualTokens": 4}, 2e-4, True),
        ({"method": "prompt-tuning", "numVirtualTokens": 4}, 1e-2, False),
        ({}, 2e-4, False),
    ],
    ids=["default", "set", "LoRA"],
)
def test_a_rate_that_suits_lora_alone_is_told(
    ready: Ready, caplog: pytest.LogCaptureFixture, adapter: dict[str, Any], rate: float, told: bool
) -> None:
    """The default of training.learningRate is LoRA's."""
    agree_on_inputs(ready(adapter=adapter, training={"learningRate": rate}))

    assert ("prompt-tuning learns little at it" in caplog.text) == told


def test_a_request_to_stop_ends_the_tokenization(ready: Ready) -> None:
    """A rank that is asked to stop does not read all of the data first."""
    context = ready()
    context.stop.set()

    with pytest.raises(StopHere):
        prepare(context)
    assert checkpoint.newest_valid(context.folder) is None


NEEDS = MemoryEstimate(
    runtime=4 * 2**30, base=4 * 2**30, adapter=2**30, activations=2**29, scratch=2**29,
    micro_batch_tokens=1024, checkpointing="full",
)  # fmt: skip
"""10 GiB a rank."""
LOCAL = {PARENT_DEATH_ENV: "1"}


@pytest.mark.parametrize(
    ("environ", "gib", "limit", "told"),
    [
        pytest.param(LOCAL, 10, None, None, id="it fits a machine"),
        pytest.param(LOCAL, 9, None, "9,216 MiB", id="it does not fit a machine"),
        pytest.param({}, 9, None, None, id="a pod without a limit"),
        pytest.param({}, 9, 19, None, id="a pod's two ranks, within what an estimate may be above"),
        pytest.param({}, 8, 16, "8,192 MiB", id="a pod's two ranks cannot fit"),
        pytest.param({}, 12, 16, "8,192 MiB", id="a pod whose limit somebody lowered"),
    ],
)
def test_a_job_that_cannot_fit_is_told_with_the_plans_sentence(
    ready: Ready, environ: dict[str, str], gib: int, limit: int | None, told: str | None
) -> None:
    """On one machine by memoryPerRank, in a pod by what the kernel lets its ranks have together."""
    run = ready(layout={"memoryPerRank": gib * 2**30, "ranksPerPod": 2, "ranks": 2}).run
    allowed = None if limit is None else limit * 2**30
    if told is None:
        check_memory(run, NEEDS, environ, allowed)
        return
    sentence = (
        rf"^a rank needs 10,240 MiB, but spec.topology.memoryPerRank is {told}: raise it to 10240Mi, or"
    )
    with pytest.raises(ConfigurationError, match=sentence):
        check_memory(run, NEEDS, environ, allowed)


def test_a_pod_that_cannot_hold_a_job_loads_nothing(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends for good instead of being killed after minutes of loading, at every attempt."""
    monkeypatch.setattr(setup, "memory_limit", lambda: 2**28)
    monkeypatch.setattr(setup, "load_base", lambda *_, **__: pytest.fail("loads"))

    with pytest.raises(ConfigurationError, match=r"^a rank needs [\d,]+ MiB, but"):
        prepare(ready())


def _fail(*_: Any) -> None:
    raise AssertionError("nothing is to be tokenized")


def test_a_second_start_tokenizes_nothing(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of the first one are mapped."""
    first = prepare(ready())
    monkeypatch.setattr(Tokenization, "outcomes", _fail)

    again = prepare(ready())

    assert again.loop.token_digests == first.loop.token_digests
    assert again.data.facts() == first.data.facts()
    assert isinstance(again.data.train.ids.base, np.memmap)


def test_a_damaged_cache_is_made_anew(ready: Ready, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The job trains on the same tokens."""
    first = prepare(ready())
    digests = first.loop.token_digests
    [path] = (tmp_path / "w" / "cache" / "tokens").glob("*/training/ids")
    path.write_bytes(bytes(path.stat().st_size))

    assert prepare(ready()).loop.token_digests == digests
    assert "is damaged (training), and is made anew" in caplog.text


def test_without_room_for_a_cache_a_job_trains_all_the_same(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same tokens, from memory."""
    digests = prepare(ready()).loop.token_digests
    shutil.rmtree(tmp_path / "w" / "cache")
    (tmp_path / "w" / "cache").touch()

    state = prepare(ready())

    assert state.loop.token_digests == digests
    assert not isinstance(state.data.train.ids.base, np.memmap)


def _second_of_pod(context: RankContext) -> RankContext:
    world = World(rank=1, size=2, local_rank=1, master_addr="127.0.0.1", master_port=1)
    return RankContext(
        context.run, Group(world, context.group.store), context.folder, volumes=context.volumes
    )


def _source(context: RankContext) -> TokenSource:
    """What `context` tokenizes."""
    seen: list[TokenSource] = []

    def load(source: TokenSource) -> LoadedData:
        seen.append(source)
        return source.load()

    run = context.run
    shape = model_shape(resolve(run.model_uri, context.volumes), run.adapter)
    load_inputs(run, shape, context.volumes, context.folder.began(), context.advance, load)
    return seen[0]


def test_the_other_ranks_of_a_pod_wait_for_the_first(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they map what it has made; where it has nothing to map, each makes its own."""
    first = ready()
    second = _second_of_pod(first)
    source, waited = _source(second), threading.Event()
    monkeypatch.setattr(second, "advance", lambda _: waited.set())
    with ThreadPoolExecutor() as pool:
        theirs = pool.submit(once_per_pod(second), source)
        assert waited.wait(10)
        assert not theirs.done()
        mine = once_per_pod(first)(source)
        assert theirs.result(10).train.digest() == mine.train.digest()
    assert isinstance(theirs.result().train.ids.base, np.memmap)

    first.group.tell("tokens of pod 0", "")
    assert once_per_pod(second)(source).train.digest() == mine.train.digest()


def test_a_rank_that_waits_for_tokens_heeds_a_request_to_stop(ready: Ready) -> None:
    """It need not wait for the first."""
    second = _second_of_pod(ready())
    source = _source(second)
    second.stop.set()

    with pytest.raises(StopHere):
        once_per_pod(second)(source)


def test_tokens_are_made_on_all_cpus_of_the_pod() -> None:
    """Those of its launcher, or whatever the kernel allows."""
    assert pod_cpus({CPUS_ENV: "0-2,5"}) == [0, 1, 2, 5]
    assert {*os.sched_getaffinity(0)} <= {*pod_cpus({})}


def test_ranks_that_read_different_files_do_not_train_together(
    alone: RankContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the rank and what differs."""
    others: list[dict[str, Any]] = [{"model": "aa", "data": "bb"}, {"model": "aa", "data": "cc"}]
    monkeypatch.setattr(alone.group, "all_gather_object", lambda mine: [mine, *others])

    with pytest.raises(
        ConfigurationError, match=r"^rank 2 has different data from rank 0: cc instead of bb$"
    ):
        check_same_on_all_ranks(alone, {"model": "aa", "data": "bb"})


def test_a_model_folder_that_is_missing_is_named(ready: Ready) -> None:
    """The user learns where it was looked for."""
    context = ready(model={"source": "pvc://smoke/nothing"})

    with pytest.raises(Exception, match=str(Path("smoke")) + ".*nothing"):
        agree_on_inputs(context)
