"""What lies in a workspace, damaged or forged: read, passed over, or refused by one sentence."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from builders import a_run
from hostile import HUGE, INPUTS, attack, damaged_bytes, damaged_json, json_text, nested, survive
from qlora_contract.cost import AttemptRecord
from qlora_contract.files import sha256
from qlora_contract.job_folder import (
    ANSWERS,
    ATTEMPTS,
    BASE_LOSSES,
    BEGAN,
    EXPORT_REPORT,
    EXPORTS,
    FENCE,
    IDENTITY,
    MANIFEST,
    METRICS,
    TRAINING_REPORT,
    identity_text,
    read_manifest,
)
from qlora_contract.remote import parse_remote
from qlora_trainer.artifacts import base_losses, checkpoint
from qlora_trainer.artifacts.checkpoint import ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE, LoopState
from qlora_trainer.artifacts.metrics_log import MetricsLog
from qlora_trainer.errors import ConfigurationError, Fenced
from qlora_trainer.modeling.adapter_parameters import AdapterParameters
from qlora_trainer.modeling.lora import attach_adapters
from qlora_trainer.modeling.lora_linear import LoraLinear
from qlora_trainer.quantization.frozen_weight import UnquantizedWeight
from qlora_trainer.report.files import page_of
from qlora_trainer.storage.job_folder import JobFolder
from qlora_trainer.transfer.revisions import FILE_NAME, PinnedRevisions
from qlora_trainer.transfer.source_cache import Snapshot

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for a disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


RUN = a_run(job={"attempt": 1})
REMOTE = "hf://org/model"


def an_adapter() -> tuple[AdapterParameters, torch.optim.Optimizer]:
    """A small adapter after one step, and its optimizer."""
    layers = {"model.a": LoraLinear("model.a", UnquantizedWeight(torch.zeros(6, 4)), None)}
    parameters = attach_adapters(layers, rank=2, alpha=4.0, dropout=None, seed=0)
    optimizer = torch.optim.AdamW([parameters.flat], lr=0.1, fused=True)
    for each in parameters.named.values():
        assert each.grad is not None
        each.grad.fill_(1.0)
    optimizer.step()
    return parameters, optimizer


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint that is right."""
    folder = JobFolder(tmp_path_factory.mktemp("job"), RUN)
    folder.acquire()
    state = LoopState(
        step=3, seconds=1.5, base_eval_loss=2.0, dataset_sha256="a", token_digests={"training": "b"},
        determinism_key={"compute_dtype": "fp32", "threads": 2},
    )  # fmt: skip
    return checkpoint.save(folder, *an_adapter(), state, keep=1)


def resealed(folder: Path) -> None:
    """Let the manifest say that the files are as they were written."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: sha256(folder / name) for name in manifest["files"]}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def resume(right: Path, place: Path) -> Callable[[dict[str, bytes]], LoopState | None]:
    """resume(files) -> the state that a resume takes from a checkpoint with these files; None: it takes none."""

    folder = JobFolder(place / "job", RUN)
    path = folder.checkpoints / right.name
    shutil.copytree(right, path)
    parameters, optimizer = an_adapter()

    def resume(files: dict[str, bytes]) -> LoopState | None:
        for name in (*files, MANIFEST):
            (path / name).write_bytes(files[name] if name in files else (right / name).read_bytes())
        try:
            if MANIFEST not in files:
                resealed(path)
            found = checkpoint.newest_valid(folder)
            if found is None:
                return None
            checkpoint.read_state(found)
            state = checkpoint.load(found, parameters, optimizer)
            checkpoint.changes(state.determinism_key, {"threads": 3})
            assert parameters.flat.shape == optimizer.state[parameters.flat]["exp_avg"].shape
            return state
        finally:
            for name in files:
                (path / name).write_bytes((right / name).read_bytes())

    return resume


def test_what_is_damaged_below_is_right(resume: Callable[..., LoopState | None]) -> None:
    """The checkpoint that is damaged can be resumed from."""
    state = resume({})

    assert state is not None
    assert state.step == 3


@INPUTS
@pytest.mark.parametrize("name", [ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE, MANIFEST])
def test_a_damaged_file_of_a_checkpoint_is_refused(
    resume: Callable[..., LoopState | None], right: Path, name: str, inputs: int
) -> None:
    """Even where its digest was made to fit."""
    data = (right / name).read_bytes()
    attack(inputs, damaged_bytes([data], head=400), lambda damaged: resume({name: damaged}))


@INPUTS
@pytest.mark.parametrize("name", [STATE_FILE, MANIFEST])
def test_facts_of_a_checkpoint_that_are_something_else_are_refused(
    resume: Callable[..., LoopState | None], right: Path, name: str, inputs: int
) -> None:
    """A step that is no number, digests that are lists, files that lie elsewhere."""
    value = json.loads((right / name).read_text())
    attack(inputs, damaged_json(value), lambda damaged: resume({name: json_text(damaged).encode()}))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param(ADAPTER_FILE, HUGE.to_bytes(8, "little") + b"{}", id="a header of 2^60 bytes"),
        pytest.param(OPTIMIZER_FILE, b"", id="an empty file"),
        pytest.param(STATE_FILE, nested().encode(), id="JSON nested deep"),
        pytest.param(STATE_FILE, b'{"step": -1}', id="a step below 0"),
        pytest.param(STATE_FILE, b'{"step": 1e400}', id="a step that is infinite"),
    ],
)
def test_a_forged_checkpoint_is_refused_by_its_name(
    resume: Callable[..., LoopState | None], name: str, data: bytes
) -> None:
    """A person must be able to see which one to remove."""
    error = survive(resume, {name: data})

    assert isinstance(error, ConfigurationError)
    assert "step-00000003" in str(error)


def test_a_manifest_names_no_file_elsewhere(right: Path, place: Path) -> None:
    """Neither a device without end, nor a file of another folder, belongs to a checkpoint."""
    for name in ("/dev/zero", "../secret"):
        folder = place / "checkpoints" / "step-00000003"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(right, folder)
        (place / "checkpoints" / "secret").write_text("x")
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][name] = sha256(place / "checkpoints" / "secret")
        (folder / MANIFEST).write_text(json.dumps(manifest))

        assert read_manifest(folder) is None


def test_moments_of_another_adapter_are_refused(
    resume: Callable[..., LoopState | None], right: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """They would be added to the wrong weights, or fail within the first step."""
    file = tmp_path_factory.mktemp("moments") / OPTIMIZER_FILE
    moments = load_file(right / OPTIMIZER_FILE)
    for wrong in ({"exp_avg": moments["exp_avg"][:-1]}, {"step": moments["step"][None]}):
        save_file({name: t.contiguous() for name, t in {**moments, **wrong}.items()}, file)

        with pytest.raises(ConfigurationError, match="moments"):
            resume({OPTIMIZER_FILE: file.read_bytes()})


LOSSES = base_losses.BaseLosses({"samples": "a"}, 2.0, 3.0)
RECORD = AttemptRecord(job_uid="u", attempt=0, began="2026-01-02T03:04:05Z", seconds=3.0, cpus=2)
INFINITE = b'{"uid": "u", "attempt": Infinity}'
METRICS_LINES = "".join(
    json.dumps({"step": n, "epoch": 0.1, "loss": 2.0, "tokens": 9, "seconds": 0.5, "eval_loss": 2.0}) + "\n"
    for n in range(1, 4)
)
REPORT = {
    "job": "j", "eval_loss": 1.0, "base_eval_loss": 2.0, "steps": 3, "seconds": 1.0, "tokens": 9, "world_size": 2,
    "ranks": [{"rank": 0, "host": "h", "isa": "avx512", "peak_memory_bytes": 5}], "provenance": {"versions": {}},
    "configuration": {"training": {"seed": 1}}, "data": {"training": {"records": 3, "lengths": []}},
    "adapter_sha256": "a",
}  # fmt: skip
EXPORT = f"{EXPORTS}/merged/{EXPORT_REPORT}"
ANSWER = {"prompts": [{"prompt": "A?", "base": "B", "adapter": "C", "reference": "D"}]}
SIDE_FILES: dict[str, str] = {
    FENCE: json.dumps({"uid": "u", "attempt": 0, "before": ["v"]}),
    BEGAN: json.dumps({"time": "2026-01-02T03:04:05+00:00"}),
    IDENTITY: identity_text(RUN),
    ATTEMPTS: json.dumps([RECORD.model_dump(mode="json", by_alias=False)]),
    BASE_LOSSES: json.dumps(dataclasses.asdict(LOSSES)),
    METRICS: METRICS_LINES,
    TRAINING_REPORT: json.dumps(REPORT),
    ANSWERS: json.dumps(ANSWER),
    EXPORT: json.dumps(
        {"adapter_sha256": "a", "bytes": 5, "file": "j.gguf", "proof": {"kl_divergence": 0.1}}
    ),
    FILE_NAME: json.dumps({"model": {"source": REMOTE, "revision": "main", "found": "a" * 40}}),
}
"""The small files of a job's folder, as they are written."""


def acquire(folder: JobFolder) -> None:
    """What an attempt does first."""
    with contextlib.suppress(Fenced):  # a fence may say that there is a newer attempt
        folder.acquire()
        folder.check_fence()
    folder.began()


def pin(folder: JobFolder) -> None:
    """What a fetch does."""
    revisions = PinnedRevisions(folder.path, RUN)
    model = RUN.sources[0]
    revisions.get(model)
    revisions.set(model, "b")


def draw(folder: JobFolder) -> None:
    """What the report does."""
    folder.finished()
    page_of(folder.path, None)


def resume_log(folder: JobFolder) -> None:
    """What a resume does with the metrics."""
    MetricsLog(folder.path / METRICS, 2)
    draw(folder)


READERS: dict[str, Callable[[JobFolder], object]] = {
    FENCE: acquire,
    BEGAN: acquire,
    IDENTITY: acquire,
    ATTEMPTS: draw,
    BASE_LOSSES: lambda folder: base_losses.read(folder, LOSSES.measured_on),
    METRICS: resume_log,
    TRAINING_REPORT: draw,
    ANSWERS: draw,
    EXPORT: draw,
    FILE_NAME: pin,
}
"""Who reads each of them."""


@pytest.fixture
def start(place: Path) -> Callable[[str, bytes], None]:
    """start(name, data): read a job's folder where one file is this."""
    folder = JobFolder(place / "job", RUN)

    (folder.path / EXPORT).parent.mkdir(parents=True)

    def start(name: str, data: bytes) -> None:
        for each, text in SIDE_FILES.items():
            if not (folder.path / each).exists():
                (folder.path / each).write_text(text)
        (folder.path / name).write_bytes(data)
        READERS[name](folder)
        (folder.path / name).unlink(missing_ok=True)

    return start


@INPUTS
@pytest.mark.parametrize("name", SIDE_FILES)
def test_damaged_files_of_a_job_are_passed_over_or_refused(
    start: Callable[[str, bytes], None], name: str, inputs: int
) -> None:
    """What a job's folder says of itself may be anything."""
    text = SIDE_FILES[name]
    broken: st.SearchStrategy[bytes] = damaged_bytes([text.encode()])
    if name != METRICS:
        changed = damaged_json(json.loads(text)).map(lambda value: json_text(value).encode())
        broken = st.one_of(broken, changed)
    attack(inputs, broken, lambda data: start(name, data))


@pytest.mark.parametrize("name", SIDE_FILES)
def test_files_of_a_job_that_are_nested_deep_are_passed_over_or_refused(
    start: Callable[[str, bytes], None], name: str
) -> None:
    """JSON of 100,000 levels ends no parser."""
    survive(lambda data: start(name, data), nested().encode())
    survive(lambda data: start(name, data), INFINITE)
    survive(lambda data: start(name, data), SIDE_FILES[name].replace("3.0", "Infinity").encode())


MANIFEST_OF_SOURCE: dict[str, Any] = {
    "source": REMOTE, "revision": "a" * 40, "files": {"config.json": {"size": 2, "sha256": "x"}},
}  # fmt: skip


@INPUTS
def test_damaged_manifests_of_sources_are_not_complete_or_raise_nothing(place: Path, inputs: int) -> None:
    """What a fetched source's manifest says is what is there, or the source is fetched again."""
    snapshot = Snapshot(place, parse_remote(REMOTE), "a" * 40, "model")
    snapshot.make_folders()
    (snapshot.files / "config.json").write_text("{}")
    snapshot.manifest.write_text(json.dumps(MANIFEST_OF_SOURCE))
    assert snapshot.is_complete()

    def read(data: bytes) -> None:
        snapshot.manifest.write_bytes(data)
        assert snapshot.is_complete() in (True, False)

    changed = damaged_json(MANIFEST_OF_SOURCE).map(lambda value: json_text(value).encode())
    attack(inputs, st.one_of(damaged_bytes([json.dumps(MANIFEST_OF_SOURCE).encode()]), changed), read)
    survive(read, nested().encode())
