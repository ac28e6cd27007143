"""The status a kubelet gives a pod in each state; only computation on dicts."""

from datetime import UTC, datetime

from testcluster.client import Object


def waiting(pod: Object, reason: str, message: str = "") -> Object:
    """Bound to its node and not started."""
    state = {"waiting": {"reason": reason, "message": message}}
    containers = [_container(each, state, ready=False) for each in pod["spec"]["containers"]]
    return {
        "phase": "Pending",
        "startTime": now(),
        "conditions": [condition("Initialized", "True"), *_readiness("False", "ContainersNotReady")],
        "containerStatuses": containers,
    }


def running(pod: Object, ip: str, *, ready: bool = True) -> Object:
    """Every container runs."""
    state = {"running": {"startedAt": now()}}
    containers = [_container(each, state, ready=ready) for each in pod["spec"]["containers"]]
    readiness = _readiness("True") if ready else _readiness("False", "ContainersNotReady")
    return {
        "phase": "Running",
        "hostIP": "192.0.2.1",
        "podIP": ip,
        "podIPs": [{"ip": ip}],
        "startTime": now(),
        "conditions": [condition("Initialized", "True"), *readiness],
        "containerStatuses": containers,
        "initContainerStatuses": [_initialised(each) for each in pod["spec"].get("initContainers", [])],
    }


def terminated(
    pod: Object, exit_code: int, reason: str, message: str = "", others: dict[str, str] | None = None
) -> Object:
    """Every container ended with the exit code; `others`: containers that left another message, by name."""
    state = {
        "terminated": {
            "exitCode": exit_code,
            "reason": reason,
            "message": message,
            "startedAt": now(),
            "finishedAt": now(),
        }
    }
    why = "PodFailed" if exit_code else "PodCompleted"
    containers = [_container(each, state, ready=False) for each in pod["spec"]["containers"]]
    for each in containers:
        if each["name"] in (others or {}):
            each["state"] = {"terminated": {**state["terminated"], "message": (others or {})[each["name"]]}}
    return {
        "phase": "Failed" if exit_code else "Succeeded",
        "conditions": _readiness("False", why),
        "containerStatuses": containers,
        "initContainerStatuses": [_initialised(each) for each in pod["spec"].get("initContainers", [])],
    }


def rejected(reason: str, message: str) -> Object:
    """Refused by the kubelet's own admission: no container was made."""
    return {"phase": "Failed", "reason": reason, "message": f"Pod was rejected: {message}"}


def evicted(pod: Object, resource: str) -> Object:
    """Ended by the kubelet because its node ran short of the resource."""
    message = f"The node was low on resource: {resource}. "
    status = terminated(pod, 137, "Error")
    target = condition("DisruptionTarget", "True", "TerminationByKubelet", message)
    return {**status, "reason": "Evicted", "message": message, "conditions": [*status["conditions"], target]}


def is_finished(pod: Object) -> bool:
    """Whether the pod has ended for good."""
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def condition(kind: str, status: str, reason: str = "", message: str = "") -> Object:
    """A condition that changed just now."""
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": now(),
    }


def now() -> str:
    """The time as the API writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _readiness(status: str, reason: str = "") -> list[Object]:
    return [condition(kind, status, reason) for kind in ("ContainersReady", "Ready")]


def _container(container: Object, state: Object, *, ready: bool) -> Object:
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": "",
        "ready": ready,
        "started": "running" in state,
        "restartCount": 0,
        "state": state,
    }


def _initialised(container: Object) -> Object:
    done = {"terminated": {"exitCode": 0, "reason": "Completed", "startedAt": now(), "finishedAt": now()}}
    return _container(container, done, ready=True)
