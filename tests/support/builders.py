"""What tests are about, built from what a test says of it: jobs, runs, batch/v1 Jobs and pods.

A map that is given is merged into the map of that name, anything else takes the place of what was there, and OMIT
leaves a field out:

    job_manifest("demo", topology={"pods": 2}, training={"maxSteps": OMIT, "epochs": 3}, metadata={"namespace": "team"})

Each call returns an object of its own, which the test may change.
"""

import copy
from collections.abc import Mapping
from typing import Any

from qlora_contract.run_config import RunConfig
from qlora_operator.api import names
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.status.observation import AttemptJob, Pod

OMIT: Any = object()
"""The value of a field that is left out."""
JOB_UID = "0f8fad5b-d9cb-469f-a165-70867728950e"
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
ON_ONE_CLAIM: Mapping[str, Any] = {
    "workspace": "pvc://work/here",
    "model": {"source": "pvc://work/model"},
    "dataset": {"source": "pvc://work/data"},
}
"""Fields of spec: a job of which everything lies on the claim `work`."""

_SPEC: Mapping[str, Any] = {
    "workspace": "pvc://team/work",
    "model": {"source": "pvc://team/model"},
    "dataset": {"source": "pvc://team/data.jsonl"},
    "training": {"maxSteps": 10},
    "topology": {"cpusPerRank": 1, "memoryPerRank": "1Gi"},
}
_RUN: Mapping[str, Any] = {
    "job": {"name": "smollm2", "uid": "u-1", "attempt": 0},
    "workspace": "pvc://data/work",
    "model": {"source": "pvc://data/model"},
    "dataset": {"source": "pvc://data/train.jsonl"},
    "training": {"epochs": 1},
    "layout": {"memoryPerRank": 2**30},
    "isa": "avx2",
}


def merged(known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `known` with `given` in it, by the rules above."""
    result = copy.deepcopy(dict(known))
    for key, value in given.items():
        if value is OMIT:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            inner = {**(result.get(key) or {}), **value}
            result[key] = {name: each for name, each in inner.items() if each is not OMIT}
        else:
            result[key] = value
    return result


def changed(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `fields` with values set by their paths, such as {"spec.training.epochs": 2}, or taken out by OMIT."""
    result = copy.deepcopy(dict(fields))
    for path, value in changes.items():
        *parents, last = path.split(".")
        parent = result
        for name in parents:
            parent = parent.setdefault(name, {})
        if value is OMIT:
            del parent[last]
        else:
            parent[last] = value
    return result


# --- jobs


def job_manifest(
    name: str = "job",
    *,
    metadata: Mapping[str, Any] | None = None,
    status: Mapping[str, Any] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """A QLoRAJob as a user writes it: small, on a claim, ten steps of one rank; with `status`, as the API has it."""
    result = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": merged({"name": name}, metadata or {}),
        "spec": merged(_SPEC, spec),
    }
    return result if status is None else {**result, "status": dict(status)}


def a_job(name: str = "job", **fields: Any) -> QLoRAJob:
    """The job of a manifest; arguments as of job_manifest."""
    return QLoRAJob.model_validate(job_manifest(name, **fields))


# --- runs


def run_fields(**fields: Any) -> dict[str, Any]:
    """The fields of a run.json: one rank, one epoch, the lowest tier, no version."""
    return merged(_RUN, fields)


def a_run(**fields: Any) -> RunConfig:
    """The RunConfig of such fields."""
    return RunConfig.model_validate(run_fields(**fields))


# --- what the API server returns of an attempt


def batch_job(
    attempt: int = 0,
    *,
    job: str = "job",
    job_uid: str = JOB_UID,
    **parts: Mapping[str, Any],
) -> dict[str, Any]:
    """The batch/v1 Job of an attempt, just created; more in its metadata, spec or status as maps of these names."""
    owner = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": job, "uid": job_uid}
    known = {
        "metadata": {
            "name": f"{job}-a{attempt}",
            "namespace": "team",
            "uid": f"{job}-uid-{attempt}",
            "labels": _labels(job, job_uid, attempt),
            "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
        },
        "spec": {},
    }
    return merged(known, parts)


def pod(
    index: int = 0,
    attempt: int = 0,
    *,
    job: str = "job",
    job_uid: str = JOB_UID,
    **parts: Mapping[str, Any],
) -> dict[str, Any]:
    """A pod of an attempt, just created; more in its metadata, spec or status as maps of these names."""
    owner = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "name": f"{job}-a{attempt}",
        "uid": f"{job}-uid-{attempt}",
    }
    known = {
        "metadata": {
            "name": f"{job}-a{attempt}-{index}-x7abc",
            "namespace": "team",
            "uid": f"pod-{attempt}-{index}",
            "labels": {**_labels(job, job_uid, attempt), COMPLETION_INDEX: str(index)},
            "annotations": {COMPLETION_INDEX: str(index)},
            "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
        },
        "spec": {},
    }
    return merged(known, parts)


def _labels(job: str, job_uid: str, attempt: int) -> dict[str, str]:
    return {names.JOB_NAME_LABEL: job, names.JOB_UID_LABEL: job_uid, names.ATTEMPT_LABEL: str(attempt)}


def environment_of(pod: Mapping[str, Any]) -> dict[str, str]:
    """The environment of a pod's container as its kubelet makes it, but for what Secrets hold: `pod` is a pod, or the
    template of one."""
    annotations, found = pod["metadata"].get("annotations") or {}, {}
    for entry in pod["spec"]["containers"][0]["env"]:
        field = (entry.get("valueFrom") or {}).get("fieldRef")
        if field is not None:
            name = field["fieldPath"].removeprefix("metadata.annotations['").removesuffix("']")
            found[entry["name"]] = annotations.get(name, "")
        elif "value" in entry:
            found[entry["name"]] = entry["value"]
    return found


# --- what the operator reads out of these


def an_attempt_job(attempt: int = 0, **facts: Any) -> AttemptJob:
    """The facts of an attempt's Job that has just been created."""
    known = {"name": f"job-a{attempt}", "uid": f"job-uid-{attempt}", "controlled": True}
    return AttemptJob(**{**known, "attempt": attempt, **facts})


def a_pod(index: int = 0, attempt: int = 0, **facts: Any) -> Pod:
    """The facts of a pod that waits for a node."""
    known = {"name": f"job-a{attempt}-{index}", "uid": f"pod-{attempt}-{index}", "phase": "Pending"}
    owner = f"job-uid-{attempt}"
    return Pod(**{**known, "attempt": attempt, "index": index, "owner_uid": owner, **facts})
