"""Jobs that several tests need."""

from collections.abc import Callable
from typing import Any

import pytest

from qlora_operator.api.v1alpha1 import QLoRAJob

SPEC: dict[str, Any] = {
    "workspace": "pvc://team/work",
    "model": {"source": "pvc://team/model"},
    "dataset": {"source": "pvc://team/data.jsonl"},
    "training": {"maxSteps": 1},
    "topology": {"memoryPerRank": "1Gi", "cpusPerRank": 1, "pinning": "best-effort"},
}


@pytest.fixture
def job_document() -> Callable[..., dict[str, Any]]:
    """A maker of job documents; a map that is given is merged into the one of that name."""

    def make(name: str = "small", **spec: Any) -> dict[str, Any]:
        merged = dict(SPEC)
        for key, value in spec.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
        return {
            "apiVersion": "qlora.dev/v1alpha1",
            "kind": "QLoRAJob",
            "metadata": {"name": name},
            "spec": merged,
        }

    return make


@pytest.fixture
def a_job(job_document: Callable[..., dict[str, Any]]) -> Callable[..., QLoRAJob]:
    """A maker of jobs."""
    return lambda **spec: QLoRAJob.model_validate(job_document(**spec))
