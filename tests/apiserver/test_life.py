"""A job from apply to its end."""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.cluster


def report(**values: Any) -> str:
    """A termination message of the trainer's launcher."""
    return json.dumps(
        {"version": 1, "exitCode": 0, "reason": "DONE", "cause": "all ranks are done", **values}
    )


def test_a_job_whose_ranks_all_end_well_succeeds(operator: Any, make_job: Callable[..., Any]) -> None:
    """A job whose ranks all end well is Succeeded, with its adapter and eval losses in the status."""
    job = make_job()
    pods = job.run()
    assert job.condition("Running")["status"] == "True"
    done = report(adapterUri="pvc://work/here/jobs/job/adapter", baseEvalLoss=3.0, evalLoss=2.0)
    for pod in pods:
        job.kubelet.succeeded(pod, message=done)
    status = job.until_phase("Succeeded")
    assert status["adapter"]["evalLoss"] == 2.0
    assert {c["type"] for c in status["conditions"] if c["status"] == "True"} >= {"Complete", "Finished"}
