"""Pinned revisions: what a job's remote sources stood for when it first fetched them, for all of its attempts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from qlora_contract.files import read_json
from qlora_contract.job_folder import job_path
from qlora_contract.paths import resolve
from qlora_contract.remote import is_remote, parse_remote
from qlora_contract.run_config import ResolvedRevisions, RunConfig
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.storage.atomic import make_folder, write_atomically
from qlora_trainer.transfer.source_cache import Snapshot

FILE_NAME = "fetched.json"
"""In the job's folder: {role: {"source": ..., "revision": as asked for, "found": as pinned}}."""

SourceRole = Literal["model", "dataset"]
SOURCES: tuple[SourceRole, ...] = ("model", "dataset")


class PinnedRevisions:
    """The pinned revisions of a job."""

    def __init__(self, folder: Path, run: RunConfig) -> None:
        self._path = folder / FILE_NAME
        self._run = run

    def get(self, role: SourceRole) -> str | None:
        """The revision by run.json, else by the job's folder; None before the first fetch of this source."""
        by_run: str | None = getattr(self._run.fetched, role)
        pin = self._read().get(role)
        found = pin.get("found") if isinstance(pin, dict) else None
        return by_run or (found if isinstance(found, str) and pin == self._pin(role, found) else None)

    def set(self, role: SourceRole, revision: str) -> None:
        """Keep a revision in the job's folder. Raises StorageFull or ConfigurationError."""
        make_folder(self._path.parent)
        pins = self._read() | {role: self._pin(role, revision)}
        write_atomically(self._path, json.dumps(pins, indent=1))

    def _pin(self, role: SourceRole, found: str | None) -> dict[str, str | None]:
        source = getattr(self._run, role)
        return {"source": source.source, "revision": source.revision, "found": found}

    def _read(self) -> dict[str, object]:
        """What the file holds; empty when it is missing or damaged."""
        try:
            pins = read_json(self._path)
        except (OSError, ValueError):
            return {}
        return pins if isinstance(pins, dict) else {}


def with_pinned_revisions(
    run: RunConfig, volumes: Mapping[str, Path], roles: Sequence[SourceRole] = SOURCES
) -> RunConfig:
    """The run with the revisions that are in the workspace. Nothing is fetched.

    Args:
        run: the job.
        volumes: claim -> directory; empty in a pod.
        roles: what is needed.

    Raises:
        ConfigurationError: a remote source is not there.
    """
    pins = PinnedRevisions(job_path(run.workspace, run.job.name, volumes), run)
    workspace = resolve(run.workspace, volumes)
    found: dict[str, str] = {}
    for role in roles:
        source = str(getattr(run, role).source)
        if not is_remote(source):
            continue
        revision = pins.get(role)
        if revision is None or not Snapshot(workspace, parse_remote(source), revision).is_complete():
            raise ConfigurationError(
                f"{source} is not in the workspace yet; fetch it with `qlora fetch` and the same file"
            )
        found[role] = revision
    return run.model_copy(update={"fetched": ResolvedRevisions(**found)})
