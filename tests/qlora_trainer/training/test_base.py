"""The base of a rank: found, made, waited for, or its own; always the same to the bit."""

import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_contract.paths import resolve
from qlora_trainer.distributed import Group, World
from qlora_trainer.modeling import image_cache
from qlora_trainer.modeling.image import WEIGHTS, ImageWriter
from qlora_trainer.training import base, setup
from qlora_trainer.training.base import load_base, pods_that_map
from qlora_trainer.training.context import RankContext, StopHere
from qlora_trainer.training.loop import one_step, save
from qlora_trainer.training.setup import TrainState, prepare

pytestmark = pytest.mark.process

Ready = Callable[..., RankContext]


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smoke model may be seconds old."""
    monkeypatch.setattr(image_cache, "SETTLED_SECONDS", -1.0)


def _without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "pods_that_map", lambda *_: {0: False})


def _images(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "w" / "cache" / "models").glob("*"))


def _trained(context: RankContext) -> tuple[TrainState, list[dict[str, Any]]]:
    """After two steps: the state, and what metrics.jsonl would say of them."""
    state = prepare(context)
    lines = [dict(one_step(context, state)[0].line()) for _ in range(2)]
    for line in lines:
        del line["seconds"], line["memory_peak"]
    return state, lines


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("scheme", ["nf4", "int8", "none"])
def test_a_run_from_the_image_is_the_run_from_the_files_to_the_bit(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, dtype: str
) -> None:
    """Losses, gradient norms, adapter, hash of the weights and key of determinism: made, found, and without one."""
    monkeypatch.setattr(base, "is_mapped", lambda *_: True)  # as with several ranks
    sections = {"quantization": {"scheme": scheme}, "training": {"computeDtype": dtype}}
    made, of_made = _trained(ready(**sections))
    assert len(_images(tmp_path)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "write_image", lambda *_: pytest.fail("quantizes again"))
        found, of_found = _trained(ready(**sections))
    _without_images(monkeypatch)
    plain, of_plain = _trained(ready(**sections))

    assert of_made == of_found == of_plain
    for state in (made, found):
        assert state.loop.weights_sha256 == plain.loop.weights_sha256 != ""
        assert state.loop.determinism_key == plain.loop.determinism_key
        assert torch.equal(state.parameters.flat, plain.parameters.flat)
    assert (made.model.use is None, plain.model.use is None) == (False, True)


def test_a_resume_from_the_image_is_bit_exact(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way the first attempt had its base."""
    with monkeypatch.context() as patch:
        _without_images(patch)
        context = ready()
        first = prepare(context)
        one_step(context, first)
        save(context, first)
    again = prepare(ready())

    assert again.model.use is not None
    assert again.loop.not_bit_exact is None
    one_step(context, first)
    one_step(context, again)
    assert torch.equal(again.parameters.flat, first.parameters.flat)


def test_a_damaged_image_is_made_anew(ready: Ready, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The job trains the same model."""
    expected = _trained(ready())[1]
    gc.collect()  # so that nobody uses the image any more
    [image] = _images(tmp_path)
    content = bytearray((image / WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 64
    (image / WEIGHTS).write_bytes(content)

    assert _trained(ready())[1] == expected
    assert "is damaged (weights), and is made anew" in caplog.text
    assert _images(tmp_path) == [image]


def test_without_room_for_an_image_a_job_trains_all_the_same(
    ready: Ready, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, the base is the rank's own, and counts as that in what it needs."""
    expected = _trained(ready())[1]
    gc.collect()  # so that nobody uses the image any more
    cache = tmp_path / "w" / "cache" / "models"
    for path in _images(tmp_path):
        path.rename(tmp_path / "elsewhere")
    cache.rmdir()
    cache.touch()
    context = ready()
    with caplog.at_level(logging.WARNING):
        state, found = _trained(context)

    assert found == expected
    assert (state.model.use, context.mapped_bytes) == (None, 0)
    [said] = [message for message in caplog.messages if "cannot keep the prepared model" in message]
    assert "each rank prepares the model, and has it in memory for itself" in said


def test_a_disk_that_fills_up_on_the_way_ends_no_job(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was room when it was asked for; now each rank has its own."""
    expected = _trained(ready())[1]
    gc.collect()  # so that nobody uses the image any more
    for path in _images(tmp_path):
        path.rename(tmp_path / "elsewhere")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ImageWriter, "add", full)

    assert _trained(ready())[1] == expected
    assert _images(tmp_path) == []


def test_ranks_count_what_they_share_once(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the pods can keep an image; else each has its own, and needs memory for it."""
    asked: list[bool] = []
    choose = setup.memory.choose

    def noted(*arguments: Any, mapped: bool, **more: Any) -> Any:
        asked.append(mapped)
        return choose(*arguments, mapped=mapped, **more)

    monkeypatch.setattr(setup.memory, "choose", noted)
    setup.agree_on_inputs(ready())
    monkeypatch.setattr(setup, "pods_that_map", lambda *_: {0: True, 1: False})
    assert setup.agree_on_inputs(ready()).mapped
    assert asked == [True, False]


def test_all_ranks_hear_of_each_pod_whether_it_maps(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its first rank, which alone looks."""
    context = ready()
    folder = resolve(context.run.model_uri, context.volumes)
    monkeypatch.setattr(
        context.group, "all_gather_object", lambda mine: [mine, [0, None], [1, False], [1, None]]
    )

    assert pods_that_map(context, folder, torch.float32, 1, 1) == {0: True, 1: False}
    assert not pods_that_map(context, folder, torch.float32, 2**62, 1)[0]


def test_an_unquantized_base_is_written_where_ranks_share_it(
    ready: Ready, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is alone would gain nothing, and is not told so."""
    context = ready(quantization={"scheme": "none"})
    folder = resolve(context.run.model_uri, context.volumes)
    assert pods_that_map(context, folder, torch.float32, 1, 1) == {0: False}
    assert "cannot keep" not in caplog.text

    two = RankContext(
        context.run,
        Group(replace(context.world, local_size=2), context.group.store),
        context.folder,
        volumes=context.volumes,
    )
    assert pods_that_map(two, folder, torch.float32, 1, 1) == {0: True}


def _second_of_pod(first: RankContext) -> RankContext:
    world = World(rank=1, size=2, local_rank=1, master_addr="127.0.0.1", master_port=1)
    second = RankContext(first.run, Group(world, first.group.store), first.folder, volumes=first.volumes)
    second.group.all_gather_object = lambda mine: [[0, "ab"], mine]  # type: ignore[method-assign]
    return second


def test_the_other_ranks_of_a_pod_wait_for_the_first(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they map what it has made, without reading the weights or the image's digests once more."""
    first = ready()
    folder = resolve(first.run.model_uri, first.volumes)
    second, waited = _second_of_pod(first), threading.Event()
    monkeypatch.setattr(second, "advance", lambda _: waited.set())
    assert pods_that_map(first, folder, torch.float32, 1, 1) == {0: True}
    with ThreadPoolExecutor() as pool:
        theirs = pool.submit(load_base, second, folder, torch.float32, mapped=True)
        assert waited.wait(10)
        assert not theirs.done()
        mine, digest = load_base(first, folder, torch.float32, mapped=True)
        model, told = theirs.result(30)

    assert told == digest
    assert len(digest) == 64
    assert model.use is not None
    assert torch.equal(model.head, mine.head)
    assert first.mapped_bytes == second.mapped_bytes > 0
    monkeypatch.setattr(image_cache.Image, "check", lambda *_: pytest.fail("checks again"))
    load_base(second, folder, torch.float32, mapped=True)


def test_where_the_first_rank_has_no_image_each_loads_its_own(ready: Ready) -> None:
    """The first takes the hash for both."""
    first = ready()
    folder = resolve(first.run.model_uri, first.volumes)
    first.group.tell("model of pod 0", "")
    second = _second_of_pod(first)
    model, told = load_base(second, folder, torch.float32, mapped=True)

    assert model.use is None
    assert told == "ab"
    assert second.mapped_bytes == 0


def test_a_rank_that_waits_for_a_model_heeds_a_request_to_stop(ready: Ready) -> None:
    """It need not wait for the first."""
    second = _second_of_pod(ready())
    second.stop.set()

    with pytest.raises(StopHere):
        load_base(second, resolve(second.run.model_uri, second.volumes), torch.float32, mapped=True)


def test_a_request_to_stop_ends_the_making_of_an_image(ready: Ready, tmp_path: Path) -> None:
    """Nothing of it is left."""
    context = ready()
    folder = resolve(context.run.model_uri, context.volumes)
    pods_that_map(context, folder, torch.float32, 1, 1)
    context.stop.set()

    with pytest.raises(StopHere):
        load_base(context, folder, torch.float32, mapped=True)
    assert _images(tmp_path) == []
