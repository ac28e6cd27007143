"""Pinned revisions: what a job's remote sources stood for when it first fetched them, for all of its attempts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_contract.files import read_json
from qlora_contract.job_folder import job_path
from qlora_contract.paths import resolve
from qlora_contract.remote import NamedSource, Role, is_remote, parse_remote
from qlora_contract.run_config import ResolvedRevisions, RunConfig
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.storage.atomic import make_folder, write_atomically
from qlora_trainer.transfer.source_cache import Snapshot

FILE_NAME = "fetched.json"
"""In the job's folder: {field of the job: {"source": ..., "revision": as asked for, "found": as pinned}}."""


class PinnedRevisions:
    """The pinned revisions of a job."""

    def __init__(self, folder: Path, run: RunConfig) -> None:
        self._path = folder / FILE_NAME
        self._run = run

    def get(self, source: NamedSource) -> str | None:
        """The revision by run.json, else by the job's folder; None before the first fetch of this source."""
        by_run = self._run.fetched.of(source)
        pin = self._read().get(source.field)
        found = pin.get("found") if isinstance(pin, dict) else None
        return by_run or (found if isinstance(found, str) and pin == _pin(source, found) else None)

    def set(self, source: NamedSource, revision: str) -> None:
        """Keep a revision in the job's folder. Raises StorageFull or ConfigurationError."""
        make_folder(self._path.parent)
        pins = self._read() | {source.field: _pin(source, revision)}
        write_atomically(self._path, json.dumps(pins, indent=1))

    def _read(self) -> dict[str, object]:
        """What the file holds; empty when it is missing or damaged."""
        try:
            pins = read_json(self._path)
        except (OSError, ValueError):
            return {}
        return pins if isinstance(pins, dict) else {}


def _pin(source: NamedSource, found: str | None) -> dict[str, str | None]:
    return {"source": source.uri, "revision": source.revision, "found": found}


def with_pinned_revisions(
    run: RunConfig, volumes: Mapping[str, Path], roles: Sequence[Role] = ("model", "dataset", "adapter")
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
    found: list[tuple[NamedSource, str | None]] = []
    for source in run.sources:
        wanted = is_remote(source.uri) and source.role in roles
        revision = pins.get(source) if wanted else None
        if wanted and (
            revision is None
            or not Snapshot(workspace, parse_remote(source.uri), revision, source.role).is_complete()
        ):
            raise ConfigurationError(
                f"{source.uri} is not in the workspace yet; fetch it with `qlora fetch` and the same file"
            )
        found.append((source, revision))
    return run.model_copy(update={"fetched": ResolvedRevisions.from_sources(found)})
