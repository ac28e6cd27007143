"""Checkpoints: what is in them, which one is taken, and what no crash can do to them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from builders import a_run
from crashes import CRASH_AT
from qlora_contract.job_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, FENCE, MANIFEST
from qlora_contract.run_config import Adapter
from qlora_trainer.artifacts import checkpoint
from qlora_trainer.artifacts.adapter import write_adapter
from qlora_trainer.artifacts.checkpoint import LoopState
from qlora_trainer.errors import ConfigurationError, Fenced, StorageFull
from qlora_trainer.modeling import initial_adapter
from qlora_trainer.modeling.adapter_methods import method_for
from qlora_trainer.modeling.adapter_parameters import ALIGNMENT, AdapterParameters, flat_parameters
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.lora import attach_adapters
from qlora_trainer.modeling.lora_linear import LoraLinear
from qlora_trainer.quantization.frozen_weight import UnquantizedWeight
from qlora_trainer.quantization.schemes import Unquantized
from qlora_trainer.storage.job_folder import JobFolder

pytestmark = pytest.mark.process

RELEASE = Path(__file__).parents[2] / "releases" / "0.1.0" / "checkpoint"


def acquired(path: Path, attempt: int = 0) -> JobFolder:
    """A job's folder as an attempt has it after its start."""
    folder = JobFolder(path, a_run(job={"attempt": attempt}))
    folder.acquire()
    return folder


def small_adapter(rank: int = 2, width: int = 6) -> tuple[AdapterParameters, torch.optim.Optimizer]:
    """Adapters of two layers and their optimizer."""
    layers = {
        name: LoraLinear(name, UnquantizedWeight(torch.zeros(width, 4)), None)
        for name in ("model.a", "model.b")
    }
    parameters = attach_adapters(layers, rank=rank, alpha=4.0, dropout=None, seed=0)
    return parameters, torch.optim.AdamW([parameters.flat], lr=0.1, fused=True)


def train(parameters: AdapterParameters, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps with gradients that depend on where the parameters are."""
    for _ in range(steps):
        for each in parameters.named.values():
            assert each.grad is not None
            each.grad.copy_(torch.sin(each.data * 7 + 1))
        optimizer.step()


def written(folder: JobFolder, step: int, keep: int = 9) -> Path:
    """A checkpoint at a step, all of whose weights are the step's number."""
    parameters, optimizer = small_adapter()
    parameters.flat.data.fill_(step)
    return checkpoint.save(folder, parameters, optimizer, LoopState(step=step), keep)


def names(folder: JobFolder) -> list[str]:
    """What is in the folder of checkpoints, hidden files included."""
    return sorted(path.name for path in folder.checkpoints.iterdir())


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Three steps, a checkpoint and four more steps give what seven steps give."""
    undisturbed, optimizer = small_adapter()
    train(undisturbed, optimizer, 7)
    before, optimizer = small_adapter()
    train(before, optimizer, 3)
    path = checkpoint.save(acquired(tmp_path), before, optimizer, LoopState(step=3), keep=2)
    after, optimizer = small_adapter()
    checkpoint.load(path, after, optimizer)
    train(after, optimizer, 4)

    assert torch.equal(after.flat.data, undisturbed.flat.data)


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(0, 2**53),
    seconds=st.floats(0, 1e9),
    loss=st.none() | st.floats(0, 100),
    micro=st.integers(1, 4096),
)
def test_the_loop_state_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, seconds: float, loss: float | None, micro: int
) -> None:
    """No number loses a bit on its way through the file."""
    state = LoopState(
        step=4, tokens=tokens, seconds=seconds, base_eval_loss=loss, dataset_sha256="ab",
        determinism_key={"micro_batch_tokens": micro, "torch": "2"},
    )  # fmt: skip
    path = checkpoint.save(acquired(tmp_path_factory.mktemp("job")), *small_adapter(), state, keep=1)

    assert checkpoint.read_state(path) == state


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    """Older ones than the newest `keep` are removed once the new one is there."""
    folder = acquired(tmp_path)
    for step in (1, 2, 10):
        written(folder, step, keep=2)

    assert names(folder) == ["step-00000002", "step-00000010"]
    assert checkpoint.newest_valid(folder) == folder.checkpoints / "step-00000010"


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = [
    ADAPTER_WEIGHTS,
    ADAPTER_CONFIG,
    checkpoint.ADAPTER_FILE,
    checkpoint.OPTIMIZER_FILE,
    checkpoint.STATE_FILE,
]
DAMAGES: dict[str, Any] = {
    **{f"flipped-{name}": lambda path, name=name: flip(path / name) for name in FILES},
    **{f"missing-{name}": lambda path, name=name: (path / name).unlink() for name in [*FILES, MANIFEST]},
    **{f"cut-{name}": lambda path, name=name: os.truncate(path / name, 20) for name in [*FILES, MANIFEST]},
    "manifest-not-an-object": lambda path: (path / MANIFEST).write_text("[]"),
    "manifest-without-files": lambda path: (path / MANIFEST).write_text("{}"),
    "manifest-not-text": lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe"),
    "empty-folder": lambda path: [file.unlink() for file in path.iterdir()],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    """Whatever happened to the newest one, the one before is taken, and the log names the bad one."""
    folder = acquired(tmp_path)
    older, newer = written(folder, 1), written(folder, 2)
    damage(newer)

    assert checkpoint.newest_valid(folder) == older
    assert f"checkpoint {newer} is damaged" in caplog.text


def test_a_fresh_job_has_no_checkpoint(tmp_path: Path) -> None:
    """It begins at the beginning."""
    assert checkpoint.newest_valid(acquired(tmp_path)) is None


def test_a_damaged_later_checkpoint_does_not_push_out_good_ones(tmp_path: Path) -> None:
    """With keep 1, a new checkpoint before a damaged one stays."""
    folder = acquired(tmp_path)
    written(folder, 1)
    flip(written(folder, 9) / checkpoint.STATE_FILE)
    written(folder, 2, keep=1)

    assert checkpoint.newest_valid(folder) == folder.checkpoints / "step-00000002"


def test_a_damaged_checkpoint_is_written_anew(tmp_path: Path) -> None:
    """The same step can be saved over one that is damaged."""
    folder = acquired(tmp_path)
    flip(written(folder, 3) / checkpoint.ADAPTER_FILE)
    written(folder, 3)

    assert names(folder) == ["step-00000003"]
    assert checkpoint.newest_valid(folder) is not None


@pytest.mark.parametrize(
    "other",
    [pytest.param((4, 6), id="rank"), pytest.param((2, 8), id="width")],
)
def test_the_adapter_of_another_shape_is_refused(tmp_path: Path, other: tuple[int, int]) -> None:
    """A checkpoint of other shapes is named, and nothing of it is loaded."""
    path = written(acquired(tmp_path), 1)
    parameters, optimizer = small_adapter(*other)
    before = parameters.flat.data.clone()

    with pytest.raises(
        ConfigurationError, match="step-00000001 holds an adapter for other layers or of another rank"
    ):
        checkpoint.load(path, parameters, optimizer)
    assert torch.equal(parameters.flat.data, before)


def test_a_checkpoint_of_another_format_is_named(tmp_path: Path) -> None:
    """A job that was begun by another version of the trainer is not begun anew in silence."""
    path = written(acquired(tmp_path), 1)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "format": 7}))

    with pytest.raises(ConfigurationError, match="of format 7, and this trainer reads format 1"):
        checkpoint.read_state(path)


def test_the_determinism_key_keeps_its_stored_name(tmp_path: Path) -> None:
    """Releases before and after this one find it under `conditions` in state.json."""
    state = LoopState(step=1, determinism_key={"threads": 2})
    path = checkpoint.save(acquired(tmp_path), *small_adapter(), state, keep=1)
    stored = json.loads((path / checkpoint.STATE_FILE).read_text())

    assert stored["conditions"] == {"threads": 2}
    assert "determinism_key" not in stored


def test_a_checkpoint_of_the_release_before_is_read(tmp_path: Path) -> None:
    """Its files are valid, its state has every field, and its tensors fit the adapter that the same job has now."""
    shutil.copytree(RELEASE / "begun", tmp_path / "job")
    folder = JobFolder(tmp_path / "job", a_run())
    path = checkpoint.newest_valid(folder)
    assert path == folder.checkpoints / "step-00000004"
    shapes = {name: tensor.shape for name, tensor in load_file(path / checkpoint.ADAPTER_FILE).items()}
    parameters = flat_parameters(shapes)
    optimizer = torch.optim.AdamW([parameters.flat], lr=0.1, fused=True)
    state = checkpoint.load(path, parameters, optimizer)

    assert (state.step, state.tokens, state.supervised_tokens, state.not_bit_exact) == (4, 1705, 777, None)
    assert (state.base_eval_loss, state.base_eval_loss_quantized) == (5.505632423820418, 5.503343292749098)
    assert state.determinism_key["kernels"] == "reference"
    assert state.determinism_key["alignment"] == ALIGNMENT
    assert checkpoint.optimizer_tensors(parameters, optimizer)["step"] == 4


def test_a_checkpoint_is_the_adapter_that_would_be_published(tmp_path: Path) -> None:
    """Byte for byte, so that PEFT opens the one as it opens the other, whatever the family and the method."""
    folder = JobFolder(tmp_path, a_run(model={"source": "hf://org/name"}, fetched={"model": "c0ffee"}))
    folder.acquire()
    parameters, optimizer = small_adapter()
    train(parameters, optimizer, 2)
    path = checkpoint.save(folder, parameters, optimizer, LoopState(step=2), keep=1)
    published = write_adapter(folder, parameters, "org/name")

    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        assert (path / name).read_bytes() == (published / name).read_bytes()


def test_peft_opens_a_checkpoint(tmp_path: Path, small_model: Callable[..., Path]) -> None:
    """Stock PEFT computes with it what it computes with the weights that were trained."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = small_model("qwen2")
    run = a_run(adapter={"rank": 2, "alpha": 8.0, "targetModules": ["q_proj", "up_proj"]})
    model = load_model(base, Unquantized(), torch.float32)
    parameters = method_for(run.adapter).attach(model, seed=0, dropout=None)
    parameters.flat.data.normal_(generator=torch.Generator().manual_seed(1))
    folder = JobFolder(tmp_path, run)
    folder.acquire()
    optimizer = torch.optim.AdamW([parameters.flat], lr=0.1, fused=True)
    path = checkpoint.save(folder, parameters, optimizer, LoopState(step=1), keep=1)
    stock = AutoModelForCausalLM.from_pretrained(base)
    weights = dict(stock.named_parameters())
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        untrained = stock(ids).logits
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(path))(ids).logits
        for name, b in parameters.named.items():
            if name.endswith("lora_B.weight"):
                a = parameters.named[name.replace("lora_B", "lora_A")]
                weights[name.replace("lora_B.", "")].add_(b @ a, alpha=8.0 / 2)
        ours = stock(ids).logits

    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-3)
    assert (theirs - untrained).abs().max() > 1


def test_a_job_goes_on_from_a_checkpoint_of_another(tmp_path: Path) -> None:
    """adapter.initialAdapter may name one: it is checked and loaded as a finished adapter is."""
    parameters, optimizer = small_adapter()
    train(parameters, optimizer, 2)
    settings = {"rank": 2, "alpha": 4.0, "targetModules": ["all-linear"]}
    folder = JobFolder(tmp_path, a_run(adapter=settings))
    folder.acquire()
    path = checkpoint.save(folder, parameters, optimizer, LoopState(step=2), keep=1)
    shapes = {name: tuple(p.shape) for name, p in parameters.named.items()}
    initial_adapter.check(path, Adapter.model_validate(settings), shapes)
    other = flat_parameters(shapes)
    initial_adapter.load(path, other)

    assert torch.equal(other.flat.data, parameters.flat.data)


def test_the_release_before_goes_on_from_a_checkpoint_of_this_one(tmp_path: Path) -> None:
    """After a rollback: it knows one file of the adapter, of the same format and with its own names."""
    parameters, optimizer = small_adapter()
    train(parameters, optimizer, 2)
    path = checkpoint.save(acquired(tmp_path), parameters, optimizer, LoopState(step=2), keep=1)
    theirs = RELEASE / "begun" / "checkpoints" / "step-00000004"

    assert {file.name for file in theirs.iterdir()} <= {file.name for file in path.iterdir()}
    assert json.loads((path / MANIFEST).read_text())["format"] == 1
    tensors = load_file(path / "adapter.safetensors")
    assert all(
        name.endswith((".lora_A.weight", ".lora_B.weight"))
        for name in load_file(theirs / "adapter.safetensors")
    )
    assert tensors.keys() == parameters.named.keys()
    assert all(torch.equal(tensors[name], each.data) for name, each in parameters.named.items())


def test_fields_of_a_later_release_are_passed_over(tmp_path: Path) -> None:
    """A rollback continues from what a later release saved, as long as the format is the same."""
    path = written(acquired(tmp_path), 3)
    stored = json.loads((path / checkpoint.STATE_FILE).read_text())
    (path / checkpoint.STATE_FILE).write_text(json.dumps({**stored, "of_a_later_release": 1}))

    assert checkpoint.read_state(path) == LoopState(step=3)


def test_moments_lie_where_sums_do_not_depend_on_the_file(tmp_path: Path) -> None:
    """What is loaded has the alignment of tensors that were never in a file."""
    parameters, optimizer = small_adapter()
    train(parameters, optimizer, 1)
    path = checkpoint.save(acquired(tmp_path), parameters, optimizer, LoopState(step=1), keep=1)
    parameters, optimizer = small_adapter()
    checkpoint.load(path, parameters, optimizer)
    moments: dict[str, Tensor] = checkpoint.optimizer_tensors(parameters, optimizer)

    assert {name: t.data_ptr() % 64 for name, t in moments.items() if t.numel() > 1} == {
        "exp_avg": 0,
        "exp_avg_sq": 0,
    }


@pytest.mark.parametrize(
    ("then", "now", "reason"),
    [
        pytest.param({"threads": 2}, {"threads": 2}, None, id="equal"),
        pytest.param({"threads": 2}, {"threads": 4}, "threads 2 -> 4", id="changed"),
        pytest.param({}, {"isa": "AVX2"}, "isa None -> AVX2", id="not-recorded-then"),
        pytest.param({"a": 1, "b": 1}, {"b": 2, "a": 2}, "a 1 -> 2, b 1 -> 2", id="several-in-order"),
    ],
)
def test_every_change_that_makes_a_resume_inexact_is_named(
    then: dict[str, Any], now: dict[str, Any], reason: str | None
) -> None:
    """Each part of the determinism key that changed is in the reason, with both values."""
    assert checkpoint.changes(then, now) == reason


def test_an_attempt_that_lost_the_fence_writes_nothing(tmp_path: Path) -> None:
    """When another attempt took over while the files were written, they do not become a checkpoint."""
    old = acquired(tmp_path, attempt=0)
    written(old, 1)
    acquired(tmp_path, attempt=1)

    with pytest.raises(Fenced, match="attempt 1 of job u-1"):
        written(old, 2)
    assert names(old) == ["step-00000001"]


def test_the_fence_is_checked_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that takes over after the manifest was written, just before the rename, still wins."""
    old = acquired(tmp_path, attempt=0)
    publish = checkpoint.seal_folder

    def publish_then_lose(folder: Path, extra: dict[str, Any]) -> None:
        publish(folder, extra)
        (tmp_path / FENCE).write_text('{"uid": "u-1", "attempt": 1}')

    monkeypatch.setattr(checkpoint, "seal_folder", publish_then_lose)

    with pytest.raises(Fenced):
        written(old, 1)
    assert names(old) == []


def test_a_full_disk_leaves_the_last_checkpoint(tiny_disk: Path) -> None:
    """The checkpoint that does not fit is gone without a trace; the one before is whole."""
    folder = acquired(tiny_disk / "job")
    older = written(folder, 1)
    parameters, optimizer = small_adapter(rank=512, width=512)

    with pytest.raises(StorageFull, match=r"no space left while writing checkpoint .*step-00000002"):
        checkpoint.save(folder, parameters, optimizer, LoopState(step=2), keep=1)
    assert names(folder) == ["step-00000001"]
    assert checkpoint.newest_valid(folder) == older


@pytest.fixture
def tiny_disk(make_disk: Callable[[str], Path]) -> Path:
    """A file system of 256 KiB."""
    return make_disk("256k")


CRASHES = (
    CRASH_AT
    + """
import itertools, json, os, pathlib, runpy, shutil, sys

test = runpy.run_path(sys.argv[1])

def save(folder, content):
    parameters, optimizer = test["small_adapter"]()
    parameters.flat.data.fill_(content)
    test["checkpoint"].save(folder, parameters, optimizer, test["LoopState"](step=int(content)), keep=1)

def found(folder):
    "What the next attempt finds: the weights of the newest checkpoint, and how many things are in the folder."
    newest = test["checkpoint"].newest_valid(folder)
    parameters, optimizer = test["small_adapter"]()
    if newest is not None:
        test["checkpoint"].load(newest, parameters, optimizer)
    weights = sorted({w for p in parameters.named.values() for w in p.data.flatten().tolist()})
    return weights, len(test["names"](folder))

def outcomes(place, first, second):
    save(test["acquired"](place / "template"), first)
    for n in itertools.count(1):
        path = place / f"crash-{n}"
        shutil.copytree(place / "template", path)
        folder = test["acquired"](path)
        child = os.fork()
        if child == 0:
            crash_at(n)
            save(folder, second)
            os._exit(0)
        crashed = os.waitpid(child, 0)[1] != 0
        yield found(test["acquired"](path, attempt=1))
        if not crashed:
            return

cases = json.loads(sys.argv[3])
print(json.dumps([list(outcomes(pathlib.Path(sys.argv[2], str(i)), *case)) for i, case in enumerate(cases)]))
"""
)


def test_no_crash_loses_a_checkpoint(tmp_path: Path) -> None:
    """A process that ends before any one change of the file system leaves the old checkpoint or the new one, whole.

    With keep 1; both for the next step and for the same step once more.
    """
    cases = [(1.0, 2.0), (2.0, 2.5)]
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, __file__, str(tmp_path), json.dumps(cases)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    for (old, new), outcomes in zip(cases, json.loads(done.stdout), strict=True):
        weights = [weights for weights, _ in outcomes]
        turn = weights.index([new])
        assert len(outcomes) > 10
        assert turn > 0
        assert weights == [[old]] * turn + [[new]] * (len(outcomes) - turn)
        assert {count for _, count in outcomes} <= {1, 2}  # the old one may still be there
