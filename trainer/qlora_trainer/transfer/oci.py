"""A registry of OCI artifacts: the adapter as one manifest with a layer for each file, as ORAS pushes and pulls it.

By hand, not by a library: a push is a handful of requests, and has the limits, retries and words of all transfers.

It is that of the distribution specification, as Docker pushes: a blob that the registry has is not sent, so a push
that was killed goes on with the next file; another is sent as one stream, anew if that breaks (the reference registry
continues none); the manifest comes last. What it says depends on the files alone, so its digest is the same however
often it is pushed.
"""

import base64
import binascii
import hashlib
import json
import re
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

from qlora_contract.files import read_json, sha256
from qlora_contract.job_folder import MANIFEST
from qlora_contract.remote import Remote
from qlora_contract.units import first_line
from qlora_trainer.errors import TransferFailed, TransferRefused
from qlora_trainer.transfer.credentials import DOCKER_CONFIG, Credentials, ca_bundle
from qlora_trainer.transfer.retry import (
    CONNECT_SECONDS,
    RETRYABLE_STATUS,
    Retrier,
    TransientError,
    retry_after,
)

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.qlora.dev.adapter.v1"
LAYER_TYPE = "application/octet-stream"
READ_BYTES = 1 << 20
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
"""The config of an artifact that has none, by the image specification."""
TITLE = "org.opencontainers.image.title"
"""Annotation of a layer: its file's path, as whoever pulls it gets it."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Registries that are spoken to without TLS, as Docker does."""


@dataclass(frozen=True)
class Blob:
    """What a manifest points to."""

    digest: str
    size: int


def blob_of(data: bytes) -> Blob:
    """The descriptor of these bytes."""
    return Blob(f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))


def manifest_of(layers: Mapping[str, Blob]) -> bytes:
    """The manifest of an artifact.

    Args:
        layers: path of each file -> its blob.
    """
    empty = blob_of(EMPTY)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": EMPTY_TYPE, "digest": empty.digest, "size": empty.size},
        "layers": [
            {
                "mediaType": LAYER_TYPE,
                "digest": layers[name].digest,
                "size": layers[name].size,
                "annotations": {TITLE: name},
            }
            for name in sorted(layers)
        ],
    }
    return json.dumps(manifest, separators=(",", ":")).encode()


class Oci:
    """A tag of a repository of a registry."""

    def __init__(
        self, remote: Remote, credentials: Credentials, environ: Mapping[str, str], read_seconds: float
    ) -> None:
        """Set up the client, without sending anything.

        Args:
            remote: `oci://registry/name:tag`.
            credentials: with a Docker configuration; without one, that of this machine's user is used, if there is one.
            environ: names trusted certificates; httpx takes proxies from the process's environment.
            read_seconds: how long to wait for the next byte.

        Raises:
            ConfigurationError: the file of certificates does not exist.
            TransferRefused: the Docker configuration cannot be read.
        """
        self._remote = remote
        self._credentials = credentials
        self._registry, _, self._name = remote.root.partition("/")
        self._tag = str(remote.path)
        scheme = (
            "http" if self._registry.rpartition(":")[0] in LOOPBACK or self._registry in LOOPBACK else "https"
        )
        self._base = f"{scheme}://{self._registry}"
        self._login = login_of(self._registry, credentials, environ)
        self._authorization: str | None = None
        self._layers: dict[str, Blob] = {}
        certificates = ca_bundle(environ, "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
        self._client = httpx2.Client(
            timeout=httpx2.Timeout(read_seconds, connect=min(CONNECT_SECONDS, read_seconds)),
            verify=ssl.create_default_context(cafile=certificates) if certificates else True,
        )

    def upload(
        self,
        folder: Path,
        names: Sequence[str],
        check: Callable[[], None],
        on_bytes: Callable[[int], None],
        retrier: Retrier,
        under: str = "",
    ) -> str:
        """Send files as layers, and with those of the folder itself the manifest of all; the URI with its digest.

        Args:
            folder: of the files.
            names: of the files, without the manifest of the folder, which goes with them.
            check: called before the tag is set; what it raises ends the upload.
            on_bytes: called with the number of bytes that were sent, or were there.
            retrier: how long to continue without progress.
            under: what the names begin with, such as `exports/merged/`. Empty: these files are the last.
        """
        known = read_json(folder / MANIFEST)["files"]
        for name in [*names, MANIFEST]:
            path = folder / name
            blob = Blob(f"sha256:{known.get(name) or sha256(path)}", path.stat().st_size)
            self._send_blob(blob, name, partial(_read, path), on_bytes, retrier)
            self._layers[f"{under}{name}"] = blob
        if under:
            return self._remote.uri
        self._send_blob(blob_of(EMPTY), "config", lambda: iter([EMPTY]), lambda _: None, retrier)
        manifest = manifest_of(self._layers)
        digest = blob_of(manifest).digest
        if retrier.call(lambda: self._manifest(self._tag)) != manifest:
            check()
            headers = {"Content-Type": MANIFEST_TYPE}
            retrier.call(
                lambda: self._request("PUT", f"manifests/{self._tag}", headers=headers, content=manifest)
            )
            for reference in (digest, self._tag):
                if retrier.call(partial(self._manifest, reference)) != manifest:
                    raise TransferFailed(
                        f"{self._remote.uri}: the registry took the manifest {digest} and has another at {reference}"
                    )
        return f"{self._remote.uri}@{digest}"

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _manifest(self, reference: str) -> bytes | None:
        """The manifest of a tag or digest; None if there is none."""
        headers = {"Accept": MANIFEST_TYPE}
        answer = self._request("GET", f"manifests/{reference}", headers=headers, allowed=(404, 406))
        return answer.content if answer.status_code == 200 else None

    # --- blobs

    def _send_blob(
        self,
        blob: Blob,
        name: str,
        read: Callable[[], Iterator[bytes]],
        on_bytes: Callable[[int], None],
        retrier: Retrier,
    ) -> None:
        """Send a blob, unless the registry has it; `read` gives its bytes, anew for each try."""
        if (
            retrier.call(lambda: self._request("HEAD", f"blobs/{blob.digest}", allowed=(404,))).status_code
            == 200
        ):
            on_bytes(blob.size)
            return
        most = 0

        def send() -> None:
            nonlocal most

            def chunks() -> Iterator[bytes]:
                nonlocal most
                position = 0
                for chunk in read():
                    yield chunk
                    position += len(chunk)
                    if position > most:
                        on_bytes(position - most)
                        most = position
                        retrier.reset()

            upload = self._location(self._request("POST", "blobs/uploads/", headers={"Content-Length": "0"}))
            if blob.size:
                headers = {"Content-Type": LAYER_TYPE, "Content-Length": str(blob.size)}
                upload = self._location(self._request("PATCH", upload, headers=headers, content=chunks))
            address = httpx2.URL(upload).copy_merge_params({"digest": blob.digest})
            answer = self._request("PUT", str(address), headers={"Content-Length": "0"}, allowed=(400,))
            if answer.status_code == 400:
                raise TransferFailed(
                    f"{self._remote.uri}: the registry received other bytes of {name} than its manifest.json names"
                )

        retrier.call(send)

    def _location(self, answer: httpx2.Response) -> str:
        if "Location" not in answer.headers:
            raise TransientError(f"{self._remote.uri}: the answer of {self._registry} is not a registry's")
        base = httpx2.URL(self._base)
        target = base.join(answer.headers["Location"])
        if target.scheme != "https" and (target.scheme, target.netloc) != (base.scheme, base.netloc):
            # The login would follow, or the cluster's network be asked.
            raise TransferRefused(
                f"{self._remote.uri}: {self._registry} wants its uploads at {target.scheme}://{target.host}, without "
                "TLS; a registry behind a proxy must know that its own address begins with https://"
            )
        return str(target)

    # --- requests

    def _request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | Callable[[], Iterator[bytes]] | None = None,
        allowed: Sequence[int] = (),
    ) -> httpx2.Response:
        """The answer to a request, with a status below 400 or among `allowed`.

        Args:
            method: of HTTP.
            path: below the repository, or a whole address that the registry gave.
            headers: besides the one that authorizes.
            content: the body, or what makes it anew for each try.
            allowed: statuses that are answers, not errors.
        """
        url = path if path.startswith("http") else f"{self._base}/v2/{self._name}/{path}"
        # What the registry keeps elsewhere has an address that authorizes by itself.
        ours = httpx2.URL(url).netloc == httpx2.URL(self._base).netloc
        with self._translate_errors():
            for fresh in (False, True):
                sent = dict(headers or {})
                if ours and self._authorization is not None:
                    sent["Authorization"] = self._authorization
                body = content() if callable(content) else content
                answer = self._client.request(method, url, headers=sent, content=body)
                if answer.status_code != 401 or not ours or fresh:
                    break
                self._authorization = self._authorize(answer)
                if self._authorization is None:
                    break
        status = answer.status_code
        if status < 400 or status in allowed:
            return answer
        if status in RETRYABLE_STATUS:
            raise TransientError(
                f"{self._remote.uri}: HTTP {status}", retry_after(answer.headers.get("Retry-After"))
            )
        raise TransferRefused(f"{self._remote.uri}: HTTP {status}{_codes(answer)}: {self._advice(status)}")

    def _authorize(self, answer: httpx2.Response) -> str | None:
        """The header that a registry asks for; None where nothing is known that would do."""
        challenge = answer.headers.get("WWW-Authenticate", "")
        kind, _, rest = challenge.partition(" ")
        if kind.lower() == "basic":
            return None if self._login is None else f"Basic {self._login}"
        if kind.lower() != "bearer":
            return None
        asked = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        realm = httpx2.URL(asked.get("realm", ""))
        if realm.scheme != "https" and realm.host not in (*LOOPBACK, "::1"):
            raise TransferRefused(
                f"{self._remote.uri}: {self._registry} sends for its token to {realm.host or 'nowhere'} without TLS"
            )
        scope = f"repository:{self._name}:pull,push"
        query = {
            key: value for key, value in {"service": asked.get("service"), "scope": scope}.items() if value
        }
        headers = {} if self._login is None else {"Authorization": f"Basic {self._login}"}
        token = self._client.get(realm.copy_merge_params(query), headers=headers)
        if token.status_code in RETRYABLE_STATUS:
            raise TransientError(
                f"{realm.host}: HTTP {token.status_code}", retry_after(token.headers.get("Retry-After"))
            )
        if token.status_code != 200:
            raise TransferRefused(
                f"{self._remote.uri}: {realm.host} gives no token: HTTP {token.status_code}: {self._advice(401)}"
            )
        given: dict[str, Any] = token.json()
        found = given.get("token") or given.get("access_token")
        return f"Bearer {found}" if found else None

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn the library's errors into ours. They are not quoted where they hold addresses, which may be signed."""
        try:
            yield
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, AttributeError, TypeError) as error:
            if isinstance(error, httpx2.TransportError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise TransferRefused(
                    f"{self._remote.uri}: the certificate of {self._registry}, or of a proxy, is not signed by a "
                    "trusted authority; set SSL_CERT_FILE to a file of certificates to trust"
                ) from None
            if not isinstance(error, httpx2.TransportError):
                raise TransientError(
                    f"{self._remote.uri}: the answer of {self._registry} is not a registry's ({type(error).__name__})"
                ) from None
            text = first_line(error)
            detail = f" ({text})" if "://" not in text and text != type(error).__name__ else ""
            raise TransientError(
                f"{self._remote.uri}: {self._registry}: {type(error).__name__}{detail}"
            ) from None

    def _advice(self, status: int) -> str:
        """What is wrong with a request that was refused, and what would be right."""
        if status == 401 and self._login is None:
            return (
                f"{self._registry} wants a login: name a Secret of type kubernetes.io/dockerconfigjson with one for "
                f"{self._registry} in {self._credentials.field}"
            )
        if status == 401:
            return f"the login for {self._registry} in {self._credentials.field} is not valid"
        if status == 403:
            return f"the login in {self._credentials.field} may not push to {self._name}; grant it, or use another"
        if status == 404:
            return f"{self._registry} has no repository {self._name}, and makes none; create it first"
        if status == 413:
            return "the registry, or a proxy before it, limits the size of a layer; raise that limit"
        return "the registry refuses the request"


def login_of(registry: str, credentials: Credentials, environ: Mapping[str, str]) -> str | None:
    """base64 of `user:password` for a registry; None where there is none.

    Args:
        registry: host, with its port if it has one.
        credentials: a Secret with a Docker configuration, or none.
        environ: names the folder of this user's own Docker configuration.

    Raises:
        TransferRefused: the configuration is none.
    """
    text = credentials.values.get(DOCKER_CONFIG)
    where = f"the Secret named by {credentials.field}"
    if text is None:
        path = Path(environ.get("DOCKER_CONFIG") or Path(environ.get("HOME", "/")) / ".docker", "config.json")
        where = str(path)
        try:
            text = path.read_text()
        except OSError:
            return None
    try:
        known = json.loads(text).get("auths", {})
        names = (registry, f"https://{registry}", f"http://{registry}", f"https://{registry}/v1/")
        found = next((known[name] for name in names if name in known), None)
        if found is None:
            return None
        if "username" in found and "password" in found:
            return base64.b64encode(f"{found['username']}:{found['password']}".encode()).decode()
        login = found.get("auth") or ""
        return login if b":" in base64.b64decode(login, validate=True) else None
    except (ValueError, TypeError, AttributeError, binascii.Error):
        raise TransferRefused(
            f"{where} is no Docker configuration: it must be JSON with a login for {registry} in `auths`"
        ) from None


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(READ_BYTES):
            yield chunk


def _codes(answer: httpx2.Response) -> str:
    """The codes of a registry's error, such as ` (DENIED)`."""
    try:
        codes = [str(error["code"]) for error in answer.json()["errors"]]
    except (ValueError, TypeError, KeyError):
        return ""
    known = [code for code in codes if re.fullmatch("[A-Z_]{1,40}", code)]
    return f" ({', '.join(known)})" if known else ""
