"""One file onto the disk: resumed where it broke off, verified, and under its name only when it is complete.

By hand, not by huggingface_hub: its download starts anew after a kill and loses up to 10 MiB at each break, verifies no
hash, and logs addresses with their signatures (docs/decisions/0019). Both kinds of servers share this one.
"""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from qlora_contract.files import sync_folder
from qlora_trainer.errors import StorageFull, TransferFailed
from qlora_trainer.storage.atomic import translate_os_errors
from qlora_trainer.transfer.remote_files import RemoteFile, Server, hash_file
from qlora_trainer.transfer.retry import Retrier, TransientError, log

MAX_ATTEMPTS = 2
"""Wrong bytes once may be the fault of a cache or a wire; twice, they are what the server has."""


class Downloader:
    """Downloads files of one revision."""

    def __init__(
        self,
        uri: str,
        revision: str,
        server: Server,
        retrier: Retrier,
        on_bytes: Callable[[int], None],
    ) -> None:
        """Say what to download and from where.

        Args:
            uri: of the source, for messages.
            revision: of the source.
            server: what has the bytes.
            retrier: how long to continue without progress.
            on_bytes: called with the number of bytes that have arrived; negative for bytes that were discarded. What
                it raises ends the download.
        """
        self._uri = uri
        self._revision = revision
        self._server = server
        self._retrier = retrier
        self._on_bytes = on_bytes

    def fetch(self, file: RemoteFile, part: Path, target: Path) -> str:
        """Download a file and return its sha256.

        Args:
            file: what to download.
            part: where it is until it is complete and verified. What an earlier attempt left there is resumed.
            target: where it is then.

        Raises:
            TransferRefused: the server refuses to send it.
            TransferFailed: it does not arrive, or not as the source lists it.
            StorageFull: it does not fit; `part` is removed.
        """
        for _ in range(MAX_ATTEMPTS):
            try:
                self._retrier.call(lambda: self._resume(file, part))
            except StorageFull:
                part.unlink(missing_ok=True)
                raise
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                sha256, mismatch = _verify(part, file)
                if not mismatch:
                    part.replace(target)
            except (
                FileNotFoundError
            ):  # our lease was taken over, and its new holder has finished the same part
                sha256, mismatch = _verify(target, file)
            if not mismatch:
                sync_folder(target.parent)
                return sha256
            log(f"{file.name}: {mismatch}; discarded")
            self._on_bytes(-part.stat().st_size)
            part.unlink()
        raise TransferFailed(
            f"{file.name} of {self._uri} (revision {self._revision}) was downloaded {MAX_ATTEMPTS} times and never "
            f"matched what its source lists: {mismatch}"
        )

    def _resume(self, file: RemoteFile, part: Path) -> None:
        """Append what is missing of a file. Raises TransientError with what has arrived kept."""
        with translate_os_errors(f"fetching {file.name} of {self._uri}"):
            part.touch()
            size = part.stat().st_size
            with part.open("r+b") as out:
                out.seek(size)
                if size < file.size:
                    with closing(self._server.read(self._revision, file, size)) as chunks:
                        for chunk in chunks:
                            out.write(chunk)
                            size += len(chunk)
                            self._retrier.reset()
                            self._on_bytes(len(chunk))
                            if size > file.size:
                                break  # too many already: no need to see how many more
                out.flush()
                os.fsync(out.fileno())
        if size < file.size:
            raise TransientError(
                f"{file.name} of {self._uri} broke off after {size:,} of {file.size:,} bytes"
            )


def _verify(part: Path, file: RemoteFile) -> tuple[str, str]:
    """(sha256, what is wrong with it; empty if nothing is)."""
    if part.stat().st_size != file.size:
        return "", f"it is longer than {file.size:,} bytes"
    sha256, found = hash_file(part, file.digest)
    if file.digest is not None and found != file.digest.value:
        return "", f"its {file.digest.algorithm} is {found}, not {file.digest.value}"
    return sha256, ""
