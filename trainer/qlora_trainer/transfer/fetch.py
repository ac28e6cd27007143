"""Remote sources into the workspace: once for all of its jobs, at the revision that each job keeps."""

from collections.abc import Callable, Mapping
from pathlib import Path

from qlora_contract.job_folder import job_path
from qlora_contract.paths import resolve
from qlora_contract.remote import NamedSource, is_remote, parse_remote
from qlora_contract.run_config import ResolvedRevisions, RunConfig
from qlora_trainer.errors import TransferRefused
from qlora_trainer.transfer.connect import connect_source
from qlora_trainer.transfer.download import Downloader
from qlora_trainer.transfer.lease import Lease, LeaseLost, leased
from qlora_trainer.transfer.remote_files import RemoteFile, Server, hash_file, select_files
from qlora_trainer.transfer.retry import Retrier, log
from qlora_trainer.transfer.revisions import PinnedRevisions
from qlora_trainer.transfer.source_cache import Snapshot

CountBytes = Callable[[int, int], None]
"""count(done, total): how many bytes to add to what is done, and to what there is to do."""


class SourceFetcher:
    """Fetches the remote sources of a job."""

    def __init__(
        self,
        run: RunConfig,
        volumes: Mapping[str, Path],
        environ: Mapping[str, str],
        retrier: Retrier,
        count: CountBytes,
    ) -> None:
        """Say for which job, and where to.

        Args:
            run: the job.
            volumes: claim -> directory.
            environ: addresses, certificates, and where credentials are.
            retrier: how long to continue without progress.
            count: called with the bytes that are to come, and as they come.
        """
        self._workspace = resolve(run.workspace, volumes)
        self._pins = PinnedRevisions(job_path(run.workspace, run.job.name, volumes), run)
        self._run = run
        self._environ = environ
        self._retrier = retrier
        self._count = count

    def fetch_all(self) -> ResolvedRevisions:
        """Fetch what is not in the workspace, and return the revisions of all remote sources.

        Raises:
            TransferRefused: a source is missing, has nothing to train on, or refuses us.
            TransferFailed: a server does not answer as it should.
            StorageFull, ConfigurationError: the workspace cannot take the files.
        """
        return ResolvedRevisions.from_sources(
            [(source, self._fetch(source) if is_remote(source.uri) else None) for source in self._run.sources]
        )

    def _fetch(self, source: NamedSource) -> str:
        """The revision of a source, all files of which are in the workspace now."""
        remote = parse_remote(source.uri)
        pinned = self._pins.get(source)
        if pinned is not None and Snapshot(self._workspace, remote, pinned, source.role).is_complete():
            log(f"{remote.uri} is in the workspace already, at {pinned}")
            return pinned
        server = self._retrier.call(
            lambda: connect_source(source, self._environ, self._retrier.limit_seconds)
        )
        revision, files = self._retrier.call(
            lambda: server.list_files(
                pinned or source.revision,
                lambda files: select_files(source.role, remote, files),
            )
        )
        if pinned not in (None, revision):
            raise TransferRefused(
                f"{remote.uri} has changed since this job first fetched it: it was {pinned} and is now {revision}, and "
                "the earlier files are no longer in the workspace; to train on the new ones, choose another "
                "metadata.name"
            )
        if remote.kind in ("model", "dataset"):  # what a bucket or a web server had cannot be asked for again
            self._pins.set(source, revision)  # at once: an interrupted fetch is resumed at this revision
        snapshot = Snapshot(self._workspace, remote, revision, source.role)
        # Downloads what is missing, or waits for the job that does.
        snapshot.make_folders()
        if pinned is None and snapshot.is_complete():
            # Whoever may write the workspace may have written this, too.
            for name in snapshot.drop_damaged(files):
                log(
                    f"{remote.uri}: {name} in the workspace is not the one of {revision}, and is fetched again"
                )
        while not snapshot.is_complete():
            try:
                with leased(snapshot.lease) as lease:
                    if not snapshot.is_complete():
                        self._download(snapshot, files, server, lease)
            except LeaseLost:
                log(f"{snapshot.remote.uri}: another job is fetching it now; waiting for that job")
        log(f"{snapshot.remote.uri} is in the workspace, at {snapshot.revision}")
        self._pins.set(source, revision)
        return revision

    def _download(self, snapshot: Snapshot, files: list[RemoteFile], server: Server, lease: Lease) -> None:
        snapshot.check_space(files)
        self._count(sum(map(snapshot.bytes_present, files)), sum(file.size for file in files))

        def on_bytes(count: int) -> None:
            lease.check()
            self._count(count, 0)

        download = Downloader(snapshot.remote.uri, snapshot.revision, server, self._retrier, on_bytes)
        sha256: dict[str, str] = {}
        for file in files:
            target = snapshot.files / file.name
            if snapshot.contains(file):  # fetched by an interrupted job, or for another path
                sha256[file.name], found = hash_file(target, file.digest)
                if file.digest is None or found == file.digest.value:
                    continue
            sha256[file.name] = download.fetch(file, snapshot.part(file), target)
        snapshot.write_manifest(sha256, files)
