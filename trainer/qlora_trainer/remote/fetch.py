"""Remote sources into the workspace: once for all its jobs, at the revision that the job keeps."""

from collections.abc import Callable, Mapping
from pathlib import Path

from qlora_contract import places
from qlora_contract.remote import Remote, is_remote, parse_remote
from qlora_contract.run import Fetched, RunConfig
from qlora_trainer.errors import TransferRefused
from qlora_trainer.remote.connect import connect
from qlora_trainer.remote.download import Download
from qlora_trainer.remote.files import Choose, RemoteFile, Server, choose_files, examine
from qlora_trainer.remote.lease import Lease, LeaseLost, leased
from qlora_trainer.remote.patience import Patience, tell
from qlora_trainer.remote.pins import SOURCES, Pins, SourceRole
from qlora_trainer.remote.shelf import Shelf

Count = Callable[[int, int], None]
"""count(done, total): bytes to add to either sum."""


class Fetch:
    """Fetches the remote sources of a job."""

    def __init__(
        self,
        run: RunConfig,
        volumes: Mapping[str, Path],
        environ: Mapping[str, str],
        patience: Patience,
        count: Count,
    ) -> None:
        """Say for whom, and where to.

        Args:
            run: the job.
            volumes: claim -> folder.
            environ: addresses, certificates and the place of credentials.
            patience: how long to insist on a server.
            count: told what is to come, and what has.
        """
        self._workspace = places.resolve(run.workspace, volumes)
        self._pins = Pins(places.job_folder(run.workspace, run.job.name, volumes), run)
        self._run = run
        self._environ = environ
        self._patience = patience
        self._count = count

    def all(self) -> Fetched:
        """Fetch what is not there yet; the revisions of all remote sources."""
        found = {role: self._source(role) for role in SOURCES if is_remote(self._uri(role))}
        return Fetched(**found)

    def _uri(self, role: SourceRole) -> str:
        return str(getattr(self._run, role).source)

    def _source(self, role: SourceRole) -> str:
        remote = parse_remote(self._uri(role))
        pinned = self._pins.get(role)
        if pinned is not None and Shelf(self._workspace, remote, pinned).whole():
            tell(f"{remote.uri} is in the workspace already, at {pinned}")
            return pinned
        server = self._patience.insist(lambda: connect(remote, role, self._environ, self._patience.seconds))
        revision, files = self._list(role, remote, server, pinned)
        if remote.kind != "bucket":
            self._pins.set(role, revision)  # at once: what is broken off now goes on there
        self._fill(Shelf(self._workspace, remote, revision), files, server)
        self._pins.set(role, revision)
        return revision

    def _list(
        self, role: SourceRole, remote: Remote, server: Server, pinned: str | None
    ) -> tuple[str, list[RemoteFile]]:
        """(revision, files); the revision is the pinned one where there is one."""
        choose: Choose = lambda files: choose_files(role, remote, files)  # noqa: E731
        asked = pinned or getattr(self._run, role).revision
        revision, files = self._patience.insist(lambda: server.listing(asked, choose))
        if pinned not in (None, revision):
            raise TransferRefused(
                f"{remote.uri} is not what it was when this job first fetched it ({pinned}), but {revision}, and "
                "what it was is not in the workspace any more; choose another metadata.name to train on what it is"
            )
        return revision, files

    def _fill(self, shelf: Shelf, files: list[RemoteFile], server: Server) -> None:
        """See to it that all files of a shelf are there, unless somebody else does."""
        shelf.prepare()
        while not shelf.whole():
            try:
                with leased(shelf.lease) as lease:
                    if not shelf.whole():
                        self._download(shelf, files, server, lease)
            except LeaseLost:
                tell(f"{shelf.remote.uri}: another job fetches it now; waiting for that")
        tell(f"{shelf.remote.uri} is in the workspace, at {shelf.revision}")

    def _download(self, shelf: Shelf, files: list[RemoteFile], server: Server, lease: Lease) -> None:
        shelf.check_space(files)
        self._count(sum(map(shelf.bytes_there, files)), sum(file.size for file in files))

        def arrived(count: int) -> None:
            lease.check()
            self._count(count, 0)

        download = Download(shelf.remote.uri, shelf.revision, server, self._patience, arrived)
        sha256 = {file.name: self._one(shelf, file, download) for file in files}
        shelf.finish(sha256, files)

    def _one(self, shelf: Shelf, file: RemoteFile, download: Download) -> str:
        """The sha256 of a file that is there, or comes now."""
        target = shelf.files / file.name
        if shelf.has(file):
            sha256, found = examine(target, file.digest)
            if file.digest is None or found == file.digest.value:
                return sha256
        return download.fetch(file, shelf.part(file), target)
