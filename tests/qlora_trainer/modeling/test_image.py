"""The image of a model in the form that it is multiplied in."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_trainer.modeling import image as image_module
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.image import WEIGHTS, Damaged, Image, describe
from qlora_trainer.modeling.loading import load_image, load_model, write_image
from qlora_trainer.quantization.schemes import Int8, Nf4, Scheme
from qlora_trainer.storage.cache import META

pytestmark = pytest.mark.process

Make = Callable[..., Path]
Loss = Callable[..., Tensor]
LIVELY = {"vocab_size": 300, "initializer_range": 0.12}
DOUBLE = Nf4(double=True)


def _written(model: Path, scheme: Scheme, folder: Path, key: str = "k") -> Path:
    """The folder of an image of a model, as a cache has it."""
    folder.mkdir(parents=True)
    table = write_image(model, scheme, torch.float32, folder)
    (folder / META).write_text(json.dumps(describe(folder, key, "ab" * 32, table, 2)))
    return folder


def _tensors(model: BaseModel) -> dict[str, Tensor]:
    return {"head": model.head, **dict(model.graph.named_parameters())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "stored", "tied"),
    [
        ("llama", "bfloat16", True),
        ("llama", "float16", False),
        ("qwen2", "float32", False),  # biases
        ("gemma3", "bfloat16", True),  # names of a multimodal model, wide norms, a factor of the embedding
        ("qwen3_moe", "bfloat16", False),  # experts and routers
        ("gpt_oss", "bfloat16", False),  # experts in one tensor, sinks, biases
        ("glm4", "bfloat16", False),  # gate and up in one
    ],
)
def test_a_model_of_its_image_is_the_loaded_one_to_the_bit(
    kind: str, stored: str, tied: bool, dtype: torch.dtype, small_model: Make, loss_of: Loss, tmp_path: Path
) -> None:
    """Its tensors, its loss and its gradients, in either compute dtype; so one image serves both."""
    folder = small_model(kind, stored, **LIVELY, tie_word_embeddings=tied)
    image = Image.open(_written(folder, DOUBLE, tmp_path / "image"), "k")
    image.check(2)
    found, expected = load_image(folder, image, dtype), load_model(folder, DOUBLE, dtype)

    ours, theirs = _tensors(found), _tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(loss_of(found), loss_of(expected))
    assert list(found.linears) == list(expected.linears)
    embedding: Any = found.graph.get_submodule("embed_tokens")
    assert (found.head.data_ptr() == embedding.weight.data_ptr()) == tied


@pytest.mark.parametrize("scheme", [Int8(), Nf4(double=False, block=128)], ids=["int8", "nf4-128"])
def test_every_scheme_has_images(scheme: Scheme, small_model: Make, loss_of: Loss, tmp_path: Path) -> None:
    """To the bit, too."""
    folder = small_model("llama", "bfloat16", **LIVELY)
    image = Image.open(_written(folder, scheme, tmp_path / "image"), "k")

    expected = loss_of(load_model(folder, scheme, torch.float32))
    assert torch.equal(loss_of(load_image(folder, image, torch.float32)), expected)


def test_the_large_tensors_are_mapped_and_aligned(small_model: Make, tmp_path: Path) -> None:
    """Embedding, head and linear weights lie in the file, aligned as torch's own memory."""
    folder = small_model("llama", "bfloat16", **LIVELY, tie_word_embeddings=False)
    path = _written(folder, DOUBLE, tmp_path / "image")
    model: Any = load_image(folder, Image.open(path, "k"), torch.float32)
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path / WEIGHTS))
    ]
    tensors = [model.head, model.graph.get_submodule("embed_tokens").weight]
    tensors += [layer.weight.codes for layer in model.linears.values() if hasattr(layer.weight, "codes")]

    for tensor in tensors:
        assert tensor.data_ptr() % image_module.ALIGNMENT == 0
        assert any(
            start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end for start, end in mapped
        )


class Kept(NamedTuple):
    """An image that is whole."""

    model: Path
    folder: Path


@pytest.fixture(scope="module")
def kept(small_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """An image of several digests."""
    model = small_model("llama", "bfloat16", **LIVELY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_module, "CHUNK_BYTES", 4096)
        folder = _written(model, DOUBLE, tmp_path_factory.mktemp("images") / "image")
    return Kept(model, folder)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `kept` was written."""
    monkeypatch.setattr(image_module, "CHUNK_BYTES", 4096)


def _opened(folder: Path, key: str = "k") -> Image:
    image = Image.open(folder, key)
    image.check(2)
    return image


@pytest.mark.usefixtures("small_chunks")
def test_what_was_written_is_whole(kept: Kept) -> None:
    """So that the cases below are damage, and nothing else is."""
    image = _opened(kept.folder)

    assert image.weights_sha256 == "ab" * 32
    assert image.nbytes == (kept.folder / WEIGHTS).stat().st_size > 10 * 4096


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_flipped_or_cut_is_noticed(kept: Kept, tmp_path: Path, data: st.DataObject) -> None:
    """A bit of the weights or of what is said of them, a tail, or more than there was: never read as a model."""
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept.folder, folder)
    path = folder / data.draw(st.sampled_from([WEIGHTS, META]))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["flipped", "cut", "longer"]))
    if how == "flipped":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content[:place] if how == "cut" else content + b"x" * (how == "longer"))

    try:
        image = _opened(folder)
    except Damaged:
        return
    # White space of JSON at most.
    assert path.name == META
    assert json.loads(path.read_bytes()) == json.loads((kept.folder / META).read_bytes())
    assert image.nbytes == len((kept.folder / WEIGHTS).read_bytes())


@pytest.mark.usefixtures("small_chunks")
def test_an_image_under_another_name_is_foreign(kept: Kept) -> None:
    """Whoever renamed or copied a folder: what it holds is not what the key says."""
    with pytest.raises(Damaged, match=META):
        Image.open(kept.folder, "other")


@pytest.mark.usefixtures("small_chunks")
def test_an_image_of_another_format_is_not_read(kept: Kept, tmp_path: Path) -> None:
    """Though all its digests are right."""
    meta = json.loads((kept.folder / META).read_text())
    del meta["digest"]
    meta["format"] = 2
    meta["digest"] = image_module._digest_of(meta)
    shutil.copytree(kept.folder, tmp_path / "other")
    (tmp_path / "other" / META).write_text(json.dumps(meta))

    with pytest.raises(Damaged, match=META):
        Image.open(tmp_path / "other", "k")


def test_nothing_is_not_damaged(tmp_path: Path) -> None:
    """An image that is not there is another case than one that is broken."""
    with pytest.raises(FileNotFoundError):
        Image.open(tmp_path, "k")


def test_writing_to_a_mapped_weight_leaves_the_file_as_it_is(kept: Kept) -> None:
    """Other ranks and jobs never see what one process does to its memory."""
    image = Image.open(kept.folder, "k")
    before = (kept.folder / WEIGHTS).read_bytes()
    model = load_image(kept.model, image, torch.float32)
    model.head.zero_()

    assert (kept.folder / WEIGHTS).read_bytes() == before
