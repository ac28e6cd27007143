"""A job to start from, and a way to change one field of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import builders

MINIMAL = Path(__file__).parents[3] / "manifests/samples/minimal.yaml"


@pytest.fixture
def minimal() -> dict[str, Any]:
    """The smallest job, as plain values."""
    job = yaml.safe_load(MINIMAL.read_text(encoding="utf-8"))
    assert isinstance(job, dict)
    return job


@pytest.fixture
def changed(minimal: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """The smallest job with fields set by their paths: `changed({"spec.training.epochs": 2})`."""
    return lambda fields: builders.changed(minimal, fields)
