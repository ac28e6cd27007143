"""The Indexed Job of one attempt: a pod for each of spec.topology.pods, all of them or none."""

import signal
from collections.abc import Iterable, Sequence
from typing import Any

from qlora_contract.exit_codes import COLLATERAL, INFRASTRUCTURE, PERMANENT
from qlora_contract.run import Fetched, IsaTier, RunStage
from qlora_operator.api import names
from qlora_operator.api.sizes import stage_pods
from qlora_operator.api.types import QLoRAJob, held_fields
from qlora_operator.desired.children import metadata
from qlora_operator.desired.pod import ROLES, pod_template
from qlora_operator.desired.run_config import NOTHING_FETCHED, run_config
from qlora_operator.settings import Settings

KILLED_BY_SIGTERM = 128 + signal.SIGTERM


def gang_job(
    job: QLoRAJob,
    *,
    uid: str,
    attempt: int,
    isa: IsaTier,
    image: str,
    settings: Settings,
    avoid: Sequence[str] = (),
    stage: RunStage = "train",
    fetched: Fetched = NOTHING_FETCHED,
) -> dict[str, Any]:
    """The batch/v1 Job of one attempt. Created once, never changed; its first failed pod ends it.

    Args:
        job: as the user wrote it.
        uid: the job's.
        attempt: from 0.
        isa: the tier that placement chose for all ranks.
        image: the trainer's, which must be one that is allowed.
        settings: the administrator's.
        avoid: names of nodes that the pods may not go to, although their labels fit.
        stage: what the attempt is to do.
        fetched: what the remote sources stand for, as far as that is known.
    """
    pods = stage_pods(job.spec.topology, stage)
    run = run_config(job, uid=uid, attempt=attempt, isa=isa, stage=stage, fetched=fetched)
    name = names.attempt_job(job.metadata.name, attempt)
    child: dict[str, Any] = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            **metadata(job, uid, name, ROLES[stage], attempt),
            "annotations": {names.HELD_FIELDS_ANNOTATION: held_fields(job.spec)},
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": failure_rules()},
            "template": pod_template(job, run, image, settings, avoid),
        },
    }
    if job.spec.scheduling.queue_name is not None:
        # Kueue sets suspend to false when there is quota; an unsuspended Job would run before.
        child["metadata"]["labels"][names.QUEUE_LABEL] = job.spec.scheduling.queue_name
        child["spec"]["suspend"] = True
    return child


def failure_rules() -> list[dict[str, Any]]:
    """Rules of podFailurePolicy, the first that matches a failed pod being the Job's reason.

    Codes that only follow from another pod's end match none of them: the pod that is the cause names the
    reason, and a Job without one ends by its backoffLimit of 0.
    """
    disruption = {"type": "DisruptionTarget", "status": "True"}
    return [
        {"action": "FailJob", "onPodConditions": [disruption]},
        _fail_on("In", PERMANENT),
        _fail_on("In", INFRASTRUCTURE),
        _fail_on("NotIn", {*COLLATERAL, KILLED_BY_SIGTERM}),
    ]


def _fail_on(operator: str, codes: Iterable[int]) -> dict[str, Any]:
    """Code 0 is never looked at, and `In` may not list it; the API server wants the list in order."""
    values = sorted(int(code) for code in codes)
    exit_codes = {"containerName": names.TRAINER_CONTAINER, "operator": operator, "values": values}
    return {"action": "FailJob", "onExitCodes": exit_codes}
