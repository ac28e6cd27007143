"""The source cache: where the files of one revision are in a workspace, and whether they are all there.

    sources/<cache folder>/<revision>/...    the files, each under its name only when it is complete and verified
    sources/<cache folder>/.<revision>/      the rest: parts, the lease, a manifest for each path that was fetched

Jobs share it. A path of a revision is complete once its manifest is there, which is written last. Earlier releases
wrote the same; what they fetched is not fetched again.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_contract.files import read_json
from qlora_contract.remote import SOURCES, Remote, Role
from qlora_contract.units import format_bytes
from qlora_trainer.errors import StorageFull
from qlora_trainer.storage.atomic import make_folder, write_atomically
from qlora_trainer.transfer.remote_files import RemoteFile, hash_file


class Snapshot:
    """The files of a remote URI at one revision, as far as a workspace has them."""

    def __init__(self, workspace: Path, remote: Remote, revision: str, role: Role) -> None:
        """Say which.

        Args:
            workspace: that of the job.
            remote: the URI.
            revision: of it.
            role: what it is read as: of a repository that is a model and an adapter, each has files of its own.
        """
        cache = workspace / SOURCES / remote.cache_folder
        self.remote = remote
        self.revision = revision
        self.files = cache / revision
        self._metadata = cache / f".{revision}"
        self.lease = self._metadata / "lease"
        path = hashlib.sha256(str(remote.path).encode()).hexdigest()[:16]
        of = "-adapter" if role == "adapter" else ""
        self.manifest = self._metadata / f"manifest-{path}{of}.json"

    def part(self, file: RemoteFile) -> Path:
        """Where a file is until it is complete."""
        return self._metadata / "parts" / hashlib.sha256(file.name.encode()).hexdigest()

    def make_folders(self) -> None:
        """Make the folders for files and parts. Raises StorageFull or ConfigurationError."""
        make_folder(self.files)
        make_folder(self._metadata / "parts")

    def is_complete(self) -> bool:
        """Whether all files are there, by name and size: each was verified before it got its name."""
        try:
            files = read_json(self.manifest)["files"]
            return all((self.files / name).stat().st_size == facts["size"] for name, facts in files.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def contains(self, file: RemoteFile) -> bool:
        """Whether a file is there, fetched earlier or for another path."""
        path = self.files / file.name
        return path.is_file() and not path.is_symlink() and path.stat().st_size == file.size

    def bytes_present(self, file: RemoteFile) -> int:
        """How many bytes of a file need not be downloaded any more."""
        if self.contains(file):
            return file.size
        part = self.part(file)
        return min(part.stat().st_size, file.size) if part.is_file() else 0

    def check_space(self, files: Sequence[RemoteFile]) -> None:
        """Raises StorageFull when what is missing of these files does not fit."""
        missing = sum(file.size - self.bytes_present(file) for file in files)
        free = shutil.disk_usage(self.files).free
        if free < missing:
            raise StorageFull(
                f"{self.remote.uri} needs another {format_bytes(missing)}, and the workspace has "
                f"{format_bytes(free)} free"
            )

    def drop_damaged(self, files: Sequence[RemoteFile]) -> list[str]:
        """Remove what is not, byte for byte, what the server has, and return its names.

        What a server keeps no hash of is believed. Whoever has a file open keeps it.
        """
        damaged = [
            file.name
            for file in files
            if file.digest is not None
            and (
                not self.contains(file)
                or hash_file(self.files / file.name, file.digest)[1] != file.digest.value
            )
        ]
        if damaged:
            self.manifest.unlink(missing_ok=True)
        for name in damaged:
            (self.files / name).unlink(missing_ok=True)
        return damaged

    def write_manifest(self, sha256: Mapping[str, str], files: Sequence[RemoteFile]) -> None:
        """Mark these files as complete.

        Args:
            sha256: of each file, by its name.
            files: all files of the path.
        """
        facts = {file.name: {"size": file.size, "sha256": sha256[file.name]} for file in files}
        text = {"source": self.remote.uri, "revision": self.revision, "files": facts}
        write_atomically(self.manifest, json.dumps(text, indent=1))
