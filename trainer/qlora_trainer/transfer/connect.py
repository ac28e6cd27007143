"""From a remote URI to the client of its server."""

from collections.abc import Mapping

from qlora_contract.remote import NamedSource, Remote, parse_remote
from qlora_trainer.transfer.credentials import DOCKER_CONFIG, HUB_KEYS, S3_KEYS, read_credentials
from qlora_trainer.transfer.hub import Hub
from qlora_trainer.transfer.oci import Oci
from qlora_trainer.transfer.s3 import S3
from qlora_trainer.transfer.web import Web

READ_SECONDS = 60.0
"""The longest wait for the next byte of an answer."""


def connect(remote: Remote, owner: str, environ: Mapping[str, str], limit_seconds: float) -> Hub | S3:
    """A client of the Hub or S3 with the credentials of a source or the destination. It sends nothing yet.

    Args:
        remote: what it is for.
        owner: whose credentials it uses, as Credentials has it.
        environ: addresses, certificates, and where credentials are.
        limit_seconds: how long a transfer may go without progress; no answer is waited for longer.

    Raises:
        ConfigurationError: an address or a file of certificates is not usable.
        TransferRefused: the Secret is not one for this kind of server.
    """
    read_seconds = min(READ_SECONDS, limit_seconds)
    if remote.kind == "bucket":
        return S3(remote, read_credentials(owner, S3_KEYS, environ), environ, read_seconds)
    return Hub(remote, read_credentials(owner, HUB_KEYS, environ), environ, read_seconds)


def connect_source(source: NamedSource, environ: Mapping[str, str], limit_seconds: float) -> Hub | S3 | Web:
    """As `connect`, for what a job reads: that may also be on a web server, which gets no credentials."""
    remote = parse_remote(source.uri)
    if remote.kind == "web":
        return Web(remote, environ, min(READ_SECONDS, limit_seconds))
    return connect(remote, source.field, environ, limit_seconds)


def connect_destination(remote: Remote, environ: Mapping[str, str], limit_seconds: float) -> Hub | S3 | Oci:
    """As `connect`, for what may be sent to, with the credentials for output: that may also be an OCI registry."""
    if remote.kind == "artifact":
        credentials = read_credentials("output", (DOCKER_CONFIG,), environ)
        return Oci(remote, credentials, environ, min(READ_SECONDS, limit_seconds))
    return connect(remote, "output", environ, limit_seconds)
