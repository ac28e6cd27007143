"""pytest plugin for the tiers: --unit selects tests without processes and torch, --repeat reports repeated ones."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

REPEATED = Path(".cache/repeated-tests.txt")
"""Tests that were repeated since the file was last removed, one `nodeid outcome` per line. Relative to the root."""
MOST_REPEATED = 5
"""When more tests than these fail, something is broken, and repeating them would only hide it for a while."""
UNIT_EXAMPLES = 20
"""Examples of each property in the unit tier; 100 in the others."""
NOT_UNIT = "pytestmark = pytest.mark.process"
"""What a file that the unit tier passes over says of itself. A single test is marked likewise, by a decorator."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the tiers."""
    parser.addoption(
        "--unit", action="store_true", help="only files whose tests start no process and import no torch"
    )
    parser.addoption(
        "--repeat", action="store_true", help="a second run of failed tests: report each as repeated"
    )


def pytest_configure(config: pytest.Config) -> None:
    """With --unit, properties are tried with fewer examples than in the other tiers, which run the same tests."""
    if config.getoption("--unit"):
        settings.register_profile("unit", settings.get_profile("default"), max_examples=UNIT_EXAMPLES)
        settings.load_profile("unit")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --unit, do not even import a test file that is marked `process`, nor the conftest of a folder of these."""
    if not config.getoption("--unit"):
        return None
    files = sorted(collection_path.rglob("test_*.py")) if collection_path.is_dir() else [collection_path]
    tests = [path for path in files if path.name.startswith("test_") and path.suffix == ".py"]
    return bool(tests and all(NOT_UNIT in path.read_text(encoding="utf-8") for path in tests)) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --unit, leave out single tests that are marked `process`."""
    if config.getoption("--unit"):
        left_out = [item for item in items if item.get_closest_marker("process")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("process")]


@pytest.fixture(autouse=True)
def _no_process_in_unit_tests(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """With --unit, a test that starts a process or imports torch fails, and says which mark it lacks."""
    if not request.config.getoption("--unit"):
        yield
        return

    def refuse(*_: Any, **__: Any) -> Any:
        pytest.fail(f"a unit test starts no process: put `{NOT_UNIT}` into {request.node.path}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "fork", refuse)
    had_torch = "torch" in sys.modules
    yield
    if "torch" in sys.modules and not had_torch:
        pytest.fail(f"a unit test imports no torch: put `{NOT_UNIT}` into {request.node.path}")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to repeat more than a few tests."""
    if session.config.getoption("--repeat") and len(session.items) > MOST_REPEATED:
        pytest.exit(f"{len(session.items)} tests failed; at most {MOST_REPEATED} are repeated", returncode=1)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Name each repeated test, and keep it for the end of the whole run."""
    if not config.getoption("--repeat"):
        return
    outcomes = {
        report.nodeid: f"{outcome} the second time"
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.stats.get(outcome, [])
    }
    lines = [f"{nodeid} {outcome}" for nodeid, outcome in sorted(outcomes.items())]
    terminalreporter.section(f"repeated tests: {len(lines)}")
    for line in lines:
        terminalreporter.write_line(line)
    path = config.rootpath / REPEATED
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)
