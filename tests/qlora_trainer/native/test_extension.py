"""Extensions: how they are described, those that fit, and those that do not."""

import json
import sys
from pathlib import Path

import pytest
import torch

from qlora_trainer.native.extension import Extension, all_extensions
from qlora_trainer.native.libraries import ExtensionUnavailable

pytestmark = pytest.mark.process
NOW = {"torch": "2.15.0", "python": "3.11", "sources": "abc"}
DESCRIPTION = """
title = "fused kernels"
extra = "kernels"
headers = [{ distribution = "a", file = "b/c.hpp" }]
flags = ["-mavx2"]
"""


@pytest.fixture
def extension(tmp_path: Path) -> Extension:
    """An extension of some other room, with its sources."""
    folder = tmp_path / "room" / "csrc"
    folder.mkdir(parents=True)
    (folder / "fused.toml").write_text(DESCRIPTION)
    (folder / "fused.cpp").write_text("// nothing")
    return Extension.read(folder / "fused.toml")


def test_a_description_is_read(extension: Extension) -> None:
    """The name is the file's; what is left out is empty."""
    assert extension == Extension(
        name="fused",
        title="fused kernels",
        folder=extension.folder,
        extra="kernels",
        headers=(("a", "b/c.hpp"),),
        flags=("-mavx2",),
    )
    assert extension.source == extension.folder / "fused.cpp"


def test_a_description_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    """A misspelt field is an error of whoever wrote it, never passed over."""
    (tmp_path / "x.toml").write_text('title = "x"\nlibrarys = []\n')

    with pytest.raises(TypeError, match="librarys"):
        Extension.read(tmp_path / "x.toml")


def test_extensions_of_every_room_are_found(extension: Extension) -> None:
    """Whatever room has csrc/NAME.toml has an extension; nobody lists them."""
    assert all_extensions(extension.folder.parents[1]) == {"fused": extension}
    assert set(all_extensions()) >= {"ccl", "mpi"}


def test_what_is_missing_is_named_with_what_to_install(extension: Extension) -> None:
    """The sentence has the file, the distribution and the extra that brings it."""
    with pytest.raises(
        ExtensionUnavailable,
        match=r"^fused kernels needs no-such-file.so of torch.*pip install 'qlora-operator\[kernels\]'",
    ):
        extension.find("torch", "no-such-file.so")


@pytest.mark.parametrize(
    ("built", "said"),
    [
        pytest.param(NOW, None, id="fits"),
        pytest.param(None, r"kernels is not compiled: run `python -m .*build fused`", id="not-compiled"),
        pytest.param(
            {**NOW, "torch": "2.14.1"}, r"for torch 2\.14\.1, but torch 2\.15\.0 is", id="other-torch"
        ),
        pytest.param({**NOW, "python": "3.12"}, r"for python 3\.12, but python 3\.11 is", id="other-python"),
        pytest.param({**NOW, "sources": "abd"}, "from other sources", id="changed-sources"),
        pytest.param({}, "for torch None", id="empty-manifest"),
    ],
)
def test_an_extension_that_does_not_fit_is_refused(
    extension: Extension, built: dict[str, str] | None, said: str | None
) -> None:
    """An extension for another torch, Python or source is refused with both versions and the command."""
    reason = extension.incompatibility(built, NOW)

    if said is None:
        assert reason is None
    else:
        assert reason is not None
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(reason)


def test_an_extension_for_another_torch_is_not_imported(extension: Extension, tmp_path: Path) -> None:
    """The manifest is read first: a file that would end the process is never opened."""
    extension.file(tmp_path).write_bytes(b"no library")
    extension.manifest(tmp_path).write_text(json.dumps({**extension.build_info(), "torch": "1.0"}))

    with pytest.raises(ExtensionUnavailable, match=f"torch 1.0, but torch {torch.__version__.split('+')[0]}"):
        extension.load(tmp_path)


def test_a_broken_extension_is_named(extension: Extension, tmp_path: Path) -> None:
    """A file that claims to fit and cannot be loaded is named with its path."""
    extension.file(tmp_path).write_bytes(b"no library")
    extension.manifest(tmp_path).write_text(json.dumps(extension.build_info()))

    with pytest.raises(ExtensionUnavailable, match=f"cannot be loaded from {tmp_path}"):
        extension.load(tmp_path)


def test_build_info_is_of_this_python_and_torch(extension: Extension) -> None:
    """The manifest names what an extension's binary interface depends on."""
    info = extension.build_info()

    assert info["torch"] == torch.__version__
    assert info["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.parametrize("name", ["fused.cpp", "fused.toml", "shared.hpp"])
def test_a_change_of_any_source_is_seen(extension: Extension, name: str) -> None:
    """The code, the headers beside it and the description (its flags) each make a new build necessary."""
    before = extension.build_info()
    path = extension.folder / name
    path.write_text((path.read_text() if path.exists() else "") + "\n")

    assert extension.build_info()["sources"] != before["sources"]
