"""From a remote URI to the client of its server."""

from collections.abc import Mapping

from qlora_contract.remote import Remote
from qlora_trainer.transfer.credentials import DOCKER_CONFIG, HUB_KEYS, S3_KEYS, Role, read_credentials
from qlora_trainer.transfer.hub import Hub
from qlora_trainer.transfer.oci import Oci
from qlora_trainer.transfer.s3 import S3

READ_SECONDS = 60.0
"""The longest wait for the next byte of an answer."""


def connect(remote: Remote, role: Role, environ: Mapping[str, str], limit_seconds: float) -> Hub | S3:
    """A client of the Hub or S3 with the credentials of a role. It sends nothing yet.

    Args:
        remote: what it is for.
        role: whose credentials it uses.
        environ: addresses, certificates, and where credentials are.
        limit_seconds: how long a transfer may go without progress; no answer is waited for longer.

    Raises:
        ConfigurationError: an address or a file of certificates is not usable.
        TransferRefused: the Secret is not one for this kind of server.
    """
    read_seconds = min(READ_SECONDS, limit_seconds)
    if remote.kind == "bucket":
        return S3(remote, read_credentials(role, S3_KEYS, environ), environ, read_seconds)
    return Hub(remote, read_credentials(role, HUB_KEYS, environ), environ, read_seconds)


def connect_destination(remote: Remote, environ: Mapping[str, str], limit_seconds: float) -> Hub | S3 | Oci:
    """As `connect`, of what may be sent to, with the credentials for output."""
    if remote.kind == "artifact":
        credentials = read_credentials("output", (DOCKER_CONFIG,), environ)
        return Oci(remote, credentials, environ, min(READ_SECONDS, limit_seconds))
    return connect(remote, "output", environ, limit_seconds)
