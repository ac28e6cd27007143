"""docs/metrics.md."""

import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from qlora_contract.progress import CheckpointRef, ProgressReport
from qlora_operator.api.names import Phase
from qlora_operator.controller.metrics import JobSample, Metrics
from qlora_trainer.telemetry.progress_server import metrics as of_a_job

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def documented(section: str) -> set[str]:
    """The metrics of a section's table."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_every_metric_of_the_operator_is_documented() -> None:
    """The page has the operator's metrics, and no other ones."""
    metrics = Metrics(CollectorRegistry(), "1")
    metrics.jobs.set("team", "job", JobSample(Phase.RUNNING, 1.0, 1.0))
    metrics.api_request("get", "jobs", 200, 0.1)
    metrics.restarts.labels("Killed", "user").inc()
    for counter in (metrics.core_hours, metrics.queue_seconds, metrics.lost_steps, metrics.energy):
        counter.labels("team").inc()
    metrics.cost.labels("team", "EUR").inc()
    text = generate_latest(metrics.registry).decode()
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}

    assert documented("The operator") == {name for name in names if not name.endswith("_created")}


def test_every_metric_of_a_job_is_documented() -> None:
    """The page has rank 0's metrics, and no other ones."""
    report = ProgressReport(
        job_uid="uid",
        attempt=0,
        stage="Training",
        step=1,
        total_steps=2,
        epoch=0.5,
        loss=1.0,
        eval_loss=1.0,
        tokens_per_second=1.0,
        eta_seconds=1.0,
        memory_estimate=1,
        memory_peak=1,
        checkpoint=CheckpointRef(step=1, time="2026-01-31T12:00:00Z", uri="pvc://c/x"),
        updated_time="2026-01-31T12:00:00Z",
    )
    names = {family.name + "_total" * (family.type == "counter") for family in of_a_job(report, 10)}

    assert documented("A job") == names
