"""A job as the administrator's settings make it: what it does not say, and the most that it may have.

Only what does not belong to the fields that may change while a job is suspended is set in the job itself: another
setting must not end attempts that run.
"""

from qlora_operator.api import names
from qlora_operator.api.v1alpha1 import QLoRAJob, Scheduling, Toleration
from qlora_operator.settings import Settings


def with_defaults(job: QLoRAJob, settings: Settings) -> QLoRAJob:
    """The job with its queue, its time to live, its deadline and its grace period."""
    defaults, limits, spec = settings.defaults, settings.limits, job.spec
    ttl = spec.ttl_seconds_after_finished
    changes = {
        "ttl_seconds_after_finished": _at_most(
            defaults.ttl_seconds_after_finished if ttl is None else ttl, limits.ttl_seconds_after_finished
        ),
        "active_deadline_seconds": _at_most(spec.active_deadline_seconds, limits.active_deadline_seconds),
        "termination_grace_period_seconds": _at_most(
            spec.termination_grace_period_seconds, limits.termination_grace_period_seconds
        ),
    }
    if settings.scale_up_seconds > spec.isa.step_down_seconds:
        isa = spec.isa.model_copy(update={"step_down_seconds": settings.scale_up_seconds})
        spec = spec.model_copy(update={"isa": isa})
    metadata = job.metadata
    if job.queue_name is None and defaults.queue_name is not None:
        labels = {**metadata.labels, names.QUEUE_LABEL: defaults.queue_name}
        metadata = metadata.model_copy(update={"labels": labels})
    return job.model_copy(update={"metadata": metadata, "spec": spec.model_copy(update=changes)})


def scheduling(asked: Scheduling, settings: Settings) -> Scheduling:
    """Where pods of a job may run that asks for this."""
    defaults = settings.defaults
    return asked.model_copy(
        update={
            "node_selector": {**asked.node_selector, **defaults.node_selector},
            "tolerations": [*asked.tolerations, *map(Toleration.model_validate, defaults.tolerations)],
            "priority_class_name": asked.priority_class_name or defaults.priority_class_name,
        }
    )


def _at_most(value: int | None, most: int | None) -> int | None:
    return value if most is None else most if value is None else min(value, most)
