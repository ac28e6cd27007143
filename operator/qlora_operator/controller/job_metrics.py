"""Tell: the metrics of a job whose decision is saved."""

from datetime import datetime

from qlora_operator.api.names import Key, Phase
from qlora_operator.api.status import Cost, QLoRAJobStatus
from qlora_operator.controller.metrics import JobSample, Metrics
from qlora_operator.status.policies import DONE, pending_since

FINAL_PHASES = (Phase.SUCCEEDED, Phase.FAILED)
WAITING_PHASES = (Phase.PENDING, Phase.QUEUED, Phase.STARTING, Phase.RESTARTING)


def record(
    metrics: Metrics, key: Key, before: QLoRAJobStatus | None, after: QLoRAJobStatus, now: datetime
) -> None:
    """How the job is now, and what has happened since its status was `before`."""
    before, progress = before or QLoRAJobStatus(), after.progress
    phase = Phase(after.phase or Phase.PENDING)
    metrics.jobs.set(
        *key,
        JobSample(
            phase=phase,
            waiting_since=pending_since(after, now).timestamp() if phase in WAITING_PHASES else None,
            tokens_per_second=progress.tokens_per_second if progress else None,
            loss=progress.loss if progress else None,
        ),
    )
    _count_cost(metrics, key[0], before.cost or Cost(), after.cost or Cost())
    made, known = (
        set(status.adapter.exports or ()) if status.adapter else set() for status in (after, before)
    )
    for form in made - known:
        metrics.exports.labels(key[0], form).inc()
    if after.phase in FINAL_PHASES and before.phase not in FINAL_PHASES:
        metrics.jobs_finished.labels(key[0], after.phase).inc()
    if after.attempt is not None and before.attempt != after.attempt:
        metrics.attempts_started.inc()
    last, saved = after.attempts[-1:], before.attempts[-1:]
    if not last or not saved or last[0].reason in (None, *DONE):
        return
    if saved[0].attempt == last[0].attempt and saved[0].reason is None:
        # The budget that has paid for the end of the attempt.
        paid = (
            name
            for name in ("user", "infrastructure")
            if getattr(after.restarts, name, 0) > getattr(before.restarts, name, 0)
        )
        metrics.restarts.labels(last[0].reason, next(paid, "none")).inc()


def _count_cost(metrics: Metrics, namespace: str, before: Cost, after: Cost) -> None:
    """What an attempt has added to the cost of its job."""
    for counter, name in (
        (metrics.core_hours, "core_hours"),
        (metrics.queue_seconds, "queue_seconds"),
        (metrics.lost_steps, "lost_steps"),
        (metrics.energy, "energy_kwh"),
    ):
        added = (getattr(after, name) or 0) - (getattr(before, name) or 0)
        if added > 0:
            counter.labels(namespace).inc(added)
    # With another price the job's whole cost is another; what counts here is never negative.
    if after.money is not None and (added := after.money - (before.money or 0)) > 0:
        metrics.cost.labels(namespace, after.currency or "").inc(added)
