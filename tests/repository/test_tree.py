"""The rules of the house that a machine can check."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from qlora_operator.api.loader import load_jobs

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")
    if name and (ROOT / name).is_file()
)  # fmt: skip
PYTHON = [path for path in FILES if path.suffix == ".py"]
TESTS = [path for path in PYTHON if path.is_relative_to(ROOT / "tests")]
SOURCES = [path for path in PYTHON if path not in TESTS]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
SAMPLES = sorted((ROOT / "manifests" / "samples").glob("*.yaml"))
WITHOUT_SOURCE = {
    "repository",
    "docs",
    "releases",
    "support",
    "distributed",
    "apiserver",
    "e2e",
    "cluster",
    "charts",
    "images",
    "security",
    "hostile",
}
"""Folders of tests of the whole, or of a package's parts together."""
OF_SEVERAL_FILES = {
    "tests/qlora_trainer/data/test_brought_files.py",
    "tests/qlora_trainer/data/test_conversation_table.py",
    "tests/qlora_trainer/data/test_data_table.py",
    "tests/qlora_trainer/modeling/test_parity.py",
    "tests/qlora_operator/status/test_reads.py",
}
"""Tests of a package's files together."""
SOURCE_ROOTS = ("operator", "trainer", "operator/benchmarks", "trainer/benchmarks", "")


def name(path: Path) -> str:
    """A file's path in the repository: what a failing test shows."""
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(), name(path))


def test_the_files_were_found() -> None:
    """The checks below look at something."""
    assert {"pyproject.toml", "operator/qlora_operator/cli/main.py", "tests/repository/test_tree.py"} <= {
        name(path) for path in FILES
    }


def test_no_package_shadows_the_standard_library() -> None:
    """Neither operator/ nor trainer/ nor anything under tests/ is a package: `import operator` means Python's."""
    forbidden = [ROOT / "operator", ROOT / "trainer", *(ROOT / "tests").rglob("*")]

    assert [name(folder) for folder in forbidden if (folder / "__init__.py").exists()] == []
    assert not (ROOT / "tests" / "__init__.py").exists()


REGISTRIES = ("pypi", "pythonhosted", "pytorch", "anaconda")
INDEX = r"(?m)^\s*(-i|--index-url|--extra-index-url|--find-links|-f|--trusted-host)\b"


@pytest.mark.parametrize("registry", REGISTRIES)
def test_no_file_names_a_registry(registry: str) -> None:
    """Where packages come from is the business of whoever installs: nothing here goes past their mirror."""
    host = f"{registry}.org"
    found = [name(path) for path in FILES if host in path.read_text(errors="replace")]

    assert found == []


def test_no_file_names_a_developer_s_machine() -> None:
    """Nothing holds only where it was written: no home folder, and not the folder that this checkout lies in."""
    here = [re.escape(str(ROOT))] if len(ROOT.parts) > 2 else []
    home = re.compile("|".join([*here, r"(?<![\w.$~-])/(home|Users)/[A-Za-z]"]))
    found = {name(path) for path in FILES if home.search(path.read_text(errors="replace"))}

    assert found - {name(Path(__file__))} == set()


@pytest.mark.parametrize("lock", LOCKS, ids=name)
def test_requirements_name_no_index(lock: Path) -> None:
    """Lock files say what is installed, not from where."""
    assert not re.search(INDEX, lock.read_text())
    assert "://" not in lock.read_text()


@pytest.mark.parametrize("lock", LOCKS, ids=name)
def test_every_requirement_is_pinned_by_content(lock: Path) -> None:
    """Each has one exact version and at least one sha256."""
    lines = [line for line in lock.read_text().replace("\\\n", " ").splitlines() if line and line[0] != "#"]
    pinned = re.compile(r"[a-z0-9][a-z0-9._-]*==[0-9][^\s;]*\s*(;.*?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*")

    assert lines
    assert [line[:80] for line in lines if not pinned.fullmatch(line)] == []


def source_of(test: Path) -> bool:
    """Whether the file that a test mirrors exists."""
    folder = test.parent.relative_to(ROOT / "tests")
    file = "__main__.py" if test.name == "test_main.py" else test.name.removeprefix("test_")
    packaged = [ROOT / root / folder / file for root in SOURCE_ROOTS]
    folder_s_own = [ROOT / root / folder / file.removesuffix(".py") / "__init__.py" for root in SOURCE_ROOTS]
    benchmarks = [ROOT / side / folder / file for side in ("operator", "trainer")]
    compiled = [path.with_suffix(".hpp") for path in packaged]
    return any(path.is_file() for path in [*packaged, *folder_s_own, *benchmarks, *compiled])


def test_each_test_file_mirrors_a_source_file() -> None:
    """tests/X/test_y.py tests X/y.py; whoever changes a file knows where its tests are."""
    mirrored = [
        test
        for test in TESTS
        if test.name != "conftest.py" and test.relative_to(ROOT / "tests").parts[0] not in WITHOUT_SOURCE
    ]

    assert len(mirrored) > 20
    assert {
        name(test) for test in mirrored if not (test.name.startswith("test_") and source_of(test))
    } <= OF_SEVERAL_FILES


def test_every_test_says_what_it_shows() -> None:
    """Each test function's docstring is the behaviour in words."""
    silent = [
        f"{name(path)}: {node.name}"
        for path in TESTS
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]

    assert silent == []


def test_every_module_says_what_it_is() -> None:
    """Each source file with code begins with a docstring."""
    silent = [name(path) for path in SOURCES if tree(path).body and not ast.get_docstring(tree(path))]

    assert silent == []


def test_every_sample_is_here_and_right() -> None:
    """Hand-written jobs live in manifests/samples, and each is what `qlora validate` accepts."""
    jobs = {
        name(path) for path in FILES if path.suffix == ".yaml" and b"kind: QLoRAJob\n" in path.read_bytes()
    }
    generated = {name(path) for path in (ROOT / "manifests" / "crd").glob("*.yaml")}
    generated |= {"manifests/install.yaml", "charts/qlora-operator/templates/crd.yaml"}

    assert SAMPLES
    assert {job for job in jobs - generated if not job.startswith("tests/")} == {
        name(path) for path in SAMPLES
    }
    assert all(load_jobs(str(path)) for path in SAMPLES)


def test_the_readme_s_job_is_right(tmp_path: Path) -> None:
    """What users copy first is a job that `qlora validate` accepts."""
    (example,) = re.findall(r"```yaml\n(apiVersion:.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "job.yaml").write_text(example)

    assert load_jobs(str(tmp_path / "job.yaml"))
    assert yaml.safe_load(example)["kind"] == "QLoRAJob"


MARKDOWN = [path for path in FILES if path.suffix == ".md"]


@pytest.mark.parametrize("page", MARKDOWN, ids=name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    """A relative link names a file or folder that exists."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose)
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]

    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_command_of_the_documents_exists() -> None:
    """`make X` in a document is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        (name(page), target)
        for page in MARKDOWN
        for target in re.findall(r"`make ([a-z0-9-]+)`|^make ([a-z0-9-]+)", page.read_text(), re.MULTILINE)
        for target in target
        if target
    }

    assert {(page, target) for page, target in named if target not in targets} == set()


def test_decisions_are_numbered_in_order() -> None:
    """docs/decisions has no gap and no number twice, and each says context, decision and consequence."""
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))

    assert [page.name[:5] for page in pages] == [f"{number:04d}-" for number in range(1, len(pages) + 1)]
    for page in pages:
        headings = re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequence"], page.name
