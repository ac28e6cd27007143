"""One file onto the disk: resumed where it broke off, checked, and under its name only when it is whole."""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import IO

from qlora_trainer.errors import StorageFull, TransferFailed
from qlora_trainer.remote.files import RemoteFile, Server, examine
from qlora_trainer.remote.patience import Interrupted, Patience, tell
from qlora_trainer.storage import storing, sync_folder

TRIES = 2
"""Wrong bytes once may be a cache's or a wire's fault; twice, they are what the server has."""


class Download:
    """Fetches the files of one revision."""

    def __init__(
        self,
        uri: str,
        revision: str,
        server: Server,
        patience: Patience,
        arrived: Callable[[int], None],
    ) -> None:
        """Say what to fetch and from where.

        Args:
            uri: for errors.
            revision: of it.
            server: what has the bytes.
            patience: how long to insist.
            arrived: called with the number of bytes that have come; negative for some that were thrown away.
                May raise, and ends the download by that.
        """
        self._uri = uri
        self._revision = revision
        self._server = server
        self._patience = patience
        self._arrived = arrived

    def fetch(self, file: RemoteFile, part: Path, target: Path) -> str:
        """Fetch a file and return its sha256. What an earlier try has left in `part` is gone on from.

        Raises:
            TransferRefused: the server will not give it.
            TransferFailed: it does not come, or not as it should be.
            StorageFull: it does not fit.
        """
        for _ in range(TRIES):
            try:
                self._patience.insist(lambda: self._go_on(file, part))
            except StorageFull:
                part.unlink(missing_ok=True)
                raise
            sha256, wrong = _judge(part, file)
            if not wrong:
                _put(part, target)
                return sha256
            tell(f"{file.name}: {wrong}; thrown away")
            self._arrived(-part.stat().st_size)
            part.unlink()
        raise TransferFailed(
            f"{file.name} of {self._uri} (revision {self._revision}) came {TRIES} times, and never as its "
            f"source says that it is: {wrong}"
        )

    def _go_on(self, file: RemoteFile, part: Path) -> None:
        """Write what is missing of a file, or raise Interrupted with some of it written."""
        with storing(f"fetching {file.name} of {self._uri}"):
            part.touch()
            offset = part.stat().st_size
            with part.open("r+b") as out:
                out.seek(offset)
                if offset < file.size:
                    offset += self._write(file, offset, out)
                out.flush()
                os.fsync(out.fileno())
        if offset < file.size:
            raise Interrupted(f"{file.name} of {self._uri} broke off after {offset:,} of {file.size:,} bytes")

    def _write(self, file: RemoteFile, offset: int, out: IO[bytes]) -> int:
        written = 0
        with closing(self._server.read(self._revision, file, offset)) as chunks:
            for chunk in chunks:
                out.write(chunk)
                written += len(chunk)
                self._patience.progressed()
                self._arrived(len(chunk))
                if offset + written > file.size:
                    break  # more than it should be: no need to see how much more
        return written


def _judge(part: Path, file: RemoteFile) -> tuple[str, str]:
    """(sha256, what is wrong with it or nothing)."""
    size = part.stat().st_size
    if size != file.size:
        return "", f"it has more than {file.size:,} bytes"
    sha256, found = examine(part, file.digest)
    if file.digest is not None and found != file.digest.value:
        return "", f"its {file.digest.algorithm} is {found} and must be {file.digest.value}"
    return sha256, ""


def _put(part: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)
    sync_folder(target.parent)
