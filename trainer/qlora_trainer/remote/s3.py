"""S3, or what speaks its protocol at AWS_ENDPOINT_URL_S3, through s3fs."""

import base64
import hashlib
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions
import botocore.session
from fsspec.asyn import sync
from s3fs import S3FileSystem

from qlora_contract.places import MANIFEST
from qlora_contract.remote import Remote
from qlora_trainer.errors import TransferFailed, TransferRefused
from qlora_trainer.remote.credentials import S3_KEYS, S3_SESSION_KEY, Credentials, ca_bundle
from qlora_trainer.remote.files import Choose, Digest, RemoteFile
from qlora_trainer.remote.patience import Interrupted, Patience, retry_after

CONNECT_SECONDS = 20.0
PASSING = frozenset({408, 409, 429, 500, 502, 503, 504})
"""Statuses that may be others a moment later."""
CHANGED = 412
MD5_LENGTH = 32
READ_BYTES = 1 << 17
"""aiohttp holds back up to twice as much as it is asked for, which is lost when the connection breaks."""


class S3:
    """A bucket."""

    def __init__(
        self, remote: Remote, credentials: Credentials, environ: Mapping[str, str], read_seconds: float
    ) -> None:
        """Say which bucket, and what to show.

        Args:
            remote: the bucket and a path in it.
            credentials: with an access key, or nothing: then botocore's own chain (environment, profiles, workload
                identity), and without any of it anonymous requests, which public buckets answer.
            environ: names the region, and certificates to trust; botocore reads endpoint and proxies from its
                process's own.
            read_seconds: how long to wait for the next byte.

        Raises:
            ConfigurationError: there is no such file of certificates.
        """
        self._remote = remote
        self._credentials = credentials
        key, secret = (credentials.values.get(name) for name in S3_KEYS)
        with self._asking():
            anonymous = key is None and botocore.session.get_session().get_credentials() is None
        self._fs = S3FileSystem(
            anon=anonymous,
            key=key,
            secret=secret,
            token=credentials.values.get(S3_SESSION_KEY),
            client_kwargs=_client(environ),
            config_kwargs={
                "connect_timeout": min(CONNECT_SECONDS, read_seconds),
                "read_timeout": read_seconds,
                "retries": {"total_max_attempts": 1},
            },
            skip_instance_cache=True,
            use_listings_cache=False,
        )
        # Trying again is our own business, as it ends with our patience.
        self._fs.retries = 1
        logging.getLogger("s3fs").setLevel(logging.ERROR)

    # --- a source

    def listing(self, revision: str, choose: Choose) -> tuple[str, list[RemoteFile]]:  # noqa: ARG002 - the Hub's
        """A hash over key, size and etag of the chosen files, and these files."""
        remote = self._remote
        with self._asking():
            try:
                entries = self._fs.ls(
                    f"{remote.root}/{remote.path}".removesuffix("/."), detail=True, refresh=True
                )
            except FileNotFoundError as error:
                if error.__cause__ is not None:  # the bucket, not the path
                    raise
                entries = []
        there = [
            _file(entry) for entry in entries if entry["type"] == "file" and not entry["Key"].endswith("/")
        ]
        files = choose(there)
        return fingerprint(files), [self._with_digest(file) for file in files]

    def _with_digest(self, file: RemoteFile) -> RemoteFile:
        """A file with what its bytes must hash to, as far as S3 knows."""
        with self._asking(file.name):
            facts = self._call("head_object", Key=file.name, IfMatch=file.etag, ChecksumMode="ENABLED")
        return replace(file, digest=digest_of(facts, file.etag))

    def read(self, revision: str, file: RemoteFile, offset: int) -> Generator[bytes]:  # noqa: ARG002
        """A file's bytes from an offset on; of the very content that was listed."""
        with self._asking(file.name):
            answer = self._call("get_object", Key=file.name, IfMatch=file.etag, Range=f"bytes={offset}-")
            body = answer["Body"]
            try:
                while chunk := sync(self._fs.loop, body.read, READ_BYTES):
                    yield chunk
            finally:
                body.close()

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._fs.call_s3(method, Bucket=self._remote.root, **arguments)
        return answer

    # --- a destination

    def send(
        self,
        folder: Path,
        names: Sequence[str],
        check: Callable[[], None],
        sent: Callable[[int], None],
        patience: Patience,
    ) -> str:
        """Put files there, the manifest last and only after all others: who finds it finds them. The URI of it all.

        When the same manifest is there, everything is.

        Args:
            folder: of the files.
            names: theirs, without the manifest.
            check: called before the manifest is written; may raise.
            sent: called with the number of bytes that were sent.
            patience: how long to insist.
        """
        manifest = self._key(MANIFEST)
        old = patience.insist(partial(self._content, manifest))
        if old != (folder / MANIFEST).read_bytes():
            if old is not None:
                patience.insist(partial(self._remove, manifest))
            for name in names:
                patience.insist(partial(self._put, folder / name, self._key(name), sent, patience))
            check()
            patience.insist(partial(self._put, folder / MANIFEST, manifest, sent, patience))
        return f"s3://{self._remote.root}/{self._remote.path}".removesuffix("/.")

    def _key(self, name: str) -> str:
        return str(self._remote.path / name)

    def _content(self, key: str) -> bytes | None:
        with self._asking():
            try:
                body = self._call("get_object", Key=key)["Body"]
                return bytes(sync(self._fs.loop, body.read))
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return None
            except PermissionError:
                return None  # keys that may only write; if they may not even do that, we shall hear

    def _remove(self, key: str) -> None:
        with self._asking():
            self._call("delete_object", Key=key)

    def _put(self, path: Path, key: str, sent: Callable[[int], None], patience: Patience) -> None:
        with self._asking():
            self._fs.put_file(str(path), f"{self._remote.root}/{key}", callback=_Sent(sent, patience))

    # --- errors

    @contextmanager
    def _asking(self, name: str = "") -> Iterator[None]:
        """Turn the libraries' errors into ours."""
        try:
            yield
        except (
            OSError,
            botocore.exceptions.BotoCoreError,
            botocore.exceptions.ClientError,
            aiohttp.ClientError,
        ) as error:
            raise self._judge(
                error, f"s3://{self._remote.root}/{name}" if name else self._remote.uri
            ) from None

    def _judge(self, error: Exception, what: str) -> Exception:
        origin = _origin(error)
        if isinstance(origin, botocore.exceptions.ClientError):
            return self._answered(origin, what)
        if isinstance(origin, botocore.exceptions.SSLError | aiohttp.ClientConnectorCertificateError):
            return TransferRefused(
                f"{what}: the server's certificate, or a proxy's, is signed by nobody that is trusted here; name the "
                "file of certificates to trust in AWS_CA_BUNDLE or SSL_CERT_FILE"
            )
        if isinstance(origin, _MISCONFIGURED):
            return TransferRefused(f"{what}: {type(origin).__name__}: {self._advice('')}")
        return Interrupted(f"{what}: {type(origin).__name__}")

    def _answered(self, error: botocore.exceptions.ClientError, what: str) -> Exception:
        facts = error.response.get("ResponseMetadata", {})
        status, code = facts.get("HTTPStatusCode", 0), error.response["Error"].get("Code", "")
        if status == CHANGED:
            return TransferFailed(f"{what} was changed while it was fetched")
        if status in PASSING or code in ("SlowDown", "RequestTimeout"):
            return Interrupted(
                f"{what}: HTTP {status}", retry_after(facts.get("HTTPHeaders", {}).get("retry-after"))
            )
        named = "" if code == str(status) else f" ({code})"  # an answer to HEAD has no code
        return TransferRefused(f"{what}: HTTP {status}{named}: {self._advice(code, status)}")

    def _advice(self, code: str, status: int = 0) -> str:
        field = self._credentials.field
        if code == "NoSuchBucket":
            return f"there is no bucket {self._remote.root}"
        if status == 404:
            return "there is nothing of this name"
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
            return f"the keys of {field} are not valid, or not any more"
        if not self._credentials.values:
            return f"it needs credentials: a Secret with {' and '.join(S3_KEYS)}, by {field}, or a workload identity"
        return f"the keys of {field} may not do this; give them the permission, or use others"


_MISCONFIGURED = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.ProfileNotFound,
    botocore.exceptions.ParamValidationError,
    botocore.exceptions.InvalidEndpointConfigurationError,
)


class _Sent:
    """Tells the bytes of a part that was sent: what s3fs calls of fsspec's Callback."""

    def __init__(self, sent: Callable[[int], None], patience: Patience) -> None:
        self._sent = sent
        self._patience = patience

    def set_size(self, size: int) -> None:
        """How much it will be is known here."""

    def relative_update(self, inc: int = 1) -> None:
        """A part is there."""
        self._sent(inc)
        self._patience.progressed()


def fingerprint(files: Sequence[RemoteFile]) -> str:
    """A bucket's revision: sha256 over key, size and etag of files."""
    lines = sorted(f"{file.name}\t{file.size}\t{file.etag}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest_of(facts: Mapping[str, Any], etag: str) -> Digest | None:
    """What an object hashes to, by the answer to HEAD; None when S3 keeps no hash of all its bytes."""
    sha256 = facts.get("ChecksumSHA256", "")
    if sha256 and facts.get("ChecksumType") != "COMPOSITE" and "-" not in sha256:
        return Digest("sha256", base64.b64decode(sha256).hex())
    encrypted = facts.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in facts
    value = etag.strip('"')
    return Digest("md5", value) if len(value) == MD5_LENGTH and not encrypted else None


def _client(environ: Mapping[str, str]) -> dict[str, Any]:
    """What botocore does not take from the environment by itself: AWS_REGION and SSL_CERT_FILE."""
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    certificates = ca_bundle(environ, "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
    given = {"region_name": region, "verify": certificates}
    return {name: value for name, value in given.items() if value}


def _file(entry: Mapping[str, Any]) -> RemoteFile:
    # s3fs' Key is bucket/key.
    return RemoteFile(entry["Key"].partition("/")[2], entry["size"], etag=entry["ETag"])


def _origin(error: BaseException) -> BaseException:
    """What botocore raised, before s3fs made an OSError of it."""
    return error.__cause__ if isinstance(error, OSError) and error.__cause__ is not None else error


def _code(error: BaseException) -> str:
    origin = _origin(error)
    return (
        str(origin.response["Error"].get("Code", ""))
        if isinstance(origin, botocore.exceptions.ClientError)
        else ""
    )
