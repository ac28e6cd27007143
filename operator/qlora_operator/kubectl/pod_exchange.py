"""A pod that the command starts itself: started, waited for, spoken with, removed."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from kubernetes.client.exceptions import ApiException
from kubernetes.stream import stream
from pydantic import ValidationError
from urllib3.exceptions import HTTPError

from qlora_contract.progress import TerminationReport
from qlora_contract.signals import stop_by
from qlora_operator.api import names
from qlora_operator.cli.chat_exchange import Exchange
from qlora_operator.client import Client, ClusterError
from qlora_operator.errors import CommandError
from qlora_operator.kubectl.chat_pod import GRACE_SECONDS

POLL_SECONDS = 1.0
STDOUT = 1
LOG_LINES = 3
ENDED = ("Succeeded", "Failed")
INSTANCE_LABEL = "app.kubernetes.io/instance"


class Channel(Protocol):
    """A connection to a container's streams: kubernetes.stream's WSClient."""

    def is_open(self) -> bool:
        """Whether it still is."""

    def read_channel(self, channel: int, timeout: float = 0) -> str:
        """What has come; empty after so many seconds without anything."""

    def write_stdin(self, data: str) -> None:
        """Send."""


@contextmanager
def running_pod(
    client: Client,
    pod: Mapping[str, Any],
    running_seconds: float,
    *,
    grace_seconds: int | None = None,
    may_end: bool = False,
) -> Iterator[str]:
    """The name of a pod that is created, runs, and is removed at the end whatever happens.

    Args:
        client: of the cluster.
        pod: its manifest.
        running_seconds: for it to run.
        grace_seconds: for it to end once it is removed; None: what it says itself.
        may_end: whether it is no failure when it has ended before it was seen to run.

    Raises:
        ClusterError: it cannot be created, or does not run in time.
    """
    stop_by(_interrupt)  # the pod is removed then, too
    remove_ended(client, pod)
    created = _answered(lambda: client.core.create_namespaced_pod(client.namespace, pod))
    name = created.metadata.name
    grace = {} if grace_seconds is None else {"grace_period_seconds": grace_seconds}
    try:
        print(f"starting pod {name} ...", file=sys.stderr)
        wait_until_running(lambda: read_pod(client, name), running_seconds, may_end=may_end)
        yield name
    finally:
        with suppress(ApiException, HTTPError, OSError):
            client.core.delete_namespaced_pod(name, client.namespace, **grace)


def remove_ended(client: Client, pod: Mapping[str, Any]) -> None:
    """Remove what an earlier command of this kind has left for the job: one that was killed, or lost its connection,
    could not. Its pod has ended with its input. Who may not list pods keeps them until the job goes.

    Args:
        client: of the cluster.
        pod: the manifest of the pod that is created next.
    """
    labels = pod["metadata"]["labels"]
    selector = ",".join(f"{name}={labels[name]}" for name in ("app.kubernetes.io/component", INSTANCE_LABEL))
    job_uid = pod["metadata"]["ownerReferences"][0]["uid"]
    with suppress(ApiException, HTTPError, OSError):
        for left in client.core.list_namespaced_pod(client.namespace, label_selector=selector).items:
            owners = [owner.uid for owner in left.metadata.owner_references or []]
            if left.status.phase in ENDED and job_uid in owners:
                client.core.delete_namespaced_pod(left.metadata.name, client.namespace)


@contextmanager
def pod_model(client: Client, pod: Mapping[str, Any], running_seconds: float) -> Iterator[Exchange]:
    """An exchange with a pod that is created for it, and removed at the end whatever happens.

    Args:
        client: of the cluster.
        pod: its manifest.
        running_seconds: for it to run.

    Raises:
        ClusterError: it cannot be created, or does not run in time.
    """
    with running_pod(client, pod, running_seconds, grace_seconds=GRACE_SECONDS) as name:
        channel = _answered(
            lambda: stream(
                client.core.connect_get_namespaced_pod_attach,
                name,
                client.namespace,
                container=names.TRAINER_CONTAINER,
                stdin=True,
                stdout=True,
                stderr=False,
                tty=False,
                _preload_content=False,
            )
        )
        try:
            yield Exchange(sender(channel), lines_of(channel), lambda: _why_gone(client, name))
        finally:
            channel.close()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def read_pod(client: Client, name: str) -> dict[str, Any]:
    """The pod as JSON. Raises ClusterError."""
    response = _answered(
        lambda: client.core.read_namespaced_pod(name, client.namespace, _preload_content=False)
    )
    pod: dict[str, Any] = json.loads(response.data)
    return pod


def wait_until_running(
    look: Callable[[], Mapping[str, Any]],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    *,
    may_end: bool = False,
) -> None:
    """Wait for a pod's container, and tell what it waits for.

    Raises:
        ClusterError: it has ended, or does not run in time.
    """
    deadline, told = clock() + seconds, ""
    while True:
        pod = look()
        phase = pod.get("status", {}).get("phase")
        ended = phase in ENDED
        if phase == "Running" or (ended and may_end):
            return
        why = waiting_for(pod)
        if ended:
            raise ClusterError(f"the pod ended before it could be asked: {why or phase}")
        if why and why != told:
            print(why, file=sys.stderr)
            told = why
        if clock() >= deadline:
            raise ClusterError(
                f"the pod does not run after {seconds:g} s{f': {told}' if told else ''}; "
                "--pod-running-timeout waits longer"
            )
        sleep(POLL_SECONDS)


def wait_until_ended(look: Callable[[], Mapping[str, Any]]) -> tuple[int, str]:
    """Wait for a pod's container to end: its exit code, and the cause that it reports; empty for 0.

    Raises:
        ClusterError: the pod ended without one, as when its node is gone.
    """
    while (pod := look()).get("status", {}).get("phase") not in ENDED:
        time.sleep(POLL_SECONDS)
    states = [c.get("state", {}).get("terminated") for c in pod["status"].get("containerStatuses") or []]
    ended = next(filter(None, states), None)
    if ended is None:
        raise ClusterError(f"the pod ended: {waiting_for(pod) or 'it does not say why'}")
    if ended["exitCode"] == 0:
        return 0, ""
    try:
        cause = TerminationReport.model_validate_json(ended.get("message") or "").cause
    except ValidationError:
        cause = waiting_for(pod)
    return ended["exitCode"], cause


def waiting_for(pod: Mapping[str, Any]) -> str:
    """What a pod waits for, or how it ended, in a sentence; empty where it does not say."""
    status = pod.get("status", {})
    for container in status.get("containerStatuses") or []:
        state = container.get("state", {})
        for kind in ("waiting", "terminated"):
            if (found := state.get(kind)) and found.get("reason") not in (
                None,
                "ContainerCreating",
                "PodInitializing",
            ):
                return ": ".join(filter(None, (found["reason"], found.get("message"))))
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"no node yet: {condition.get('message')}"
    return ": ".join(filter(None, (status.get("reason"), status.get("message"))))


def lines_of(channel: Channel) -> Iterator[str]:
    """The lines that come from a container, until it ends."""
    rest = ""
    while True:
        is_open = channel.is_open()
        came = channel.read_channel(STDOUT, timeout=POLL_SECONDS)
        rest += came
        *whole, rest = rest.split("\n")
        yield from whole
        if not came and not is_open:
            return


def sender(channel: Channel) -> Callable[[str], None]:
    """Writes to a container's input; raises OSError when it is gone."""

    def send(line: str) -> None:
        try:
            channel.write_stdin(line)
        except Exception as error:  # the WebSocket library has many
            raise OSError(str(error)) from error

    return send


def _why_gone(client: Client, name: str) -> str:
    with suppress(CommandError):
        said = _answered(
            lambda: client.core.read_namespaced_pod_log(name, client.namespace, tail_lines=LOG_LINES)
        )
        why = waiting_for(read_pod(client, name))
        return f"the pod {name} does not answer any more ({why or 'its connection broke'}): {said.strip()}"
    return f"the pod {name} is gone"


def _answered(request: Callable[[], Any]) -> Any:
    """What a request answers. Raises ClusterError."""
    try:
        return request()
    except (ApiException, HTTPError) as error:
        raise ClusterError(_words(error)) from error


def _words(error: Exception) -> str:
    body = getattr(error, "body", None)
    with suppress(ValueError, TypeError, KeyError):
        return str(json.loads(body)["message"])  # type: ignore[arg-type]
    return str(getattr(error, "reason", None) or error)
