"""The page about sizes against the estimates, and the estimates against what was measured."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sizes() -> Any:
    """The program that writes the page."""
    sys.path.insert(0, str(ROOT / "manifests"))
    try:
        spec = importlib.util.spec_from_file_location("sizes", ROOT / "manifests" / "sizes.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "manifests"))
    return module


def test_the_page_is_up_to_date() -> None:
    """docs/sizes.md is what the estimates give now."""
    check = [sys.executable, str(ROOT / "manifests/sizes.py"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True, timeout=120, check=False)

    assert (result.returncode, result.stdout) == (0, ""), f"run: python manifests/sizes.py\n{result.stderr}"


def test_estimates_are_near_what_was_measured(sizes: Any) -> None:
    """Within a tenth of every peak."""
    off = {
        f"{case['model']} {case['scheme']} {case['dtype']} {case['tokens']} {case['checkpointing']}": above
        for case in sizes.cases()
        if abs(above := sizes.estimate_of(case) / case["peak_bytes"] - 1) > 0.1
    }

    assert len(sizes.cases()) >= 20
    assert off == {}
