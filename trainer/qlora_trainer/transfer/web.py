"""A file of a web server, by HTTPS alone: resumed by range, without credentials, and from allowed addresses only."""

import hashlib
import json
import ssl
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urljoin, urlsplit

import httpx2

from qlora_contract.env import WEB_SOURCES_ENV
from qlora_contract.remote import WEB, Remote, source_allowed
from qlora_trainer.errors import TransferFailed, TransferRefused
from qlora_trainer.transfer.credentials import ca_bundle
from qlora_trainer.transfer.remote_files import RemoteFile, Selection
from qlora_trainer.transfer.retry import CONNECT_SECONDS, RETRYABLE_STATUS, TransientError, retry_after

MAX_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
WHOLE, PART, BEYOND = 200, 206, 416


class Web:
    """The server of one file."""

    def __init__(self, remote: Remote, environ: Mapping[str, str], read_seconds: float) -> None:
        """Set up the client, without sending anything.

        Args:
            remote: the file.
            environ: names the addresses that are allowed, and trusted certificates; proxies are the process's own.
            read_seconds: how long to wait for the next byte.

        Raises:
            ConfigurationError: the file of certificates does not exist.
        """
        self._remote = remote
        allowed = environ.get(WEB_SOURCES_ENV)
        self._allowed: list[str] | None = None if allowed is None else json.loads(allowed)
        certificates = ca_bundle(environ, "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
        self._timeout = httpx2.Timeout(read_seconds, connect=min(CONNECT_SECONDS, read_seconds))
        self._verify = ssl.create_default_context(cafile=certificates) if certificates else True

    def list_files(self, revision: str, select: Selection) -> tuple[str, list[RemoteFile]]:  # noqa: ARG002 - the Hub's
        """(a hash over the file's size and what its server identifies it by, the file)."""
        with self._answer({"Range": "bytes=0-0"}) as answer:
            size = _size(answer)
            if size is None:
                raise TransferRefused(
                    f"{self._remote.uri}: its server does not say how long the file is, so it cannot be known to be "
                    "whole; copy it to a claim, or to s3:// or hf://"
                )
            if answer.headers.get("Content-Type", "").partition(";")[0].strip() == "text/html":
                raise TransferRefused(
                    f"{self._remote.uri}: its server answers with a web page, not with a file of records; give the "
                    "address of the file itself, such as that of its download"
                )
            file = RemoteFile(str(self._remote.path), size, etag=_validator(answer))
        known = f"{self._remote.uri}\t{file.size}\t{file.etag}\n"
        return hashlib.sha256(known.encode()).hexdigest(), select([file])

    def read(self, revision: str, file: RemoteFile, offset: int) -> Generator[bytes]:  # noqa: ARG002 - the Hub's
        """The bytes of the file from an offset on, also from a server that ignores ranges."""
        with self._answer({"Range": f"bytes={offset}-"} if offset else {}) as answer:
            if (_size(answer), _validator(answer)) != (file.size, file.etag):
                raise TransferFailed(f"{self._remote.uri} was changed while it was being fetched")
            if answer.status_code == PART and not answer.headers.get("Content-Range", "").startswith(
                f"bytes {offset}-"
            ):
                raise TransferFailed(
                    f"{self._remote.uri}: its server sent another part than it was asked for"
                )
            skip = offset if answer.status_code == WHOLE else 0
            for chunk in answer.iter_raw():  # as it arrives, so that a break loses nothing
                if wanted := chunk[skip:]:
                    yield wanted
                skip = max(0, skip - len(chunk))

    @contextmanager
    def _answer(self, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """The server's answer that has the file, or a part of it, after redirects."""
        url = self._remote.uri
        # Where redirects lead is looked at first.
        client = httpx2.Client(follow_redirects=False, timeout=self._timeout, verify=self._verify)
        with self._translate_errors(), client:
            for _ in range(MAX_REDIRECTS + 1):
                # Compressed bytes could be neither counted nor resumed.
                request = {"Accept-Encoding": "identity", **headers}
                with client.stream("GET", url, headers=request) as answer:
                    if answer.status_code in REDIRECTS:
                        url = self._target(url, answer.headers.get("Location", ""))
                        continue
                    self._check(answer)
                    yield answer
                    return
        raise TransferRefused(f"{self._remote.uri}: is redirected more than {MAX_REDIRECTS} times")

    def _target(self, url: str, location: str) -> str:
        """Where a redirect leads. Raises TransferRefused; a query, which may sign it, is never told."""
        target = urljoin(url, location)
        parts = urlsplit(target)
        shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
        if parts.scheme != "https" or not parts.hostname or parts.username or parts.password:
            raise TransferRefused(
                f"{self._remote.uri}: is redirected to {shown}, which is no https:// address without a user; "
                "redirects are followed to such only"
            )
        plain = f"{WEB}{parts.netloc}{parts.path}"
        if self._allowed is not None and not source_allowed(plain, self._allowed):
            raise TransferRefused(
                f"{self._remote.uri}: is redirected to {shown}, which is not allowed here: ask the administrator to "
                "allow that address as a source, too"
            )
        return target

    def _check(self, answer: httpx2.Response) -> None:
        """Raise for an answer without the file."""
        uri, status = self._remote.uri, answer.status_code
        if status in (WHOLE, PART):
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise TransferRefused(
                    f"{uri}: its server compresses what it sends, though it was asked not to; copy the file to a "
                    "claim, or to s3:// or hf://"
                )
            return
        if status in RETRYABLE_STATUS:
            raise TransientError(f"{uri}: HTTP {status}", retry_after(answer.headers.get("Retry-After")))
        if status == BEYOND:
            raise TransferFailed(f"{uri} was changed while it was being fetched, or is empty")
        advice = {
            401: "the file needs credentials, which https:// sources do not have; copy it to a claim, or to s3:// or "
            "hf://",
            403: "the server does not give it to everybody, and https:// sources have no credentials; copy it to a "
            "claim, or to s3:// or hf://",
            404: "there is no such file",
            410: "the file is gone",
        }.get(status, "the server refuses the request")
        raise TransferRefused(f"{uri}: HTTP {status}: {advice}")

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn the library's errors into ours. Their texts may have a signed address: only their kinds are told."""
        try:
            yield
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise TransferRefused(
                    f"{self._remote.uri}: the certificate of its server, or of a proxy, is not signed by a trusted "
                    "authority, or not for this name; set SSL_CERT_FILE to a file of certificates to trust"
                ) from None
            raise TransientError(f"{self._remote.uri}: {type(error).__name__}") from None


def _size(answer: httpx2.Response) -> int | None:
    """Bytes of the whole file; None where the answer does not say."""
    text = answer.headers.get("Content-Length", "")
    if answer.status_code == PART:
        text = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(text) if text.isdecimal() else None


def _validator(answer: httpx2.Response) -> str:
    """What the server identifies this content by; empty if by nothing."""
    return str(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
