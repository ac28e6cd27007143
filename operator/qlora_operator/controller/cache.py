"""What the watches have delivered: jobs, and the few facts of their batch/v1 Jobs that decisions need."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qlora_operator.api.names import JOB_NAME_LABEL, JOB_UID_LABEL, KIND, Key
from qlora_operator.status.observation import AttemptJob, attempt_job


@dataclass(frozen=True, slots=True)
class _CachedJob:
    version: int
    uid: str
    text: bytes
    """The object as JSON: a seventh of the memory of its dictionaries."""
    pods: int
    """spec.topology.pods."""


@dataclass(frozen=True, slots=True)
class _CachedAttemptJob:
    version: int
    namespace: str
    attempt_job: AttemptJob


def key_of(raw: Mapping[str, Any]) -> Key:
    """Namespace and name of a job."""
    return raw["metadata"]["namespace"], raw["metadata"]["name"]


def owner_key(raw: Mapping[str, Any]) -> Key | None:
    """Namespace and name of the job that a child belongs to: by its label; by its owner where the label is gone."""
    metadata = raw["metadata"]
    owners = [owner["name"] for owner in metadata.get("ownerReferences") or [] if owner["kind"] == KIND]
    name = (metadata.get("labels") or {}).get(JOB_NAME_LABEL) or next(iter(owners), None)
    return (metadata["namespace"], name) if name else None


class ObjectCache:
    """Jobs by key, and their batch/v1 Jobs by the uid of the job. Older versions of a cached object are ignored: a
    watch may lag behind our own writes."""

    def __init__(self) -> None:
        self._jobs: dict[Key, _CachedJob] = {}
        self._attempt_jobs: dict[str, dict[str, _CachedAttemptJob]] = {}
        self._starting: set[str] = set()
        """Uids of the batch/v1 Jobs whose pods are not all up."""
        self._dropped: set[str] | None = None
        """While everything is listed, the uids of what was dropped meanwhile; else None."""

    @property
    def starting(self) -> int:
        """How many batch/v1 Jobs have pods that are not all up."""
        return len(self._starting)

    @contextmanager
    def listing(self) -> Iterator[None]:
        """While everything is listed, page by page, what is dropped is not put back: a list may be older than that."""
        self._dropped = set()
        try:
            yield
        finally:
            self._dropped = None

    def jobs(self, namespace: str | None = None) -> dict[Key, str]:
        """Key -> uid of every job of a namespace, or of all."""
        return {key: known.uid for key, known in self._jobs.items() if namespace in (None, key[0])}

    def jobs_of_one_pod(self, namespace: str | None = None) -> set[str]:
        """The uids of those jobs of a namespace, or of all, that have one pod."""
        jobs = self._jobs.items()
        return {known.uid for key, known in jobs if namespace in (None, key[0]) and known.pods == 1}

    def job(self, key: Key) -> dict[str, Any] | None:
        """The newest version of a job, a copy for the caller; None for one that is not cached."""
        known = self._jobs.get(key)
        return None if known is None else dict(json.loads(known.text))

    def attempt_jobs(self, job_uid: str) -> tuple[AttemptJob, ...]:
        """The batch/v1 Jobs of a job."""
        return tuple(known.attempt_job for known in self._attempt_jobs.get(job_uid, {}).values())

    def put_job(self, raw: Mapping[str, Any]) -> bool:
        """Cache a job. Returns whether anything changed: the echo of our own write changes nothing."""
        known, version = self._jobs.get(key_of(raw)), _version(raw)
        if (known is not None and known.version > version) or self._was_dropped(raw):
            return False
        # managedFields are as large as all the rest.
        metadata = {key: value for key, value in raw["metadata"].items() if key != "managedFields"}
        # The version alone does not show a change: under another CRD, the same object has other fields.
        text = json.dumps({**raw, "metadata": metadata}, separators=(",", ":")).encode()
        pods = (raw["spec"].get("topology") or {}).get("pods", 1)
        self._jobs[key_of(raw)] = _CachedJob(version, raw["metadata"]["uid"], text, pods)
        return known is None or known.text != text

    def drop_job(self, key: Key, uid: str | None = None) -> None:
        """Drop a job; with a uid, only if the cached job has it."""
        known = self._jobs.get(key)
        if self._dropped is not None and uid is not None:
            self._dropped.add(uid)
        if known is not None and uid in (None, known.uid):
            del self._jobs[key]
            gone = {entry.attempt_job.uid for entry in self._attempt_jobs.pop(known.uid, {}).values()}
            self._starting -= gone
            if self._dropped is not None:
                self._dropped |= gone

    def put_attempt_job(self, raw: Mapping[str, Any]) -> bool:
        """Cache a batch/v1 Job. Returns whether a fact that decisions need has changed; most updates change none."""
        uid = job_uid_of(raw)
        if not uid or self._was_dropped(raw):
            return False
        name, version = raw["metadata"]["name"], _version(raw)
        siblings = self._attempt_jobs.setdefault(uid, {})
        known = siblings.get(name)
        if known is not None and known.version > version:
            return False
        siblings[name] = _CachedAttemptJob(version, raw["metadata"]["namespace"], attempt_job(raw, uid))
        self._count(known, siblings[name])
        return known is None or known.attempt_job != siblings[name].attempt_job

    def is_healthy(self, raw: Mapping[str, Any]) -> bool:
        """Whether a batch/v1 Job is starting or running: nothing to do but to update the status."""
        uid = job_uid_of(raw)
        known = self._attempt_jobs.get(uid or "", {}).get(raw["metadata"]["name"])
        return known is not None and known.attempt_job.healthy

    def drop_attempt_job(self, job_uid: str | None, name: str, uid: str) -> None:
        """Drop a batch/v1 Job of a job, if the cached one of this name has this uid."""
        if self._dropped is not None:
            self._dropped.add(uid)
        siblings = self._attempt_jobs.get(job_uid or "", {})
        known = siblings.get(name)
        if job_uid is None or known is None or known.attempt_job.uid != uid:
            return
        self._count(siblings.pop(name), None)
        if not siblings:
            del self._attempt_jobs[job_uid]

    def attempt_job_uids(self, namespace: str | None = None) -> set[str]:
        """The uids of all batch/v1 Jobs of a namespace, or of all."""
        known = (each for siblings in self._attempt_jobs.values() for each in siblings.values())
        return {each.attempt_job.uid for each in known if namespace in (None, each.namespace)}

    def drop_attempt_jobs(self, uids: Collection[str]) -> None:
        """Drop the batch/v1 Jobs that have these uids."""
        for job_uid, siblings in list(self._attempt_jobs.items()):
            for known in list(siblings.values()):
                if known.attempt_job.uid in uids:
                    self.drop_attempt_job(job_uid, known.attempt_job.name, known.attempt_job.uid)

    def _was_dropped(self, raw: Mapping[str, Any]) -> bool:
        return self._dropped is not None and raw["metadata"]["uid"] in self._dropped

    def _count(self, before: _CachedAttemptJob | None, after: _CachedAttemptJob | None) -> None:
        if before is not None:
            self._starting.discard(before.attempt_job.uid)
        if after is not None and after.attempt_job.starting:
            self._starting.add(after.attempt_job.uid)


def job_uid_of(raw: Mapping[str, Any]) -> str | None:
    """The uid of the job that a child's label names."""
    uid: str | None = (raw["metadata"].get("labels") or {}).get(JOB_UID_LABEL)
    return uid


def _version(raw: Mapping[str, Any]) -> int:
    """The resourceVersion, which Kubernetes defines to grow."""
    return int(raw["metadata"]["resourceVersion"])
