"""The finished adapter to where output.destination says."""

from collections.abc import Callable, Mapping
from pathlib import Path

from qlora_contract import places
from qlora_contract.remote import parse_remote
from qlora_contract.run import RunConfig
from qlora_trainer import storage
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.remote.connect import connect
from qlora_trainer.remote.hub import Hub
from qlora_trainer.remote.patience import Patience
from qlora_trainer.storage import JobFolder


def publish(
    run: RunConfig,
    volumes: Mapping[str, Path],
    environ: Mapping[str, str],
    patience: Patience,
    count: Callable[[int, int], None],
) -> str:
    """Send the adapter, and return the URI of the copy.

    Args:
        run: the job, with a destination.
        volumes: claim -> folder.
        environ: addresses, certificates and the place of credentials.
        patience: how long to insist on the server.
        count: count(done, total): bytes to add to either sum.

    Raises:
        ConfigurationError: there is no whole adapter, or no destination.
        Fenced: another attempt has the job now.
        TransferRefused: the destination is missing, or refuses us.
        TransferFailed: it does not answer as it should.
    """
    if run.output.destination is None:
        raise ConfigurationError("output.destination is not set, so there is nowhere to send the adapter to")
    folder = JobFolder(places.job_folder(run.workspace, run.job.name, volumes), run)
    folder.claim()
    names = adapter_files(folder)
    remote = parse_remote(run.output.destination)
    server = patience.insist(lambda: connect(remote, "output", environ, patience.seconds))
    if isinstance(server, Hub):
        names = [*names, places.MANIFEST]
    count(0, sum((folder.adapter / name).stat().st_size for name in {*names, places.MANIFEST}))
    return server.send(folder.adapter, names, folder.check_fence, lambda done: count(done, 0), patience)


def adapter_files(folder: JobFolder) -> list[str]:
    """Names of the adapter's files but its manifest. Raises ConfigurationError unless they are whole."""
    manifest = storage.read_manifest(folder.adapter)
    if manifest is None:
        raise ConfigurationError(
            f"{folder.adapter} is not a whole adapter; run the job again to its end first"
        )
    return sorted(manifest["files"])
