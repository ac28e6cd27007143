"""What an attempt waits for whose ranks are not all up."""

from collections.abc import Callable
from typing import Any

import pytest

from qlora_operator.api.names import Reason
from qlora_operator.status.observation import AttemptJob, Pod, ReasonMessage, WarningEvent
from qlora_operator.status.waiting import is_quota_error, waiting_for

JOB = AttemptJob("job-a0", "job-uid-0", 0, controlled=True)


def pod(index: int, phase: str = "Pending", **facts: str | ReasonMessage | None) -> Pod:
    """A pod of attempt 0."""
    return Pod(f"p{index}", f"u{index}", 0, index, phase, owner_uid=JOB.uid, **facts)  # type: ignore[arg-type]


UP = pod(0, "Running", node="n")
PLACED = pod(1, node="n", waiting=ReasonMessage("ContainerCreating", ""))
PULL = pod(1, node="n", waiting=ReasonMessage("ImagePullBackOff", "Back-off pulling image"))
PULL_MUTE = pod(1, node="n", waiting=ReasonMessage("ErrImagePull", ""))
CONFIG = pod(1, node="n", waiting=ReasonMessage("CreateContainerConfigError", 'secret "s" not found'))
NO_ROOM = pod(1, unschedulable="0/3 nodes are available: 3 Insufficient cpu.")
NO_CLAIM = pod(1, unschedulable='0/3 nodes are available: persistentvolumeclaim "w" not found.')
UNBOUND = pod(1, unschedulable="0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims.")
QUOTA = WarningEvent(
    "FailedCreate", 'pods "p" is forbidden: exceeded quota: q, requested: pods=1', "job-uid-0"
)
WEBHOOK = WarningEvent("FailedCreate", "admission webhook denied the request", "job-uid-0")
MOUNT = WarningEvent("FailedMount", "MountVolume.SetUp failed", "u1")
SANDBOX = WarningEvent("FailedCreatePodSandBox", "no network", "u1")
SCHEDULING = WarningEvent("FailedScheduling", "0/3 nodes are available", "u1")


@pytest.mark.parametrize(
    ("pods", "warnings", "reason", "message"),
    [
        ((UP, PLACED), (), Reason.STARTING, "0/2 pods of attempt 0 are ready"),
        ((UP, PULL), (), Reason.IMAGE_PULL_ERROR, "pod p1 on node n: Back-off pulling image"),
        ((UP, PULL_MUTE), (), Reason.IMAGE_PULL_ERROR, "pod p1 on node n: ErrImagePull"),
        ((UP, CONFIG), (), Reason.CONTAINER_CONFIG_ERROR, 'pod p1 on node n: secret "s" not found'),
        ((UP, NO_ROOM), (), Reason.UNSCHEDULABLE, "pod p1: 0/3 nodes are available: 3 Insufficient cpu."),
        (
            (UP, NO_CLAIM),
            (),
            Reason.VOLUME_NOT_READY,
            'pod p1: 0/3 nodes are available: persistentvolumeclaim "w" not found.',
        ),
        (
            (UP, UNBOUND),
            (),
            Reason.VOLUME_NOT_READY,
            "pod p1: 0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims.",
        ),
        (
            (NO_ROOM,),
            (QUOTA,),
            Reason.QUOTA_EXCEEDED,
            'the pods of job-a0 are refused: pods "p" is forbidden: exceeded quota: q, requested: pods=1',
        ),
        (
            (),
            (WEBHOOK, QUOTA),
            Reason.REFUSED,
            "the pods of job-a0 are refused: admission webhook denied the request",
        ),
        ((UP, PLACED), (QUOTA,), Reason.STARTING, "0/2 pods of attempt 0 are ready"),
        ((UP, PLACED), (MOUNT,), Reason.VOLUME_NOT_READY, "pod p1 on node n: MountVolume.SetUp failed"),
        ((UP, PLACED), (SANDBOX,), Reason.STARTING, "pod p1 on node n: no network"),
        (
            (UP, PLACED),
            (SCHEDULING, MOUNT),
            Reason.VOLUME_NOT_READY,
            "pod p1 on node n: MountVolume.SetUp failed",
        ),
        ((UP, pod(1, "Running", node="n")), (MOUNT,), Reason.STARTING, "0/2 pods of attempt 0 are ready"),
    ],
    ids=[
        "starting",
        "image",
        "image-without-words",
        "config",
        "no-room",
        "claim-missing",
        "claim-unbound",
        "quota",
        "webhook",
        "quota-before",
        "mount",
        "sandbox",
        "scheduling-before",
        "mount-before",
    ],
)
def test_one_reason_is_told_in_the_words_of_who_is_in_the_way(
    make_view: Callable[..., Any],
    pods: tuple[Pod, ...],
    warnings: tuple[WarningEvent, ...],
    reason: Reason,
    message: str,
) -> None:
    """One reason, in the words of who is in the way; what is over is not told."""
    view = make_view({"attempt": 0, "attempts": [{"attempt": 0}]}, [JOB], pods, warnings=warnings)
    waiting = waiting_for(view, JOB)
    assert (waiting.reason, waiting.message) == (reason, message)


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        ("exceeded quota: q, requested: count/jobs.batch=1", True),
        ("failed quota: q: must specify limits.cpu for: trainer", True),
        ("insufficient quota to match these scopes: [{PriorityClass In [high]}]", True),
        ("maximum memory usage per Container is 512Mi, but limit is 1Gi", True),
        ("cpu max limit to request ratio per Pod is 2, but provided ratio is 4", True),
        ("no PriorityClass with name urgent was found", False),
        ('violates PodSecurity "restricted:latest"', False),
    ],
    ids=["exceeded", "failed", "scope", "maximum", "ratio", "priority", "security"],
)
def test_quota_errors_are_told_from_other_refusals(refusal: str, expected: bool) -> None:
    """Quotas and limits are told from other refusals."""
    assert is_quota_error(refusal) == expected


@pytest.mark.parametrize("stage", ["fetch", "publish"])
def test_a_transfer_waits_for_one_pod(make_view: Callable[..., Any], stage: str) -> None:
    """An earlier refusal of a pod is no news once the one pod is there; its volumes are."""
    status = {"attempt": 0, "attempts": [{"attempt": 0, "stage": stage}]}
    there = pod(0, node="n", waiting=ReasonMessage("ContainerCreating", ""))
    mount = WarningEvent("FailedMount", 'secret "hub" not found', "u0")

    waiting = waiting_for(make_view(status, [JOB], [there], warnings=(mount, QUOTA)), JOB)

    assert waiting == ReasonMessage(Reason.VOLUME_NOT_READY, 'pod p0 on node n: secret "hub" not found')
