"""docs/security.md names tests that are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = sorted(set(re.findall(r"`(tests/[^`]+)`", (ROOT / "docs" / "security.md").read_text())))


def test_tests_are_named() -> None:
    """There is a test for most of what is claimed."""
    assert len(NAMED) > 20


@pytest.mark.parametrize("name", NAMED)
def test_the_test_is_there(name: str) -> None:
    """A file, or a function in it."""
    file, _, function = name.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    functions = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not function or function in functions
