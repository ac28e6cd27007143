"""Waiting for a chat pod, and its streams."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException

from qlora_operator.client import ClusterError
from qlora_operator.kubectl.pod_exchange import (
    lines_of,
    remove_ended,
    sender,
    wait_until_ended,
    wait_until_running,
    waiting_for,
)


def a_pod(phase: str = "Pending", **status: Any) -> dict[str, Any]:
    """A pod in a phase."""
    return {"status": {"phase": phase, **status}}


def a_container(**state: Any) -> list[dict[str, Any]]:
    """The container of a pod in a state."""
    return [{"state": state}]


UNPLACED = [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes have room"}]
REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "new": (a_pod(), ""),
    "unplaced": (a_pod(conditions=UNPLACED), "no node yet: 0/3 nodes have room"),
    "being made": (a_pod(containerStatuses=a_container(waiting={"reason": "ContainerCreating"})), ""),
    "no image": (
        a_pod(containerStatuses=a_container(waiting={"reason": "ErrImagePull", "message": "not found"})),
        "ErrImagePull: not found",
    ),
    "ended": (
        a_pod("Failed", containerStatuses=a_container(terminated={"reason": "OOMKilled"})),
        "OOMKilled",
    ),
    "evicted": (a_pod("Failed", reason="Evicted", message="low on memory"), "Evicted: low on memory"),
}


@pytest.mark.parametrize(("pod", "expected"), REASONS.values(), ids=REASONS.keys())
def test_what_a_pod_waits_for_is_a_sentence(pod: dict[str, Any], expected: str) -> None:
    """By its container, its conditions, or itself."""
    assert waiting_for(pod) == expected


def waited(pods: Iterator[dict[str, Any]], seconds: float) -> None:
    """Wait for pods that follow each other, a second after another."""
    times = iter(range(1000))
    wait_until_running(lambda: next(pods), seconds, clock=lambda: float(next(times)), sleep=lambda _: None)


def test_it_waits_until_the_pod_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """What it waits for is told once."""
    waited(iter([a_pod(), a_pod(conditions=UNPLACED), a_pod(conditions=UNPLACED), a_pod("Running")]), 60)

    assert capsys.readouterr().err == "no node yet: 0/3 nodes have room\n"


def test_it_does_not_wait_for_ever_or_for_the_dead() -> None:
    """A pod that has ended, or that gets no node in time, ends it, with the reason."""
    with pytest.raises(
        ClusterError, match=r"^the pod ended before it could be asked: Evicted: low on memory$"
    ):
        waited(iter([REASONS["evicted"][0]]), 60)
    with pytest.raises(
        ClusterError, match=r"does not run after 3 s: no node yet: 0/3 nodes have room; --pod-running"
    ):
        waited(iter([a_pod(conditions=UNPLACED)] * 9), 3)


@pytest.mark.parametrize(
    ("pod", "expected"),
    [
        pytest.param(
            a_pod("Succeeded", containerStatuses=a_container(terminated={"exitCode": 0})), (0, ""), id="done"
        ),
        pytest.param(
            a_pod(
                "Failed",
                containerStatuses=a_container(
                    terminated={
                        "exitCode": 12,
                        "reason": "Error",
                        "message": '{"exitCode": 12, "reason": "ModelError", "cause": "another base"}',
                    }
                ),
            ),
            (12, "another base"),
            id="with a report",
        ),
        pytest.param(
            a_pod(
                "Failed", containerStatuses=a_container(terminated={"exitCode": 137, "reason": "OOMKilled"})
            ),
            (137, "OOMKilled"),
            id="killed",
        ),
    ],
)
def test_how_a_pod_ended_is_its_code_and_the_cause_that_it_reports(
    pod: dict[str, Any], expected: tuple[int, str]
) -> None:
    """Or what the kubelet says of it."""
    assert wait_until_ended(lambda: pod) == expected


def test_a_pod_that_ends_without_its_container_is_an_error() -> None:
    """Such as one that was evicted; one that ends at once is none where it may."""
    with pytest.raises(ClusterError, match="the pod ended: Evicted: low on memory"):
        wait_until_ended(lambda: REASONS["evicted"][0])
    wait_until_running(lambda: REASONS["evicted"][0], 60, may_end=True)


class Streams:
    """A container that says these things, and then ends."""

    def __init__(self, *said: str) -> None:
        self.said = list(said)
        self.heard: list[str] = []

    def is_open(self) -> bool:
        """Until all is said."""
        return len(self.said) > 1

    def read_channel(self, channel: int, timeout: float = 0) -> str:
        """The next of them."""
        assert channel == 1
        return self.said.pop(0) if self.said else ""

    def write_stdin(self, data: str) -> None:
        """Listen."""
        if not self.is_open():
            raise RuntimeError("already closed")
        self.heard.append(data)


def test_lines_are_put_together_until_the_container_ends() -> None:
    """However they were cut on the way; the last ones that came before the end are read, too."""
    streams = Streams('{"a"', "", ': 1}\n{"b": 2}\n{"c', '": 3}\n')

    assert list(lines_of(streams)) == ['{"a": 1}', '{"b": 2}', '{"c": 3}']


def test_a_container_that_is_gone_is_an_error_of_the_system() -> None:
    """As for a process of this machine."""
    send = sender(streams := Streams("x", "y"))
    send("one\n")
    streams.said.clear()

    assert streams.heard == ["one\n"]
    with pytest.raises(OSError, match="already closed"):
        send("two\n")


class Pods:
    """The core API of a client, with pods by name, and what was done to them."""

    namespace = "team"

    def __init__(self, *pods: SimpleNamespace) -> None:
        self.core = self
        self.pods, self.asked = pods, ""
        self.deleted: list[str] = []
        self.forbidden = False

    def list_namespaced_pod(self, _: str, label_selector: str) -> SimpleNamespace:
        """Those that there are."""
        if self.forbidden:
            raise ApiException(status=403)
        self.asked = label_selector
        return SimpleNamespace(items=self.pods)

    def delete_namespaced_pod(self, name: str, _: str) -> None:
        """One goes."""
        self.deleted.append(name)


def left(name: str, phase: str, owner: str = "uid") -> SimpleNamespace:
    """A pod that is there."""
    metadata = SimpleNamespace(name=name, owner_references=[SimpleNamespace(uid=owner)])
    return SimpleNamespace(metadata=metadata, status=SimpleNamespace(phase=phase))


OWN: dict[str, Any] = {
    "metadata": {
        "labels": {"app.kubernetes.io/component": "chat", "app.kubernetes.io/instance": "job", "mesh": "on"},
        "ownerReferences": [{"uid": "uid"}],
    }
}


def test_what_a_killed_command_left_goes_with_the_next_one() -> None:
    """Its pod has ended with its input; one that runs is somebody's, and another job's of that name is not ours."""
    client: Any = Pods(
        left("ended", "Succeeded"),
        left("failed", "Failed"),
        left("runs", "Running"),
        left("old", "Failed", "other"),
    )

    remove_ended(client, OWN)

    assert client.asked == "app.kubernetes.io/component=chat,app.kubernetes.io/instance=job"
    assert client.deleted == ["ended", "failed"]


def test_who_may_not_list_pods_may_chat_all_the_same() -> None:
    """What is left goes with the job."""
    client: Any = Pods(left("ended", "Succeeded"))
    client.forbidden = True

    remove_ended(client, OWN)

    assert client.deleted == []
