"""S3, or what speaks its protocol at AWS_ENDPOINT_URL_S3, by boto3.

Objects are read by range and uploaded by part here, not by boto3's managed transfers: those start a file that broke off
anew, count bytes before the server has them, and wait for their threads when SIGTERM interrupts them.
"""

import base64
import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import urllib3
from boto3.session import Session
from botocore import UNSIGNED, exceptions
from botocore.config import Config
from botocore.parsers import ResponseParserError

from qlora_contract.job_folder import MANIFEST
from qlora_contract.remote import Remote
from qlora_trainer.errors import TransferFailed, TransferRefused
from qlora_trainer.transfer.credentials import S3_KEYS, S3_SESSION_KEY, Credentials, ca_bundle
from qlora_trainer.transfer.remote_files import Digest, RemoteFile, Selection, list_down
from qlora_trainer.transfer.retry import (
    CONNECT_SECONDS,
    RETRYABLE_STATUS,
    Retrier,
    TransientError,
    retry_after,
)

RETRYABLE = RETRYABLE_STATUS | {409}
"""S3 answers 409 when another operation on the object is in progress."""
CHANGED = 412
"""The object is not the one of IfMatch any more."""
MD5_LENGTH = 32
READ_BYTES = 1 << 16
"""What a connection that breaks may lose."""
PART_BYTES = 1 << 25
"""S3 takes 10,000 parts at most, so 312 GiB."""

_LIBRARY_ERRORS = (
    exceptions.BotoCoreError,
    exceptions.ClientError,
    ResponseParserError,
    urllib3.exceptions.HTTPError,
)
_MISCONFIGURED = (
    exceptions.NoCredentialsError,
    exceptions.PartialCredentialsError,
    exceptions.CredentialRetrievalError,
    exceptions.ProfileNotFound,
    exceptions.ParamValidationError,
    exceptions.InvalidEndpointConfigurationError,
)


class S3:
    """A bucket."""

    def __init__(
        self, remote: Remote, credentials: Credentials, environ: Mapping[str, str], read_seconds: float
    ) -> None:
        """Set up the client, without sending anything to the bucket.

        Args:
            remote: the bucket and a path in it.
            credentials: with an access key; without one, botocore looks for some (environment, profiles, workload
                identity), and when it finds none, requests are anonymous, which public buckets answer.
            environ: names the region and trusted certificates; botocore takes endpoint and proxies from the process's
                environment.
            read_seconds: how long to wait for the next byte.

        Raises:
            ConfigurationError: the file of certificates does not exist.
        """
        self._remote = remote
        self._credentials = credentials
        key, secret = (credentials.values.get(name) for name in S3_KEYS)
        with self._translate_errors():
            session = Session(
                aws_access_key_id=key,
                aws_secret_access_key=secret,
                aws_session_token=credentials.values.get(S3_SESSION_KEY),
                region_name=environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION"),
            )
            config = Config(
                signature_version=None if session.get_credentials() else UNSIGNED,
                connect_timeout=min(CONNECT_SECONDS, read_seconds),
                read_timeout=read_seconds,
                retries={"total_max_attempts": 1},  # a Retrier does, which knows our limit
                # Bodies are covered by the signature and by our own digests; older servers know nothing else.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            )
            certificates = ca_bundle(environ, "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
            self._client = session.client("s3", verify=certificates, config=config)

    # --- a source

    def list_files(self, revision: str, select: Selection) -> tuple[str, list[RemoteFile]]:  # noqa: ARG002 - the Hub's
        """(a hash over key, size and etag of the selected files, these files).

        As on a disk, the path is a folder, whose files are listed, or else a file.
        """
        bucket, prefix = self._remote.root, self._key("")
        with self._translate_errors():

            def list_folder(path: str) -> tuple[list[RemoteFile], list[str]]:
                pages = self._client.get_paginator("list_objects_v2").paginate(
                    Bucket=bucket, Prefix=path, Delimiter="/"
                )
                files, folders = [], []
                for page in pages:
                    folders += [folder["Prefix"] for folder in page.get("CommonPrefixes", ())]
                    files += [
                        RemoteFile(entry["Key"], entry["Size"], etag=entry["ETag"])
                        for entry in page.get("Contents", ())
                        if not entry["Key"].endswith("/")  # consoles make empty objects for folders
                    ]
                return files, folders

            found = list_down(list_folder, prefix)
            if not found:
                key = prefix.removesuffix("/")
                # Of all keys that begin with it, it is the first.
                page = self._client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
                found = [
                    RemoteFile(key, entry["Size"], etag=entry["ETag"])
                    for entry in page.get("Contents", ())
                    if entry["Key"] == key
                ]
        files = select(found)
        listed = []
        for file in files:
            with self._translate_errors(file.name):
                facts = self._client.head_object(
                    Bucket=bucket, Key=file.name, IfMatch=file.etag, ChecksumMode="ENABLED"
                )
            listed.append(replace(file, digest=digest_of(facts, file.etag)))
        return fingerprint(files), listed

    def _key(self, name: str) -> str:
        """The key of a file below the path."""
        return "/".join([*self._remote.path.parts, name])

    def read(self, revision: str, file: RemoteFile, offset: int) -> Generator[bytes]:  # noqa: ARG002 - the Hub's
        """The bytes of a file from an offset on, of the very content that was listed."""
        with self._translate_errors(file.name):
            answer = self._client.get_object(
                Bucket=self._remote.root, Key=file.name, IfMatch=file.etag, Range=f"bytes={offset}-"
            )
            with closing(answer["Body"]) as body:
                yield from body.iter_chunks(READ_BYTES)

    # --- a destination

    def upload(
        self,
        folder: Path,
        names: Sequence[str],
        check: Callable[[], None],
        on_bytes: Callable[[int], None],
        retrier: Retrier,
        under: str = "",
    ) -> str:
        """Upload files, the manifest last, so that whoever finds it finds the others; return the URI of the path.

        When the same manifest is there already, so are the files, and nothing is sent.

        Args:
            folder: of the files.
            names: of the files, without the manifest.
            check: called before the manifest is written; what it raises ends the upload.
            on_bytes: called with the number of bytes that were sent.
            retrier: how long to continue without progress.
            under: what the names begin with there, such as `exports/merged/`.
        """
        manifest = self._key(f"{under}{MANIFEST}")

        def read_manifest() -> bytes | None:
            """Its content; None if there is none, or the keys may only write."""
            with self._translate_errors():
                try:
                    answer = self._client.get_object(Bucket=self._remote.root, Key=manifest)
                    return bytes(answer["Body"].read())
                except exceptions.ClientError as error:
                    if _status(error) in (403, 404) and error.response["Error"].get("Code") != "NoSuchBucket":
                        return None
                    raise

        present = retrier.call(read_manifest)
        if present != (folder / MANIFEST).read_bytes():
            if present is not None:
                self._call(retrier, self._client.delete_object, Key=manifest)
            for name in names:
                self._upload_file(folder / name, f"{under}{name}", on_bytes, retrier)
            check()
            self._upload_file(folder / MANIFEST, f"{under}{MANIFEST}", on_bytes, retrier)
        return f"s3://{self._remote.root}/{self._remote.path}".removesuffix("/.")

    def _upload_file(self, path: Path, name: str, on_bytes: Callable[[int], None], retrier: Retrier) -> None:
        """Upload a file under a name; a large one in parts, each of which is retried by itself."""
        key = self._key(name)
        with path.open("rb") as stream:
            body = stream.read(PART_BYTES)
            if len(body) < PART_BYTES:
                self._call(retrier, self._client.put_object, Key=key, Body=body)
                on_bytes(len(body))
                return
            begun = self._call(retrier, self._client.create_multipart_upload, Key=key)
            upload = {"Key": key, "UploadId": begun["UploadId"]}
            parts: list[dict[str, Any]] = []
            try:
                while body:
                    number = len(parts) + 1
                    part = self._call(
                        retrier, self._client.upload_part, PartNumber=number, Body=body, **upload
                    )
                    parts.append({"PartNumber": number, "ETag": part["ETag"]})
                    on_bytes(len(body))
                    body = stream.read(PART_BYTES)
                self._call(retrier, self._complete, Parts=parts, Size=path.stat().st_size, **upload)
            except Exception:
                with suppress(*_LIBRARY_ERRORS):  # or the bucket's owner keeps paying for the parts
                    self._client.abort_multipart_upload(Bucket=self._remote.root, **upload)
                raise

    def _complete(self, *, Parts: list[dict[str, Any]], Size: int, **upload: Any) -> None:  # noqa: N803 - as S3
        """Make one object of its parts. When the answer to an earlier try was lost, it is there already."""
        try:
            self._client.complete_multipart_upload(MultipartUpload={"Parts": Parts}, **upload)
        except self._client.exceptions.NoSuchUpload:
            there = self._client.head_object(Bucket=upload["Bucket"], Key=upload["Key"])
            if there["ContentLength"] != Size:
                raise

    def _call(self, retrier: Retrier, method: Callable[..., Any], **arguments: Any) -> Any:
        """The answer of the bucket to a request, retried."""

        def request() -> Any:
            with self._translate_errors():
                return method(Bucket=self._remote.root, **arguments)

        return retrier.call(request)

    # --- errors

    @contextmanager
    def _translate_errors(self, name: str = "") -> Iterator[None]:
        """Turn the libraries' errors into ours."""
        try:
            yield
        except _LIBRARY_ERRORS as error:
            what = f"s3://{self._remote.root}/{name}" if name else self._remote.uri
            raise self._classify(error, what) from None

    def _classify(self, error: Exception, what: str) -> Exception:
        if isinstance(error, exceptions.ClientError):
            status, code = _status(error), error.response["Error"].get("Code", "")
            if status == CHANGED:
                return TransferFailed(f"{what} was changed while it was being fetched")
            if status in RETRYABLE or code in ("SlowDown", "RequestTimeout"):
                headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
                return TransientError(f"{what}: HTTP {status}", retry_after(headers.get("retry-after")))
            named = "" if code == str(status) else f" ({code})"  # an answer to HEAD has no code
            return TransferRefused(f"{what}: HTTP {status}{named}: {self._advice(code, status)}")
        if isinstance(error, exceptions.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
            return TransferRefused(
                f"{what}: the certificate of the server, or of a proxy, is not signed by a trusted authority; set "
                "AWS_CA_BUNDLE or SSL_CERT_FILE to a file of certificates to trust"
            )
        if isinstance(error, _MISCONFIGURED):
            return TransferRefused(f"{what}: {type(error).__name__}: {self._advice('', 0)}")
        return TransientError(f"{what}: {type(error).__name__}")

    def _advice(self, code: str, status: int) -> str:
        """What is wrong with a request that was refused, and what would be right."""
        field = self._credentials.field
        if code == "NoSuchBucket":
            return f"there is no bucket {self._remote.root}"
        if status == 404:
            return "there is no such object"
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
            return f"the keys in {field} are not valid, or have expired"
        if not self._credentials.values:
            return f"credentials are needed: a Secret with {' and '.join(S3_KEYS)} in {field}, or a workload identity"
        return f"the keys in {field} lack the permission for this; grant it, or use other keys"


def fingerprint(files: Sequence[RemoteFile]) -> str:
    """The revision of a bucket: sha256 over key, size and etag of files, hexadecimal."""
    lines = sorted(f"{file.name}\t{file.size}\t{file.etag}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest_of(facts: Mapping[str, Any], etag: str) -> Digest | None:
    """What an object must hash to, by the answer to HEAD; None when S3 has no hash of all its bytes."""
    sha256 = facts.get("ChecksumSHA256", "")
    if sha256 and facts.get("ChecksumType") != "COMPOSITE" and "-" not in sha256:
        return Digest("sha256", base64.b64decode(sha256).hex())
    encrypted = facts.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in facts
    value = etag.strip('"')
    return Digest("md5", value) if len(value) == MD5_LENGTH and not encrypted else None


def _status(error: exceptions.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
