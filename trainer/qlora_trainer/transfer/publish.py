"""The finished adapter, and what was made of it, to where output.destination says."""

from collections.abc import Callable, Mapping
from pathlib import Path

from qlora_contract.export import forms_of
from qlora_contract.files import read_json
from qlora_contract.job_folder import EXPORTS, MANIFEST, is_exported, job_path, read_manifest
from qlora_contract.remote import parse_remote
from qlora_contract.run_config import RunConfig
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.storage.job_folder import JobFolder
from qlora_trainer.transfer.connect import connect_destination
from qlora_trainer.transfer.oci import Oci
from qlora_trainer.transfer.retry import Retrier


def publish(
    run: RunConfig,
    volumes: Mapping[str, Path],
    environ: Mapping[str, str],
    retrier: Retrier,
    count: Callable[[int, int], None],
) -> str:
    """Upload the adapter and its exports, and return the URI of the copy.

    Args:
        run: the job, with a destination.
        volumes: claim -> directory.
        environ: addresses, certificates, and where credentials are.
        retrier: how long to continue without progress.
        count: count(done, total): how many bytes to add to what is done, and to what there is to do.

    Raises:
        ConfigurationError: there is no destination, or the adapter or an export is not complete.
        Fenced: another attempt owns the job's folder now.
        TransferRefused: the destination is missing, or refuses us.
        TransferFailed: the destination does not answer as it should.
    """
    if run.output.destination is None:
        raise ConfigurationError("output.destination is not set: there is nowhere to send the adapter")
    folder = JobFolder(job_path(run.workspace, run.job.name, volumes), run)
    folder.acquire()
    manifest = read_manifest(folder.adapter)
    if manifest is None:
        raise ConfigurationError(f"{folder.adapter} is not a complete adapter; run the job to its end first")
    # The adapter last: the URI of a Hub is that of the newest commit, the manifest of a registry names all layers, and
    # whoever finds the adapter finds the rest.
    parts = {f"{EXPORTS}/{form}/": folder.path / EXPORTS / form for form in forms_of(run.output)}
    for path in parts.values():
        if not is_exported(path, manifest["sha256"]):
            raise ConfigurationError(
                f"{path} is not a complete export of the adapter; run the job to its end first"
            )
    parts[""] = folder.adapter
    remote = parse_remote(run.output.destination)
    server = retrier.call(lambda: connect_destination(remote, environ, retrier.limit_seconds))
    count(0, sum(file.stat().st_size for path in parts.values() for file in path.iterdir()))
    uri = ""
    try:
        for under, path in parts.items():
            names = sorted(read_json(path / MANIFEST)["files"])
            uri = server.upload(path, names, folder.check_fence, lambda sent: count(sent, 0), retrier, under)
    finally:
        if isinstance(server, Oci):
            server.close()
    return uri
