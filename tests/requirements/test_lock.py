"""Splitting one resolution into lock files."""

import runpy
from pathlib import Path

import pytest

LOCK = runpy.run_path(str(Path(__file__).parent.parent.parent / "requirements" / "lock.py"))
ENTRY = "{0} \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb"


def test_an_entry_keeps_its_hashes() -> None:
    """A lock falls apart where a name begins a line, and nowhere else."""
    whole = [ENTRY.format(line) for line in ("numpy==2.2", "torch==2.15 ; sys_platform == 'linux'", "7z==1")]

    assert LOCK["entries"]("\n".join(whole) + "\n") == whole


def test_an_empty_lock_has_no_entries() -> None:
    """Nothing becomes nothing, not one empty entry."""
    assert LOCK["entries"]("\n") == []


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("numpy==2.2 \\\n    --hash=sha256:aa", "numpy"),
        ("torch==2.15 ; sys_platform == 'linux'", "torch"),
        ("nvidia-nccl-cu13==2.29", "nvidia-nccl-cu13"),
    ],
)
def test_the_name_ends_before_the_version(entry: str, name: str) -> None:
    """Versions, markers and hashes are not part of it."""
    assert LOCK["name"](entry) == name


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("torch", True),
        ("triton", True),
        ("nvidia-cublas", True),
        ("cuda-bindings", True),
        ("torchvision", False),
        ("numpy", False),
        ("not-nvidia-x", False),
    ],
)
def test_torch_and_its_libraries_stand_apart(name: str, apart: bool) -> None:
    """Whoever takes torch's CPU-only build replaces one file, and nothing else is in it."""
    assert bool(LOCK["TORCH"].match(name)) == apart


def test_no_two_lock_files_disagree() -> None:
    """A package has one version for a platform and Python, whichever files it stands in."""
    folder = Path(__file__).parent.parent.parent / "requirements"
    versions: dict[str, set[str]] = {}
    for file in folder.glob("*.txt"):
        for entry in LOCK["entries"]("\n".join(ln for ln in file.read_text().splitlines() if ln[:1] != "#")):
            requirement, _, marker = entry.partition("\\")[0].partition(";")
            package, _, version = requirement.strip().partition("==")
            versions.setdefault(f"{package};{marker.strip()}", set()).add(version)

    assert {package: found for package, found in versions.items() if len(found) > 1} == {}
