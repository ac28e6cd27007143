"""The command that compiles extensions. The compiling itself is done before the tests, by the command."""

from itertools import pairwise
from pathlib import Path

import pytest

from qlora_trainer.native import build
from qlora_trainer.native.extension import Extension, all_extensions
from qlora_trainer.native.libraries import ExtensionUnavailable

pytestmark = pytest.mark.process
EXTENSIONS = all_extensions()
MPI = EXTENSIONS["mpi"]


@pytest.mark.parametrize("extension", EXTENSIONS.values(), ids=EXTENSIONS)
def test_the_compiler_is_given_existing_files(extension: Extension) -> None:
    """Sources, headers and libraries of an extension are there, and the output is where it was asked for."""
    words = build.command(extension, Path("out.so"))
    included = [Path(word) for before, word in pairwise(words) if before == "-isystem"]
    files = [Path(word) for word in words[1:-1] if word.startswith("/") and Path(word) not in included]

    for _, header in extension.headers:
        assert any((folder / header).exists() for folder in included)
    assert extension.source in files
    assert len(files) == 1 + len(extension.libraries)
    assert all(file.is_file() for file in files)
    assert words[-2:] == ["-o", "out.so"]


def test_flags_of_the_description_reach_the_compiler(tmp_path: Path) -> None:
    """An extension may ask for an instruction set."""
    extension = Extension("x", "x", tmp_path, flags=("-mamx-int8",))

    assert "-mamx-int8" in build.command(extension, Path("out.so"))


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler said reaches the user, and nothing half-made stays."""
    monkeypatch.setattr(build, "command", lambda *_: ["sh", "-c", "echo no space >&2; exit 3"])

    with pytest.raises(ExtensionUnavailable, match="backend mpi cannot be compiled; sh reports:\nno space"):
        build.build(MPI, tmp_path / "compiled")
    assert list((tmp_path / "compiled").iterdir()) == []


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without g++ the sentence says which program is not there."""
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(ExtensionUnavailable, match="No such file or directory: 'no-such-compiler'"):
        build.build(MPI, tmp_path)


def test_what_was_compiled_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest beside the extension is that of the torch that it was compiled for."""
    monkeypatch.setattr(build, "command", lambda *words: ["touch", str(words[-1])])

    path = build.build(MPI, tmp_path)

    assert path == MPI.file(tmp_path)
    assert path.exists()
    assert MPI.manifest(tmp_path).read_text().count(MPI.build_info()["torch"]) == 1


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Only what has sources is compiled."""
    with pytest.raises(SystemExit):
        build.main(["gloo"], {"ccl": EXTENSIONS["ccl"], "mpi": MPI})

    assert "gloo: only ccl and mpi are compiled" in capsys.readouterr().err


def test_the_command_ends_with_1_and_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be compiled ends the command with its sentence on standard error."""

    def fail(extension: Extension) -> Path:
        raise ExtensionUnavailable(f"{extension.title} needs a compiler")

    monkeypatch.setattr(build, "build", fail)

    assert build.main(["mpi"]) == 1
    assert capsys.readouterr().err == "backend mpi needs a compiler\n"
