"""Tell: the metrics of a job whose decision is saved."""

from qlora_operator.api.names import Key, Phase
from qlora_operator.api.status import QLoRAJobStatus
from qlora_operator.controller.metrics import JobSample, Metrics
from qlora_operator.status.policies import DONE

FINAL_PHASES = (Phase.SUCCEEDED, Phase.FAILED)


def record(metrics: Metrics, key: Key, before: QLoRAJobStatus | None, after: QLoRAJobStatus) -> None:
    """How the job is now, and what has happened since its status was `before`."""
    before, progress = before or QLoRAJobStatus(), after.progress
    metrics.jobs.set(
        *key,
        JobSample(
            phase=Phase(after.phase or Phase.PENDING),
            tokens_per_second=progress.tokens_per_second if progress else None,
            loss=progress.loss if progress else None,
        ),
    )
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
