"""Few facts from much JSON."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from builders import JOB_UID, a_pod, an_attempt_job, batch_job, merged, pod
from qlora_operator.status import observation
from qlora_operator.status.observation import AttemptJob, Pod, ReasonMessage

OWNER = {"kind": "QLoRAJob", "uid": JOB_UID, "controller": True}
METADATA = {
    "annotations": {"qlora.dev/held-fields": "5eed"},
    "ownerReferences": [{"kind": "Other", "uid": "x"}, OWNER],
}
JOB = batch_job(3, metadata=METADATA, spec={"parallelism": 2})
POD = pod(1, 3)


def said(kind: str, status: str = "True", reason: str = "R", message: str = "m") -> dict[str, Any]:
    """A condition."""
    times = {"lastTransitionTime": "2026-01-31T12:00:00Z"}
    return {"type": kind, "status": status, "reason": reason, "message": message, **times}


def attempt_job_of(**fields: Any) -> AttemptJob:
    """What JOB is, but for these."""
    return replace(an_attempt_job(3, parallelism=2, topology_hash="5eed"), **fields)


NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
FAILING = {"failing": ReasonMessage("R", "m"), "failing_since": NOON}


@pytest.mark.parametrize(
    ("parts", "fields"),
    [
        pytest.param({}, {}, id="just created"),
        pytest.param({"metadata": {"ownerReferences": []}}, {"controlled": False}, id="nobody's"),
        pytest.param(
            {"metadata": {"ownerReferences": [{**OWNER, "controller": False}]}},
            {"controlled": False},
            id="not its controller",
        ),
        pytest.param({"metadata": {"labels": {}}}, {"attempt": -1}, id="no attempt"),
        pytest.param({"metadata": {"labels": {"qlora.dev/attempt": "x"}}}, {"attempt": -1}, id="no number"),
        pytest.param({"metadata": {"annotations": {}}}, {"topology_hash": None}, id="annotation taken away"),
        pytest.param(
            {"metadata": {"annotations": {"qlora.dev/checkpoint-time": "2026-01-31T12:00:00Z"}}},
            {"topology_hash": None, "checkpoint_time": NOON},
            id="with a checkpoint",
        ),
        pytest.param({"spec": {"suspend": True}}, {"suspended": True}, id="suspended"),
        pytest.param(
            {"metadata": {"labels": {"qlora.dev/attempt": "3", "kueue.x-k8s.io/queue-name": "q"}}},
            {"queue": "q"},
            id="in a queue",
        ),
        pytest.param({"metadata": {"deletionTimestamp": "t"}}, {"deleting": True}, id="deleted"),
        pytest.param({"status": {"ready": 2}}, {"ready": 2}, id="ready"),
        pytest.param({"status": {"startTime": "2026-01-31T12:00:00Z"}}, {"admitted_at": NOON}, id="started"),
        pytest.param({"status": {"conditions": [said("Complete")]}}, {"complete": True}, id="complete"),
        pytest.param({"status": {"conditions": [said("Failed", "False")]}}, {}, id="said not to have failed"),
        pytest.param({"status": {"conditions": [said("FailureTarget")]}}, FAILING, id="about to fail"),
        pytest.param({"status": {"conditions": [said("Failed")]}}, {**FAILING, "failed": True}, id="failed"),
    ],
)
def test_a_job_is_read_into_its_facts(parts: dict[str, Any], fields: dict[str, Any]) -> None:
    """A Job's few facts."""
    assert observation.attempt_job(merged(JOB, parts), JOB_UID) == attempt_job_of(**fields)


def pod_of(**fields: Any) -> Pod:
    """What POD is, but for these."""
    return replace(a_pod(1, 3, name="job-a3-1-x7abc"), **fields)


SIDECAR = {
    "name": "istio-proxy",
    "state": {"terminated": {"exitCode": 0, "reason": "Completed", "message": "bye"}},
    "imageID": "docker.io/proxy@sha256:0",
}
"""Of an injected container whose name comes before the trainer's."""


def container(**fields: Any) -> dict[str, Any]:
    """A status with the trainer's, and an injected container's."""
    return {"status": {"containerStatuses": [SIDECAR, {"name": "trainer", **fields}]}}


@pytest.mark.parametrize(
    ("parts", "fields"),
    [
        pytest.param({}, {}, id="just created"),
        pytest.param({"metadata": {"ownerReferences": []}}, {"owner_uid": None}, id="an orphan"),
        pytest.param({"metadata": {"annotations": None}}, {"index": -1}, id="no index"),
        pytest.param(
            {"metadata": {"annotations": {observation.INDEX_ANNOTATION: "²"}}},
            {"index": -1},
            id="a digit that is no number",
        ),
        pytest.param({"spec": {"nodeName": "n"}}, {"node": "n"}, id="placed"),
        pytest.param(
            {"status": {"phase": "Running", "podIP": "i"}}, {"phase": "Running", "address": "i"}, id="runs"
        ),
        pytest.param(
            {"metadata": {"deletionTimestamp": "2026-01-31T12:00:00Z"}},
            {"deleting_since": NOON},
            id="deleted",
        ),
        pytest.param(
            {"status": {"conditions": [said("PodScheduled", "False", message="no room")]}},
            {"unschedulable": "no room"},
            id="unschedulable",
        ),
        pytest.param({"status": {"conditions": [said("PodScheduled")]}}, {}, id="scheduled"),
        pytest.param({"status": {"conditions": [said("Ready")]}}, {}, id="ready"),
        pytest.param(
            {"status": {"conditions": [said("Ready", "False")]}}, {"unready_since": NOON}, id="not ready"
        ),
        pytest.param(
            {"status": {"conditions": [said("DisruptionTarget")]}},
            {"disruption": ReasonMessage("R", "m")},
            id="disrupted",
        ),
        pytest.param({"status": {"conditions": [said("DisruptionTarget", "False")]}}, {}, id="not disrupted"),
        pytest.param(
            {"status": {"phase": "Failed", "reason": "Evicted", "message": "m"}},
            {"phase": "Failed", "status_reason": ReasonMessage("Evicted", "m")},
            id="its own status_reason",
        ),
        pytest.param(
            container(state={"waiting": {"reason": "ErrImagePull"}}),
            {"waiting": ReasonMessage("ErrImagePull", "")},
            id="waits",
        ),
        pytest.param(
            container(state={"terminated": {"exitCode": 137, "reason": "OOMKilled", "message": " last \n"}}),
            {"exit_code": 137, "termination_reason": "OOMKilled", "termination_message": "last"},
            id="ended",
        ),
        pytest.param(container(imageID="docker.io/x@sha256:5"), {"image_digest": "sha256:5"}, id="digest"),
        pytest.param(container(imageID=""), {}, id="no digest yet"),
        pytest.param({"status": {"containerStatuses": [SIDECAR]}}, {}, id="only an injected container yet"),
        pytest.param(
            {
                "status": {
                    "containerStatuses": [
                        {"name": "check", "state": {"terminated": {"exitCode": 0, "message": "seen\n"}}},
                        {"name": "trainer", "state": {"terminated": {"exitCode": 0, "message": "fetched"}}},
                    ]
                }
            },
            {"exit_code": 0, "termination_message": "fetched", "check_message": "seen"},
            id="what looked at the data beside a fetch",
        ),
    ],
)
def test_a_pod_is_read_into_its_facts(parts: dict[str, Any], fields: dict[str, Any]) -> None:
    """A pod's few facts."""
    assert observation.pod(merged(POD, parts)) == pod_of(**fields)


EVICTED = {"type": "Evicted", "status": "True", "message": "by somebody"}


FINISHED = {"status": {"conditions": [{"type": "Finished", "status": "True"}]}}


@pytest.mark.parametrize(
    ("workloads", "name"),
    [
        pytest.param([], None, id="without Kueue"),
        pytest.param([{"metadata": {"name": "w"}}], "w", id="as it was made"),
        pytest.param([{"metadata": {"name": "w"}, **FINISHED}], None, id="over"),
        pytest.param(
            [{"metadata": {"name": "v"}, **FINISHED}, {"metadata": {"name": "w"}}], "w", id="another"
        ),
        pytest.param([{"metadata": {"name": 64 * "w"}}], None, id="no label can name it"),
    ],
)
def test_a_workload_can_be_taken_over_until_it_is_finished(
    workloads: list[dict[str, Any]], name: str | None
) -> None:
    """By a label of the next Job, which has at most 63 characters."""
    assert observation.kept_workload(workloads) == name


def test_a_job_tells_what_it_has_taken_over_and_whose_pods_it_makes() -> None:
    """The latter is wrong only once Kueue has given it the template of an earlier attempt."""
    labels = {"qlora.dev/attempt": "1"}
    raw = batch_job(2, spec={"template": {"metadata": {"labels": labels}}})
    raw["metadata"]["labels"]["kueue.x-k8s.io/prebuilt-workload-name"] = "w"

    found = observation.attempt_job(raw, JOB_UID)

    assert (found.attempt, found.workload, found.template_attempt) == (2, "w", 1)


@pytest.mark.parametrize(
    ("workloads", "why"),
    [
        pytest.param([], "", id="no Kueue"),
        pytest.param([{"spec": {}}, {"spec": {"active": True}}], "", id="active"),
        pytest.param([{"spec": {"active": False}}], "the workload is deactivated", id="nothing said"),
        pytest.param(
            [{"spec": {"active": False}, "status": {"conditions": [EVICTED]}}], "by somebody", id="said"
        ),
        pytest.param([{"spec": {}, "status": {"conditions": [EVICTED]}}], "", id="evicted only"),
    ],
)
def test_a_workload_that_is_not_active_is_held(workloads: list[dict[str, Any]], why: str) -> None:
    """In Kueue's words, if it has any; one that was merely evicted is not."""
    assert observation.deactivated(workloads) == why


PENDING = {"type": "QuotaReserved", "status": "False", "message": "LocalQueue q doesn't exist"}


@pytest.mark.parametrize(
    ("workloads", "why"),
    [
        ([], "Kueue has made no Workload of its Job, or none that the operator may list"),
        ([{"spec": {}}], ""),
        ([{"spec": {}, "status": {"conditions": [PENDING]}}], "LocalQueue q doesn't exist"),
        ([{"spec": {}, "status": {"conditions": [{**PENDING, "status": "True"}]}}], ""),
        (
            [
                {
                    "status": {
                        "conditions": [{**PENDING, "status": "True"}],
                        "admissionChecks": [
                            {"name": "paid", "state": "Ready", "message": "yes"},
                            {"name": "nodes", "state": "Pending", "message": "to be provisioned"},
                            {"name": "late", "state": "Retry", "message": ""},
                        ],
                    }
                }
            ],
            "the check nodes is open: to be provisioned; the check late is open",
        ),
    ],
    ids=["no Kueue", "not looked at yet", "no such queue", "admitted", "checked"],
)
def test_a_queue_says_why_it_admits_nothing(workloads: list[Any], why: str) -> None:
    """In Kueue's words."""
    assert observation.queue_says(workloads) == why


def test_a_queue_says_why_it_took_its_quota_back() -> None:
    """By the Workload's condition, which is over once it is admitted again."""
    evicted = {**EVICTED, "reason": "Preempted"}
    admitted_again = {**evicted, "status": "False"}

    assert observation.eviction([{"status": {"conditions": [evicted]}}]) == ReasonMessage(
        "Preempted", "by somebody"
    )
    assert observation.eviction([{"status": {"conditions": [admitted_again]}}, {"spec": {}}]) is None


def test_a_gated_pod_does_not_wait_for_room() -> None:
    """The scheduler has not seen it: nothing is known of the nodes."""
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "gated"}
    found = observation.pod(pod(status={"conditions": [scheduled]}))

    assert (found.gated, found.unschedulable) == (True, None)


@pytest.mark.parametrize(
    ("fields", "over"),
    [
        ({}, False),
        ({"complete": True}, True),
        ({"failed": True}, True),
        ({"failing": ReasonMessage("", "")}, False),
    ],
    ids=["lasts", "complete", "failed", "about to fail"],
)
def test_a_job_is_finished_when_it_creates_no_more_pods(fields: dict[str, Any], over: bool) -> None:
    """A Job that fails is finished only when its pods are gone."""
    assert attempt_job_of(**fields).finished == over


@pytest.mark.parametrize(
    ("fields", "starts"),
    [
        ({}, True),
        ({"ready": 1}, True),
        ({"ready": 2}, False),
        ({"suspended": True}, False),
        ({"deleting": True}, False),
        ({"failing": ReasonMessage("", "")}, False),
        ({"failed": True}, False),
    ],
    ids=["no pod is up", "one is", "all are", "in the queue", "deleted", "about to fail", "failed"],
)
def test_a_job_starts_while_pods_are_not_ready(fields: dict[str, Any], starts: bool) -> None:
    """As long as pods are missing that it is to have."""
    assert attempt_job_of(**{"parallelism": 2, **fields}).starting == starts


@pytest.mark.parametrize(
    ("phase", "over"),
    [("Pending", False), ("Running", False), ("Unknown", False), ("Succeeded", True), ("Failed", True)],
)
def test_a_pod_is_finished_when_it_certainly_does_not_run(phase: str, over: bool) -> None:
    """A pod of which nobody knows may still run."""
    assert pod_of(phase=phase).finished == over
