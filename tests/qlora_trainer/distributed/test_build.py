"""The command that compiles the backends. The compiling itself is done before the tests, by the command."""

from pathlib import Path

import pytest

from qlora_trainer.distributed import build, compiled
from qlora_trainer.distributed.libraries import BackendUnavailable


@pytest.mark.parametrize("backend", build.BACKENDS)
def test_the_compiler_is_given_existing_files(backend: str) -> None:
    """Sources, headers and libraries of a backend are there, and the output is where it was asked for."""
    headers, libraries = build.headers_and_libraries(backend)
    words = build.command(backend, headers, libraries, Path("out.so"))

    assert (headers / {"ccl": "oneapi/ccl.hpp", "mpi": "mpi.h"}[backend]).exists()
    assert all(library.exists() for library in libraries)
    assert Path(next(word for word in words if word.endswith(".cpp"))).exists()
    assert words[-2:] == ["-o", "out.so"]


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler said reaches the user, and nothing half-made stays."""
    monkeypatch.setattr(build, "command", lambda *_: ["sh", "-c", "echo no space >&2; exit 3"])

    with pytest.raises(BackendUnavailable, match="sh said:\nno space"):
        build.build("mpi", tmp_path / "compiled")
    assert list((tmp_path / "compiled").iterdir()) == []


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without g++ the sentence says which program is not there."""
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(BackendUnavailable, match="No such file or directory: 'no-such-compiler'"):
        build.build("mpi", tmp_path)


def test_what_was_compiled_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record beside the extension is that of the torch that it was compiled for."""
    monkeypatch.setattr(build, "command", lambda *words: ["touch", str(words[-1])])

    path = build.build("mpi", tmp_path)

    assert path == compiled.extension("mpi", tmp_path)
    assert path.exists()
    assert compiled.record("mpi", tmp_path).read_text().count(compiled.facts("mpi")["torch"]) == 1


def test_an_unknown_backend_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Only what has sources is compiled."""
    with pytest.raises(SystemExit):
        build.main(["gloo"])

    assert "gloo: only ccl and mpi are compiled" in capsys.readouterr().err
