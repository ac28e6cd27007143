"""The command that compiles the kernel library."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from qlora_trainer.kernels import build
from qlora_trainer.native.libraries import ExtensionUnavailable

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("environ", "programs", "zig", "expected"),
    [
        ({"CXX": "ccache g++-13"}, ["g++"], False, ["ccache", "g++-13"]),
        ({}, ["g++", "clang++"], False, ["g++"]),
        ({}, ["clang++"], True, ["clang++"]),
        ({}, [], True, [build.sys.executable, "-m", "ziglang", "c++"]),
    ],
    ids=["CXX", "g++", "clang++", "ziglang"],
)
def test_which_compiler(
    environ: dict[str, str],
    programs: list[str],
    zig: bool,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What CXX names comes first, then the compilers of the system, then that of the package index."""
    monkeypatch.setattr(shutil, "which", lambda name, path=None: name if name in programs else None)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda _: object() if zig else None)

    assert build.compiler(environ) == expected


def test_without_a_compiler_the_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command fails with it, unless the library was wanted only if possible."""
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)

    assert build.main([]) == 1
    assert build.main(["--if-possible"]) == 0
    sentences = capsys.readouterr().err.splitlines()
    assert len(sentences) == 2
    assert all("no g++, clang++ or Python package ziglang is installed" in line for line in sentences)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler said reaches the user, nothing half-made stays, and it is a failure even if possible."""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no space >&2\nexit 3\n")
    broken.chmod(0o755)

    with pytest.raises(ExtensionUnavailable, match="broken reports:\nno space"):
        build.build(tmp_path / "compiled", {"CXX": str(broken)})
    assert list((tmp_path / "compiled").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["g++"], "-march=x86-64"), (["python", "-m", "ziglang", "c++"], "-march=x86_64")],
    ids=["g++", "ziglang"],
)
def test_every_compiler_is_held_to_the_oldest_processor(
    words: list[str], expected: str, tmp_path: Path
) -> None:
    """Its default may be the processor that it runs on."""
    lines = build.commands(words, tmp_path, tmp_path / "out.so")

    assert all(expected in line for line in lines[:-1])


def test_only_a_tier_s_own_file_may_use_its_instructions(tmp_path: Path) -> None:
    """Whatever is not a tier's file is compiled for the oldest x86-64."""
    lines = build.commands(["c++"], tmp_path, tmp_path / "out.so")
    flags = {Path(line[-3]).stem: set(line) for line in lines[:-1]}

    assert flags.keys() > build.TIER_FLAGS.keys()
    assert {name for name, words in flags.items() if any(word.startswith("-mav") for word in words)} == set(
        build.TIER_FLAGS
    )
    assert lines[-1][-2:] == ["-o", str(tmp_path / "out.so")]


def test_no_function_of_one_tier_can_serve_another(tmp_path: Path) -> None:
    """The linker merges functions of equal names: all that a tier's file defines is in its own namespace."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    try:
        words = build.compiler(build.os.environ)
    except ExtensionUnavailable as error:
        pytest.skip(str(error))
    for line in build.commands(words, tmp_path, tmp_path / "out.so")[:-1]:
        if Path(line[-3]).stem in build.TIER_FLAGS:
            subprocess.run(line, check=True)
    foreign = {}
    for path in tmp_path.glob("tier_*.o"):
        symbols = subprocess.run(
            ["nm", "--demangle", "--defined-only", "--extern-only", path],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        tier = (
            path.stem.removeprefix("tier_").replace("amx", "amx_bf16").replace("_bf16_emulated", "_emulated")
        )
        mine = f"qlora::{tier}::"
        foreign[path.stem] = [line for line in symbols if mine not in line]

    assert len(foreign) == len(build.TIER_FLAGS)
    assert foreign == {name: [] for name in foreign}


def test_what_was_compiled_is_recorded(tmp_path: Path) -> None:
    """The manifest has the sources' hash, and a name of the build that also depends on the compiler."""
    made = []
    for version in ("1.0", "2.0"):
        compiler = tmp_path / f"compiler-{version}"
        compiler.write_text(
            f'#!/bin/sh\necho {version}\nfor last; do :; done\n[ "$last" = --version ] || touch "$last"\n'
        )
        compiler.chmod(0o755)
        assert build.build(tmp_path, {"CXX": str(compiler)}) == build.library_file(tmp_path)
        made.append(json.loads(build.manifest_file(tmp_path).read_text()))

    assert made[0]["sources"] == made[1]["sources"] == build.sources_hash()
    assert made[0]["build"] != made[1]["build"]


def test_any_source_changes_the_hash(tmp_path: Path) -> None:
    """Headers count as well as what is compiled."""
    hashes = [build.sources_hash(tmp_path)]
    for name in ("a.cpp", "b.hpp"):
        (tmp_path / name).write_text("x")
        hashes.append(build.sources_hash(tmp_path))

    assert len(set(hashes)) == 3


def test_what_is_compiled_already_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --if-missing the compiler is started only where there is no library of these sources."""
    made: list[Path] = []
    monkeypatch.setattr(build, "is_built", lambda: True)
    monkeypatch.setattr(build, "build", lambda: made.append(tmp_path))
    assert build.main(["--if-missing"]) == 0
    assert made == []
    monkeypatch.setattr(build, "is_built", lambda: False)
    assert build.main(["--if-missing"]) == 0
    assert made == [tmp_path]


@pytest.mark.parametrize(
    ("manifest", "library", "expected"),
    [
        pytest.param({"sources": build.sources_hash()}, True, True, id="of these sources"),
        pytest.param({"sources": "others"}, True, False, id="of others"),
        pytest.param({"sources": build.sources_hash()}, False, False, id="gone"),
        pytest.param(None, True, False, id="unknown"),
    ],
)
def test_a_library_counts_when_it_is_of_these_sources(
    tmp_path: Path, manifest: dict[str, str] | None, library: bool, expected: bool
) -> None:
    """The manifest says so, and the library is there."""
    if manifest is not None:
        build.manifest_file(tmp_path).write_text(json.dumps(manifest))
    if library:
        build.library_file(tmp_path).touch()

    assert build.is_built(tmp_path) == expected
