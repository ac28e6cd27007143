"""What the administrator allows a job to ask for, checked by the operator.

The chart's admission policies refuse such jobs at once, but not every cluster has them, and a job may be older than a
policy.
"""

import re

from qlora_contract.remote import fits, setting_of, source_allowed
from qlora_operator.api import names
from qlora_operator.api.names import Reason
from qlora_operator.api.pod_resources import pod_cpus, resource_multiplier
from qlora_operator.api.quantity import parse_memory
from qlora_operator.api.v1alpha1 import QLoRAJob, QLoRAJobSpec
from qlora_operator.settings import DIGEST_PATTERN, Settings

COMMIT_PATTERN = "[0-9a-f]{40}"
"""A revision of the Hub that stays what it is; branches and tags move."""


def policy_violation(job: QLoRAJob, settings: Settings) -> tuple[Reason, str] | None:
    """Why a job may not start: the condition's reason and message; None when it may. `settings` are its namespace's."""
    spec = job.spec
    if spec.image is not None and not image_allowed(spec.image, settings):
        return Reason.IMAGE_NOT_ALLOWED, (
            f"spec.image {spec.image} is not allowed here: ask the administrator, or leave it out in another job"
        )
    if settings.require_digests and (loose := _unpinned(spec)):
        return loose
    uris = {
        **{f"spec.{source.uri_field}": source.uri for source in spec.sources},
        "spec.output.destination": spec.output.destination,
    }
    for field, uri in uris.items():
        if uri is not None and not source_allowed(uri, settings.allowed_sources):
            return Reason.SOURCE_NOT_ALLOWED, (
                f"{field} {uri} is not allowed here: ask the administrator, or name another in another job"
            )
    if not any(fits(spec.workspace, pattern) for pattern in settings.allowed.workspaces):
        return Reason.SOURCE_NOT_ALLOWED, (
            f"spec.workspace {spec.workspace} is not allowed here: "
            "ask the administrator, or name another in another job"
        )
    mlflow = spec.tracking.mlflow
    if mlflow is not None and not any(fits(mlflow.uri, pattern) for pattern in settings.allowed_tracking):
        return Reason.SOURCE_NOT_ALLOWED, (
            f"spec.tracking.mlflow.uri {mlflow.uri} is not allowed here: ask the administrator, or leave it out in "
            "another job"
        )
    return _scheduling_violation(job, settings) or _size_violation(spec, settings)


def _unpinned(spec: QLoRAJobSpec) -> tuple[Reason, str] | None:
    """What a job names by a name that may come to mean something else."""
    if spec.image is not None and not re.search(DIGEST_PATTERN, spec.image):
        return Reason.IMAGE_NOT_ALLOWED, (
            f"spec.image {spec.image} has no digest, which is demanded here: name it as repository@sha256:... in "
            "another job, or leave it out"
        )
    for source in spec.sources:
        if source.uri.startswith("hf://") and not re.fullmatch(COMMIT_PATTERN, source.revision):
            return Reason.SOURCE_NOT_ALLOWED, (
                f"spec.{setting_of(source.field, 'revision')} {source.revision} is no commit, which is demanded here: "
                "name the 40 hexadecimal digits of one in another job"
            )
    return None


def _scheduling_violation(job: QLoRAJob, settings: Settings) -> tuple[Reason, str] | None:
    asked, allowed, defaults = job.spec.scheduling, settings.allowed, settings.defaults
    own_queue = [] if defaults.queue_name is None else [defaults.queue_name]
    own_class = [] if defaults.priority_class_name is None else [defaults.priority_class_name]
    queue = [] if job.queue_name is None else [job.queue_name]
    priority_class = [] if asked.priority_class_name is None else [asked.priority_class_name]
    if workload_class := job.metadata.labels.get(names.WORKLOAD_PRIORITY_LABEL):
        priority_class.append(workload_class)
    named = {
        "queueName": (queue, [*allowed.queues, *own_queue]),
        "priorityClassName": (priority_class, [*allowed.priority_classes, *own_class]),
        "nodeSelector": (asked.node_selector, allowed.node_labels),
        # Only `*` allows a toleration without a key, which is one of every taint.
        "tolerations": ([each.key or "" for each in asked.tolerations], allowed.tolerations),
    }
    for field, (values, patterns) in named.items():
        for value in values:
            if not any(fits(value, pattern) for pattern in patterns):
                what = value or "of every taint"
                return Reason.SCHEDULING_NOT_ALLOWED, (
                    f"spec.scheduling.{field} {what} is not allowed here; allowed: {', '.join(patterns) or 'none'}: "
                    "suspend the job and change it, or ask the administrator"
                )
    for key, wanted in defaults.node_selector.items():
        if asked.node_selector.get(key, wanted) != wanted:
            return Reason.SCHEDULING_NOT_ALLOWED, (
                f"spec.scheduling.nodeSelector {key}={asked.node_selector[key]} is not allowed here, where jobs run on "
                f"nodes with {key}={wanted}: suspend the job and change it, or ask the administrator"
            )
    return None


def _size_violation(spec: QLoRAJobSpec, settings: Settings) -> tuple[Reason, str] | None:
    topology, limits = spec.topology, settings.limits
    ranks = topology.pods * resource_multiplier(topology)  # with ranksPerPod auto a pod counts as one
    memory = ranks * parse_memory(topology.memory_per_rank)
    asked = {
        "pods": (topology.pods, limits.pods),
        "ranks": (ranks, limits.ranks),
        "CPUs": (topology.pods * pod_cpus(topology), limits.cpus),
        "bytes of memory": (memory, None if limits.memory is None else parse_memory(limits.memory)),
    }
    for name, (wanted, most) in asked.items():
        if most is not None and wanted > most:
            return Reason.LIMIT_EXCEEDED, (
                f"spec.topology asks for {wanted} {name} in all, and a job may have {most}: "
                "suspend the job and lower its topology, or ask the administrator"
            )
    return None


def image_allowed(image: str, settings: Settings) -> bool:
    """Whether a job may name this image: the default one, or one that a pattern matches."""
    return image == settings.trainer_image or any(fits(image, p) for p in settings.allowed_images)
