"""Where the files of one revision lie in a workspace, and whether they are all there.

    sources/<shelf>/<revision>/...     the files, each under its name only when it is whole and checked
    sources/<shelf>/.<revision>/       what is not theirs: parts, the lease, a manifest for each path that was fetched

Jobs share it. A path of a revision is whole once its manifest is there, which is written last.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_contract.remote import SOURCES, Remote
from qlora_trainer import storage
from qlora_trainer.errors import StorageFull
from qlora_trainer.remote.files import RemoteFile


class Shelf:
    """The place of what a remote URI names, at one revision."""

    def __init__(self, workspace: Path, remote: Remote, revision: str) -> None:
        place = workspace / SOURCES / remote.shelf
        self.remote = remote
        self.revision = revision
        self.files = place / revision
        self.aside = place / f".{revision}"

    @property
    def lease(self) -> Path:
        """Who fetches into it."""
        return self.aside / "lease"

    @property
    def manifest(self) -> Path:
        """Size and sha256 of every file."""
        name = hashlib.sha256(str(self.remote.path).encode()).hexdigest()[:16]
        return self.aside / f"manifest-{name}.json"

    def part(self, file: RemoteFile) -> Path:
        """Where a file is until it is whole."""
        return self.aside / "parts" / hashlib.sha256(file.name.encode()).hexdigest()

    def prepare(self) -> None:
        """Make the folders."""
        with storage.storing(f"making {self.files}"):
            self.files.mkdir(parents=True, exist_ok=True)
            self.part(RemoteFile("", 0)).parent.mkdir(parents=True, exist_ok=True)

    def whole(self) -> bool:
        """Whether everything is there: looked at by name and size, as it was hashed before it got its name."""
        try:
            files = json.loads(self.manifest.read_text())["files"]
            return all((self.files / name).stat().st_size == facts["size"] for name, facts in files.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def has(self, file: RemoteFile) -> bool:
        """Whether a file is there already, fetched before by us or for another path."""
        path = self.files / file.name
        return path.is_file() and not path.is_symlink() and path.stat().st_size == file.size

    def check_space(self, files: Sequence[RemoteFile]) -> None:
        """Raises StorageFull when what is missing of these files does not fit."""
        missing = sum(file.size - self.bytes_there(file) for file in files)
        free = shutil.disk_usage(self.files).free
        if free < missing:
            raise StorageFull(
                f"{self.remote.uri} needs {_mib(missing)} more, and the workspace has {_mib(free)} free"
            )

    def bytes_there(self, file: RemoteFile) -> int:
        """How much of a file need not be fetched any more."""
        if self.has(file):
            return file.size
        part = self.part(file)
        return min(part.stat().st_size, file.size) if part.is_file() else 0

    def finish(self, sha256: Mapping[str, str], files: Sequence[RemoteFile]) -> None:
        """Write the manifest."""
        facts = {file.name: {"size": file.size, "sha256": sha256[file.name]} for file in files}
        text = {"source": self.remote.uri, "revision": self.revision, "files": facts}
        storage.write_atomically(self.manifest, json.dumps(text, indent=1))


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
