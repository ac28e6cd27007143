"""A job to start from, and a way to change one field of it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

MINIMAL = Path(__file__).parents[3] / "manifests/samples/minimal.yaml"
REMOVED = object()


@pytest.fixture
def minimal() -> dict[str, Any]:
    """The smallest job, as plain values."""
    job = yaml.safe_load(MINIMAL.read_text(encoding="utf-8"))
    assert isinstance(job, dict)
    return job


@pytest.fixture
def removed() -> object:
    """The value that `changed` takes a field away with."""
    return REMOVED


@pytest.fixture
def changed(minimal: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """The smallest job with fields set by their paths: `changed({"spec.training.epochs": 2})`."""

    def change(fields: dict[str, Any]) -> dict[str, Any]:
        job = copy.deepcopy(minimal)
        for path, value in fields.items():
            *parents, name = path.split(".")
            place = job
            for parent in parents:
                place = place.setdefault(parent, {})
            if value is REMOVED:
                del place[name]
            else:
                place[name] = value
        return job

    return change
