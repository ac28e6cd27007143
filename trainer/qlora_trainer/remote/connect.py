"""From a URI to what serves it."""

from collections.abc import Mapping

from qlora_contract.remote import Remote
from qlora_trainer.remote.credentials import HUB_KEYS, S3_KEYS, Role, read_credentials
from qlora_trainer.remote.hub import Hub
from qlora_trainer.remote.s3 import S3

READ_SECONDS = 60.0
"""How long to wait for the next byte of an answer, at most."""


def connect(remote: Remote, role: Role, environ: Mapping[str, str], patience_seconds: float) -> Hub | S3:
    """The Hub or S3, with the credentials of a role. Nothing is asked of it yet."""
    seconds = min(READ_SECONDS, patience_seconds)
    if remote.kind == "bucket":
        return S3(remote, read_credentials(role, S3_KEYS, environ), environ, seconds)
    return Hub(remote, read_credentials(role, HUB_KEYS, environ), environ, seconds)
