"""The revisions that a job keeps: what its remote sources stood for when they were first fetched."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from qlora_contract import places
from qlora_contract.remote import is_remote, parse_remote
from qlora_contract.run import Fetched, RunConfig
from qlora_trainer import storage
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.remote.shelf import Shelf

PINS = "fetched.json"
"""In the job's folder."""

SourceRole = Literal["model", "dataset"]
SOURCES: tuple[SourceRole, ...] = ("model", "dataset")


class Pins:
    """The revisions that a job keeps."""

    def __init__(self, folder: Path, run: RunConfig) -> None:
        self._path = folder / PINS
        self._run = run

    def get(self, role: SourceRole) -> str | None:
        """What the source stood for: as run.json says, else as the job's folder does; None: not known yet."""
        told: str | None = getattr(self._run.fetched, role)
        pin = self._read().get(role)
        same = isinstance(pin, dict) and {**pin, "found": None} == self._pin(role, None)
        return told or (str(pin["found"]) if same and isinstance(pin, dict) else None)

    def set(self, role: SourceRole, revision: str) -> None:
        """Keep it."""
        storage.make_folder(self._path.parent)
        storage.write_atomically(
            self._path, json.dumps(self._read() | {role: self._pin(role, revision)}, indent=1)
        )

    def _pin(self, role: SourceRole, found: str | None) -> dict[str, str | None]:
        source = getattr(self._run, role)
        return {"source": source.source, "revision": source.revision, "found": found}

    def _read(self) -> dict[str, object]:
        try:
            pins = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return pins if isinstance(pins, dict) else {}


def fetched_before(run: RunConfig, volumes: Mapping[str, Path]) -> RunConfig:
    """The run on what is in the workspace; nothing is fetched.

    Raises:
        ConfigurationError: a remote source is not there.
    """
    pins = Pins(places.job_folder(run.workspace, run.job.name, volumes), run)
    workspace = places.resolve(run.workspace, volumes)
    found: dict[str, str] = {}
    for role in SOURCES:
        source = str(getattr(run, role).source)
        if not is_remote(source):
            continue
        revision = pins.get(role)
        if revision is None or not Shelf(workspace, parse_remote(source), revision).whole():
            raise ConfigurationError(
                f"{source} is not in the workspace yet; `qlora fetch` of the same file gets it"
            )
        found[role] = revision
    return run.model_copy(update={"fetched": Fetched(**found)})


def _source_of(run: RunConfig, role: SourceRole) -> str:
    return str(getattr(run, role).source)
