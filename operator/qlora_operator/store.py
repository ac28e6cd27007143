"""What the watches have told so far: jobs, and the few facts of their children that decisions need."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_operator.api.names import JOB_NAME_LABEL, JOB_UID_LABEL, KIND, Key
from qlora_operator.status.observation import Gang, gang


@dataclass(frozen=True, slots=True)
class _Job:
    version: int
    uid: str
    text: bytes
    """As JSON, a seventh of the size that it has as dictionaries."""


@dataclass(frozen=True, slots=True)
class _Known:
    version: int
    gang: Gang


def key_of(raw: Mapping[str, Any]) -> Key:
    """Namespace and name of a job."""
    return raw["metadata"]["namespace"], raw["metadata"]["name"]


def owner_key(raw: Mapping[str, Any]) -> Key | None:
    """Namespace and name of the job that a child belongs to: by its label, or by its owner if somebody took
    the label away."""
    metadata = raw["metadata"]
    owners = [owner["name"] for owner in metadata.get("ownerReferences") or [] if owner["kind"] == KIND]
    name = (metadata.get("labels") or {}).get(JOB_NAME_LABEL) or next(iter(owners), None)
    return (metadata["namespace"], name) if name else None


class Store:
    """Jobs by key, and their batch/v1 Jobs by the job's uid. Whatever is older than what is known is
    ignored: a watch may be behind our own writes."""

    def __init__(self) -> None:
        self._jobs: dict[Key, _Job] = {}
        self._gangs: dict[str, dict[str, _Known]] = {}
        self._starting: set[str] = set()
        """Uids of child Jobs."""

    @property
    def starting(self) -> int:
        """Child Jobs whose pods are not all up."""
        return len(self._starting)

    def jobs(self) -> dict[Key, str]:
        """The jobs there are, and their uids."""
        return {key: known.uid for key, known in self._jobs.items()}

    def job(self, key: Key) -> dict[str, Any] | None:
        """The newest state of a job; the caller's own copy."""
        known = self._jobs.get(key)
        return None if known is None else dict(json.loads(known.text))

    def gangs(self, job_uid: str) -> tuple[Gang, ...]:
        """The Jobs of a job."""
        return tuple(known.gang for known in self._gangs.get(job_uid, {}).values())

    def put_job(self, raw: Mapping[str, Any]) -> bool:
        """A job is, or is now, so. Whether that is news: the echo of our own write is none."""
        known, version = self._jobs.get(key_of(raw)), _version(raw)
        if known is not None and known.version > version:
            return False
        # Not told by the version alone: with another CRD, the same object has other fields.
        text = json.dumps(_lean(raw), separators=(",", ":")).encode()
        self._jobs[key_of(raw)] = _Job(version, raw["metadata"]["uid"], text)
        return known is None or known.text != text

    def drop_job(self, key: Key, uid: str | None = None) -> None:
        """A job is gone; with a uid, only if it is still that very job."""
        known = self._jobs.get(key)
        if known is not None and uid in (None, known.uid):
            del self._jobs[key]
            gone = self._gangs.pop(known.uid, {})
            self._starting -= {each.gang.uid for each in gone.values()}

    def put_gang(self, raw: Mapping[str, Any]) -> bool:
        """A child Job is, or is now, so. Whether that is news: most changes of a Job change no fact that
        decisions need."""
        uid = _job_uid(raw)
        if not uid:
            return False
        name, version = raw["metadata"]["name"], _version(raw)
        siblings = self._gangs.setdefault(uid, {})
        known = siblings.get(name)
        if known is not None and known.version > version:
            return False
        siblings[name] = _Known(version, gang(raw, uid))
        self._count(known, siblings[name])
        return known is None or known.gang != siblings[name].gang

    def does_well(self, raw: Mapping[str, Any]) -> bool:
        """Whether a child Job starts or runs, so that no more is to be done about it than to say so."""
        uid = _job_uid(raw)
        known = self._gangs.get(uid or "", {}).get(raw["metadata"]["name"])
        return known is not None and known.gang.does_well

    def drop_gang(self, raw: Mapping[str, Any]) -> None:
        """A child Job is gone."""
        uid = _job_uid(raw)
        siblings = self._gangs.get(uid or "", {})
        known = siblings.get(raw["metadata"]["name"])
        if known is not None and known.gang.uid == raw["metadata"]["uid"]:
            del siblings[raw["metadata"]["name"]]
            self._count(known, None)
            if uid and not siblings:
                del self._gangs[uid]

    def drop_gangs_but(self, living: Iterable[str]) -> list[str]:
        """Forget the child Jobs whose uid is not among these; the job uids that have lost one."""
        keep, lost = set(living), []
        for uid, siblings in self._gangs.items():
            gone = [name for name, known in siblings.items() if known.gang.uid not in keep]
            for name in gone:
                self._count(siblings.pop(name), None)
            lost += [uid] if gone else []
        return lost

    def _count(self, before: _Known | None, after: _Known | None) -> None:
        if before is not None:
            self._starting.discard(before.gang.uid)
        if after is not None and after.gang.starting:
            self._starting.add(after.gang.uid)


def _job_uid(raw: Mapping[str, Any]) -> str | None:
    """Of the job that a child's label names."""
    uid: str | None = (raw["metadata"].get("labels") or {}).get(JOB_UID_LABEL)
    return uid


def _version(raw: Mapping[str, Any]) -> int:
    """resourceVersion, which Kubernetes defines to grow."""
    return int(raw["metadata"]["resourceVersion"])


def _lean(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Without managedFields, which are as large as all the rest."""
    metadata = {key: value for key, value in raw["metadata"].items() if key != "managedFields"}
    return {**raw, "metadata": metadata}
