"""What became of the pods of a namespace, every state of them, told by the API server's own history."""

import json
from collections import defaultdict
from dataclasses import dataclass, field

from testcluster.client import Client, Object

ATTEMPT = "qlora.dev/attempt"
OWNER = "qlora.dev/job-uid"


@dataclass
class Witness:
    """Sees every event of a namespace's pods from when it was made, whenever it is asked.

    A watch from an old resourceVersion tells what has been since, so nobody has to look all the time.
    """

    client: Client
    namespace: str
    _version: str = ""
    _alive: dict[str, Object] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """What must never be, and was."""
    jobs: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    """By uid of the QLoRAJob and attempt: the uids of the Jobs that had pods."""

    def __post_init__(self) -> None:
        self.look_anew()

    def look_anew(self) -> None:
        """Begin with what is there now: an API server that was killed takes the history with it. Nothing changed while
        it was away."""
        self._alive.clear()
        listed = self.client.get(self._path)
        self._version = listed["metadata"]["resourceVersion"]
        for pod in listed["items"]:
            self._see("ADDED", pod)

    @property
    def _path(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods"

    def look(self) -> None:
        """Take note of all that has been since the last look. Takes a second."""
        text = self.client.text(f"{self._path}?watch=1&timeoutSeconds=1&resourceVersion={self._version}")
        for line in text.splitlines():
            event = json.loads(line)
            if event["type"] == "ERROR":
                raise AssertionError(f"the history is gone: {event['object']['message']}")
            self._version = event["object"]["metadata"]["resourceVersion"]
            self._see(event["type"], event["object"])

    def _see(self, kind: str, pod: Object) -> None:
        metadata = pod["metadata"]
        uid = metadata["uid"]
        self._alive.pop(uid, None)
        if kind == "DELETED" or pod["status"].get("phase") in ("Succeeded", "Failed"):
            return
        self._alive[uid] = pod
        owner, job = _owner(metadata), _job_uid(pod)
        if job is not None:
            self.jobs[owner, metadata["labels"][ATTEMPT]].add(job)
        gangs = {_job_uid(other) for other in self._alive.values() if _owner(other["metadata"]) == owner}
        if len(gangs - {None}) > 1:
            names = sorted(other["metadata"]["name"] for other in self._alive.values())
            self.faults.append(
                f"two gangs at a time at resourceVersion {metadata['resourceVersion']}: {names}"
            )


def _owner(metadata: Object) -> str:
    return str(metadata.get("labels", {}).get(OWNER))


def _job_uid(pod: Object) -> str | None:
    """The uid of the batch/v1 Job that made the pod; its label stays when its owner is taken away."""
    label = pod["metadata"].get("labels", {}).get("batch.kubernetes.io/controller-uid")
    return str(label) if label else None
