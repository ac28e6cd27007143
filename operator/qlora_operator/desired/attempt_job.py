"""The AttemptJob, the Indexed Job of one attempt: a pod for each of its topology's pods, all of them or none."""

import signal
from collections.abc import Iterable, Sequence
from typing import Any

from qlora_contract.exit_codes import COLLATERAL, INFRASTRUCTURE, PERMANENT
from qlora_contract.run_config import IsaTier, ResolvedRevisions, RunStage
from qlora_operator.api import names
from qlora_operator.api.pod_resources import stage_pods, with_pods
from qlora_operator.api.run_config import NOTHING_FETCHED, to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob, topology_hash
from qlora_operator.desired.metadata import metadata
from qlora_operator.desired.pod import ROLES, pod_template
from qlora_operator.settings import Settings

KILLED_BY_SIGTERM = 128 + signal.SIGTERM


def attempt_job(
    job: QLoRAJob,
    *,
    uid: str,
    attempt: int,
    isa: IsaTier,
    image: str,
    settings: Settings,
    avoid: Sequence[str] = (),
    shun: Sequence[str] = (),
    pods: int | None = None,
    stage: RunStage = "train",
    fetched: ResolvedRevisions = NOTHING_FETCHED,
    checkpoint_time: str | None = None,
    requested: str | None = None,
    workload: str | None = None,
) -> dict[str, Any]:
    """The batch/v1 Job of one attempt. It is created once and never changed; its first failed pod ends it.

    Args:
        job: as the user wrote it.
        uid: the job's.
        attempt: from 0.
        isa: the tier that placement chose for all ranks.
        image: the trainer's, which must be one that is allowed.
        settings: the administrator's.
        avoid: names of nodes that the pods may not go to, although their labels fit.
        shun: names of nodes that the pods go to if there are no others.
        pods: how many pods of ranks the attempt makes do with; None: all that the job asks for.
        stage: what the attempt is to do.
        fetched: what the remote sources stand for, as far as that is known.
        checkpoint_time: when the newest checkpoint was made, RFC 3339; None where that is not known.
        requested: when the attempt was decided upon, RFC 3339; None where that is not known.
        workload: Kueue's Workload that it takes over from an earlier attempt.
    """
    asked = topology_hash(job.spec)
    least, all_pods = job.spec.topology.min_pods, job.spec.topology.pods
    topology = with_pods(job.spec.topology, pods)
    job = job.model_copy(update={"spec": job.spec.model_copy(update={"topology": topology})})
    pods = stage_pods(topology, stage)
    run = to_run_config(job, uid=uid, attempt=attempt, isa=isa, stage=stage, fetched=fetched)
    name = names.attempt_job(job.metadata.name, attempt)
    child: dict[str, Any] = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            **metadata(job, uid, name, ROLES[stage], attempt),
            "annotations": {
                names.TOPOLOGY_HASH_ANNOTATION: asked,
                **({names.CHECKPOINT_ANNOTATION: checkpoint_time} if checkpoint_time is not None else {}),
            },
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": failure_rules()},
            "template": pod_template(job, run, image, settings, avoid, shun, requested),
        },
    }
    if job.queue_name is not None:
        # Kueue sets suspend to false when there is quota; an unsuspended Job would run before.
        child["metadata"]["labels"][names.QUEUE_LABEL] = job.queue_name
        child["spec"]["suspend"] = True
        # A Workload is for all pods, however many of them Kueue has let in: it sets the Job's number when it starts it.
        wanted = all_pods if stage == "train" and workload is not None else pods
        if stage == "train" and least is not None and least < wanted:
            child["spec"].update(completions=wanted, parallelism=wanted)
            child["metadata"]["annotations"].update(
                zip(names.PARTIAL_ADMISSION, (str(least), "true"), strict=True)
            )
    if workload is not None:
        child["metadata"]["labels"][names.PREBUILT_WORKLOAD_LABEL] = workload
    if priority := job.metadata.labels.get(names.WORKLOAD_PRIORITY_LABEL):
        child["metadata"]["labels"][names.WORKLOAD_PRIORITY_LABEL] = priority
    return child


def failure_rules() -> list[dict[str, Any]]:
    """Rules of podFailurePolicy: the first that matches a failed pod gives the Job its reason.

    Exit codes that are only a consequence of another pod's end match none of them: the pod that is the cause gives the
    reason. A Job whose pods all match none fails by its backoffLimit of 0.
    """
    disruption = {"type": "DisruptionTarget", "status": "True"}
    return [
        {"action": "FailJob", "onPodConditions": [disruption]},
        _fail_on("In", PERMANENT),
        _fail_on("In", INFRASTRUCTURE),
        _fail_on("NotIn", {*COLLATERAL, KILLED_BY_SIGTERM}),
    ]


def _fail_on(operator: str, codes: Iterable[int]) -> dict[str, Any]:
    """A rule on exit codes, other than 0. The API server requires the values in order."""
    values = sorted(int(code) for code in codes)
    exit_codes = {"containerName": names.TRAINER_CONTAINER, "operator": operator, "values": values}
    return {"action": "FailJob", "onExitCodes": exit_codes}
