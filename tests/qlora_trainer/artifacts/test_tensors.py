"""Tensors as safetensors files."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_trainer.artifacts.tensors import save_tensors
from qlora_trainer.errors import StorageFull
from qlora_trainer.storage.atomic import translate_os_errors

pytestmark = pytest.mark.process


def test_tensors_are_written_as_they_are(tmp_path: Path) -> None:
    """Transposed views and all come back equal."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(3, dtype=torch.bfloat16)}
    save_tensors(tensors, tmp_path / "t", {"format": "pt"})
    loaded = load_file(tmp_path / "t")

    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_tensors_have_the_mode_of_any_file(tmp_path: Path, umask: int, mode: int) -> None:
    """Another user, such as a server's, reads them exactly if the umask lets it read the files beside them."""
    before = os.umask(umask)
    try:
        save_tensors({"a": torch.ones(1)}, tmp_path / "t")
        save_tensors({"a": torch.ones(1)}, tmp_path / "t")  # over the first one
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == mode


def test_tensors_that_do_not_fit_are_a_full_disk(tiny_disk: Path) -> None:
    """safetensors' own error is told apart: the job fails as storage full, not as something unforeseen."""
    with (
        pytest.raises(StorageFull, match=r"no space left while saving: .*/t "),
        translate_os_errors("saving"),
    ):
        save_tensors({"a": torch.ones(100_000)}, tiny_disk / "t")
