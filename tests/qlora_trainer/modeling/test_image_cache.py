"""The images of a workspace."""

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_folders import shard
from qlora_contract.run_config import Quantization
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling import image_cache
from qlora_trainer.modeling.image import WEIGHTS, ImageWriter
from qlora_trainer.modeling.image_cache import ImageCache, Mapped
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.weight_files import WeightsHash
from qlora_trainer.quantization import kernels
from qlora_trainer.quantization.schemes import scheme_of
from qlora_trainer.storage.cache import META

pytestmark = pytest.mark.process

Make = Callable[..., Path]
Loss = Callable[..., Tensor]
LIVELY = {"vocab_size": 300, "initializer_range": 0.12}
NF4 = Quantization()


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' models are not seconds old, and no test changes one faster than a clock ticks."""
    monkeypatch.setattr(image_cache, "SETTLED_SECONDS", -1.0)


@pytest.fixture
def model(copied: Make) -> Path:
    """A small model that a test may change."""
    return copied("llama", "bfloat16", **LIVELY)


def _cache(
    tmp_path: Path,
    model: Path,
    settings: Quantization = NF4,
    uid: str = "uid",
    dtype: torch.dtype = torch.float32,
) -> ImageCache:
    return ImageCache(tmp_path / "work", (uid, 0, 0), model, settings, dtype)


def _made(cache: ImageCache) -> str:
    assert cache.can_keep(1, 1)
    key = cache.write(2)
    assert key is not None
    return key


def _read(cache: ImageCache, key: str | None = None) -> Mapped | None:
    key = key or cache.known()
    return None if key is None else cache.read(key, 2)


def _loaded(model: Path, settings: Quantization = NF4) -> tuple[Any, str]:
    taken = WeightsHash(1)
    return load_model(model, scheme_of(settings), torch.float32, weights_hash=taken), taken.hexdigest()


def _rewrite(model: Path, change: Callable[[Tensor], Tensor]) -> None:
    """Another revision of a model at the same path: names, shapes and sizes stay."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: change(tensors[name]).contiguous()}, file, {"format": "pt"})


def _wait_for_a_tick() -> None:
    """Times of files come from a clock that ticks every few milliseconds."""
    time.sleep(0.02)


def test_a_model_is_quantized_once(tmp_path: Path, model: Path, loss_of: Loss) -> None:
    """Another job finds what the first has made, and gets the same model and hash, to the bit."""
    assert _cache(tmp_path, model).known() is None
    _made(_cache(tmp_path, model))
    found = _read(_cache(tmp_path, model, uid="other"))
    expected, weights = _loaded(model)

    assert found is not None
    assert found.weights_sha256 == weights
    assert torch.equal(loss_of(found.model(torch.float32)), loss_of(expected))


def test_an_unquantized_model_has_an_image_for_each_dtype(tmp_path: Path, model: Path, loss_of: Loss) -> None:
    """It is kept in what is computed in; a quantized one serves both."""
    settings = Quantization(scheme="none")
    for dtype in (torch.float32, torch.bfloat16):
        cache = _cache(tmp_path, model, settings, dtype=dtype)
        found = _read(cache, _made(cache))
        expected = load_model(model, scheme_of(settings), dtype)

        assert found is not None
        assert torch.equal(loss_of(found.model(dtype)), loss_of(expected))
    assert len(list(cache.folder.iterdir())) == 2
    _made(_cache(tmp_path, model))
    assert _cache(tmp_path, model, dtype=torch.bfloat16).known() is not None


def test_the_hash_is_not_taken_again_while_the_files_are_as_they_were(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight is read on the way to the image."""
    _made(_cache(tmp_path, model))
    monkeypatch.setattr(image_cache, "WeightsHash", lambda *_: pytest.fail("the weights were hashed"))
    monkeypatch.setattr(image_cache, "write_image", lambda *_: pytest.fail("the weights were read"))

    assert _read(_cache(tmp_path, model)) is not None


def _in_place(model: Path) -> None:
    """Bytes change, and the time of change is put back, as a careless copy does."""
    file = model / "model.safetensors"
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\x01\x3c\x01\x3c")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _renamed_over(model: Path) -> None:
    """Another revision was fetched beside it, with the times of the first."""
    file = model / "model.safetensors"
    before, other = file.stat(), model.parent / "other.safetensors"
    shutil.copy(file, other)
    content = bytearray(other.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(file)


@pytest.mark.parametrize("change", [_in_place, _renamed_over, lambda m: _rewrite(m, lambda w: -w)])
def test_another_revision_at_the_same_path_is_another_image(
    tmp_path: Path, model: Path, loss_of: Loss, change: Callable[[Path], None]
) -> None:
    """Of the same size, and under the same times as far as programs can set them."""
    key = _made(_cache(tmp_path, model))
    _wait_for_a_tick()
    change(model)
    cache = _cache(tmp_path, model)

    assert cache.known() is None
    other = _made(cache)
    assert other != key
    found = _read(_cache(tmp_path, model), other)
    expected, weights = _loaded(model)
    assert found is not None
    assert found.weights_sha256 == weights
    assert torch.equal(loss_of(found.model(torch.float32)), loss_of(expected))
    assert {path.name for path in cache.folder.iterdir()} == {key, other}


def test_files_that_were_written_a_moment_ago_are_not_trusted(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two changes within a tick of the clock have one time: the first start does not remember, a later one does."""
    monkeypatch.setattr(image_cache, "SETTLED_SECONDS", 1000.0)
    key = _made(_cache(tmp_path, model))
    assert _cache(tmp_path, model).known() is None
    monkeypatch.setattr(image_cache, "SETTLED_SECONDS", -1.0)

    assert _made(_cache(tmp_path, model)) == key
    assert _cache(tmp_path, model).known() == key


def test_a_model_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its image is that of what was read."""
    write = image_cache.write_image

    def changed_meanwhile(*arguments: Any) -> Any:
        table = write(*arguments)
        _wait_for_a_tick()
        (model / "model.safetensors").touch()
        return table

    monkeypatch.setattr(image_cache, "write_image", changed_meanwhile)
    _made(_cache(tmp_path, model))

    assert _cache(tmp_path, model).known() is None


def test_a_copy_of_the_model_finds_the_image(tmp_path: Path, model: Path) -> None:
    """The key is of the content: the copy is read once, and no second image is kept, not even in other files."""
    key = _made(_cache(tmp_path, model))
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)

    assert _made(_cache(tmp_path, copy)) == key
    assert _made(_cache(tmp_path, shard(copy))) == key


@pytest.mark.parametrize(
    "settings",
    [
        Quantization(scheme="fp4"),
        Quantization(scheme="int8"),
        Quantization(block_size=128),
        Quantization(double_quantization=False),
    ],
    ids=["scheme", "int8", "block", "double"],
)
def test_other_settings_have_images_of_their_own(
    tmp_path: Path, model: Path, loss_of: Loss, settings: Quantization
) -> None:
    """Beside each other, each to the bit what its settings make."""
    first = _made(_cache(tmp_path, model))
    cache = _cache(tmp_path, model, settings)

    assert cache.known() is None
    assert _made(cache) != first
    found = _read(cache)
    assert found is not None
    assert torch.equal(loss_of(found.model(torch.float32)), loss_of(_loaded(model, settings)[0]))
    assert _cache(tmp_path, model).known() == first


def test_whatever_decides_about_an_image_is_in_its_key(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor's kernels, the code, a library's version, and what config.json says of the stored numbers."""
    cache = _cache(tmp_path, model)
    keys = {cache.key("a"), cache.key("a"), cache.key("b")}
    monkeypatch.setattr(kernels, "name", lambda _: "amx_bf16/0123456789ab")
    keys.add(cache.key("a"))
    monkeypatch.setattr(image_cache, "code_digest", lambda *_: "other")
    keys.add(cache.key("a"))
    monkeypatch.setattr(image_cache.importlib.metadata, "version", lambda _: "0")
    keys.add(cache.key("a"))
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    keys.add(cache.key("a"))

    assert len(keys) == 6


@pytest.mark.parametrize("file", [WEIGHTS, META])
@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "gone"])
def test_what_is_damaged_is_made_anew(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture, file: str, how: str
) -> None:
    """A bit, a tail or a file: nothing wrong is ever mapped."""
    key = _made(_cache(tmp_path, model))
    path = _cache(tmp_path, model).folder / key / file
    content = bytearray(path.read_bytes())
    path.unlink()
    if how != "gone":
        content[len(content) // 2] ^= 1
        path.write_bytes(
            b"" if how == "empty" else content[: -len(content) // 2] if how == "cut" else content
        )

    assert _read(_cache(tmp_path, model)) is None
    assert ("is damaged" in caplog.text) == ((file, how) != (META, "gone"))
    assert _made(_cache(tmp_path, model)) == key
    assert _read(_cache(tmp_path, model)) is not None


@pytest.mark.parametrize("text", ["", "ab" * 32, "nonsense", "\x00" * 64])
def test_a_hash_that_is_not_the_models_finds_nothing(tmp_path: Path, model: Path, text: str) -> None:
    """The image is named by the weights' true hash, so a damaged note costs time, and is written anew."""
    key = _made(_cache(tmp_path, model))
    [note] = (tmp_path / "work" / image_cache.HASHES).iterdir()
    note.write_text(text)

    assert _cache(tmp_path, model).known() is None
    assert _made(_cache(tmp_path, model)) == key
    assert _cache(tmp_path, model).known() == key


def test_a_hash_that_nobody_asks_for_is_forgotten(tmp_path: Path, model: Path) -> None:
    """Each takes a file; who asks for one keeps it."""
    _made(_cache(tmp_path, model))
    [note] = (tmp_path / "work" / image_cache.HASHES).iterdir()
    old = time.time() - 100 * 86_400
    (note.parent / "other").touch()
    for path in (note, note.parent / "other"):
        os.utime(path, (old, old))
    assert _cache(tmp_path, model).known() is not None
    _wait_for_a_tick()
    _rewrite(model, lambda weight: -weight)
    _made(_cache(tmp_path, model))

    assert note.exists()
    assert len(list(note.parent.iterdir())) == 2


def test_two_jobs_that_write_at_once_leave_one_whole_image(
    tmp_path: Path, model: Path, loss_of: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are in the middle when either ends; each has its own files until they get their name."""
    both = threading.Barrier(2, timeout=30)
    write = image_cache.write_image

    def write_together(*arguments: Any) -> Any:
        both.wait()
        table = write(*arguments)
        both.wait()
        return table

    monkeypatch.setattr(image_cache, "write_image", write_together)
    keys: list[str | None] = []
    caches = [_cache(tmp_path, model, uid=uid) for uid in ("one", "other")]
    for cache in caches:
        assert cache.can_keep(1, 1)
    threads = [threading.Thread(target=lambda cache=cache: keys.append(cache.write(1))) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(keys) == 2
    assert keys[0] == keys[1]
    assert [path.name for path in caches[0].folder.iterdir()] == [keys[0]]
    expected = loss_of(_loaded(model)[0])
    for cache in caches:
        found = _read(cache)
        assert found is not None
        assert torch.equal(loss_of(found.model(torch.float32)), expected)


def test_a_disk_that_is_full_on_the_way_is_done_without(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and nothing is left of the image."""
    add = ImageWriter.add

    def full(self: ImageWriter, name: str, value: Any) -> None:
        if "layers.1" in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, name, value)

    monkeypatch.setattr(ImageWriter, "add", full)
    cache = _cache(tmp_path, model)
    assert cache.can_keep(1, 1)
    with caplog.at_level(logging.WARNING):
        assert cache.write(2) is None
    [said] = caplog.messages
    assert "cannot keep the prepared model (No space left on device): each rank prepares" in said
    assert list(cache.folder.iterdir()) == []


def test_a_workspace_that_cannot_be_written_to_is_done_without(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Here a file stands where the cache's folder would be."""
    (tmp_path / "work").touch()

    assert not _cache(tmp_path, model).can_keep(1, 1)
    assert "cannot keep the prepared model (Not a directory)" in caplog.text


def test_an_image_that_is_there_needs_no_room(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is no reason not to use it."""
    key = _made(_cache(tmp_path, model))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1, used=1, free=0))

    assert _cache(tmp_path, model).can_keep(1, 2**60)
    assert _cache(tmp_path, model).known() == key
    _rewrite(model, lambda weight: -weight)
    assert not _cache(tmp_path, model).can_keep(1, 2**60)


def test_a_model_that_is_refused_leaves_nothing(tmp_path: Path, model: Path) -> None:
    """The error is that of loading it."""
    _rewrite(model, lambda weight: weight * torch.nan)
    cache = _cache(tmp_path, model)

    assert cache.can_keep(1, 1)
    with pytest.raises(ModelError, match="NaN"):
        cache.write(2)
    assert list(cache.folder.iterdir()) == []


def test_an_image_is_in_use_as_long_as_its_model(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it may make room for another."""
    key = _made(_cache(tmp_path, model))
    cache = _cache(tmp_path, model)
    mapped = _read(cache)
    assert mapped is not None
    loaded = mapped.model(torch.float32)
    del mapped
    old = time.time() - 8 * 86_400
    os.utime(cache.folder / key / META, (old, old))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1, used=1, free=2**61))
    _rewrite(model, lambda weight: -weight)

    assert cache.can_keep(1, 1)
    assert (cache.folder / key).exists()
    del loaded
    assert cache.can_keep(1, 1)
    assert not (cache.folder / key).exists()
