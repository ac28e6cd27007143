"""Extensions that fit, and those that do not."""

import json
import sys
from pathlib import Path

import pytest
import torch

from qlora_trainer.distributed import compiled
from qlora_trainer.distributed.libraries import BackendUnavailable

NOW = {"torch": "2.15.0", "python": "3.11", "sources": "abc"}


@pytest.mark.parametrize(
    ("built", "said"),
    [
        pytest.param(NOW, None, id="fits"),
        pytest.param(None, r"ccl is not compiled: run `python -m .*build ccl`", id="not-compiled"),
        pytest.param(
            {**NOW, "torch": "2.14.1"}, r"for torch 2\.14\.1, but torch 2\.15\.0 is", id="other-torch"
        ),
        pytest.param({**NOW, "python": "3.12"}, r"for python 3\.12, but python 3\.11 is", id="other-python"),
        pytest.param({**NOW, "sources": "abd"}, "from other sources", id="changed-sources"),
        pytest.param({}, "for torch None", id="empty-record"),
    ],
)
def test_why_not(built: dict[str, str] | None, said: str | None) -> None:
    """An extension for another torch, Python or source is refused with both versions and the command."""
    reason = compiled.why_not("ccl", built, NOW)

    if said is None:
        assert reason is None
    else:
        assert reason is not None
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(reason)


def test_an_extension_for_another_torch_is_not_imported(tmp_path: Path) -> None:
    """The record is read first: a file that would end the process is never opened."""
    compiled.extension("ccl", tmp_path).write_bytes(b"no library")
    compiled.record("ccl", tmp_path).write_text(json.dumps({**compiled.facts("ccl"), "torch": "1.0"}))

    with pytest.raises(BackendUnavailable, match=f"torch 1.0, but torch {torch.__version__.split('+')[0]}"):
        compiled.load("ccl", tmp_path)


def test_a_broken_extension_is_named(tmp_path: Path) -> None:
    """What claims to fit and is no library is named with its path."""
    compiled.extension("ccl", tmp_path).write_bytes(b"no library")
    compiled.record("ccl", tmp_path).write_text(json.dumps(compiled.facts("ccl")))

    with pytest.raises(BackendUnavailable, match=f"cannot be loaded from {tmp_path}"):
        compiled.load("ccl", tmp_path)


def test_facts_are_of_this_python_and_torch() -> None:
    """The record names what an extension's binary interface depends on."""
    facts = compiled.facts("mpi")

    assert facts["torch"] == torch.__version__
    assert facts["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert facts["sources"] != compiled.facts("ccl")["sources"]
