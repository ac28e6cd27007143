"""Jobs that several tests need."""

from collections.abc import Callable
from typing import Any

import pytest

from builders import job_manifest, merged
from qlora_operator.api.v1alpha1 import QLoRAJob

SMALL = {"training": {"maxSteps": 1}, "topology": {"pinning": "best-effort"}}
"""Fields of spec: what any machine can train."""


@pytest.fixture
def job_document() -> Callable[..., dict[str, Any]]:
    """A maker of job documents; a map that is given is merged into the one of that name."""
    return lambda name="small", **spec: job_manifest(name, **merged(SMALL, spec))


@pytest.fixture
def a_job(job_document: Callable[..., dict[str, Any]]) -> Callable[..., QLoRAJob]:
    """A maker of jobs."""
    return lambda **spec: QLoRAJob.model_validate(job_document(**spec))
