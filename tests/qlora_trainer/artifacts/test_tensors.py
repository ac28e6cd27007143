"""Tensors as safetensors files."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_trainer.artifacts.tensors import save_tensors
from qlora_trainer.errors import StorageFull
from qlora_trainer.storage.atomic import translate_os_errors

pytestmark = pytest.mark.process


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True, text=True, check=False
    ) if shutil.which("mount") else None  # fmt: skip
    if mounted is None or mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip() if mounted else 'no mount'}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_tensors_are_written_as_they_are(tmp_path: Path) -> None:
    """Transposed views and all come back equal."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(3, dtype=torch.bfloat16)}
    save_tensors(tensors, tmp_path / "t", {"format": "pt"})
    loaded = load_file(tmp_path / "t")

    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_tensors_that_do_not_fit_are_a_full_disk(tiny_disk: Path) -> None:
    """safetensors' own error is told apart: the job fails as storage full, not as something unforeseen."""
    with (
        pytest.raises(StorageFull, match=r"no space left while saving: .*/t "),
        translate_os_errors("saving"),
    ):
        save_tensors({"a": torch.ones(100_000)}, tiny_disk / "t")
