"""The Hugging Face Hub, or what speaks its protocol at HF_ENDPOINT.

Listing and upload are huggingface_hub's. Bytes are read from its URLs directly: its own download checks no hash,
and resumes only within its cache. Xet is not used: it goes past the proxy and the certificates that are set here.
"""

import logging
import re
import ssl
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    RepoFile,
    constants,
    get_session,
    get_token,
    hf_hub_url,
    is_offline_mode,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.tqdm import disable_progress_bars

from qlora_contract.remote import Remote
from qlora_trainer.errors import ConfigurationError, TransferFailed, TransferRefused
from qlora_trainer.remote.credentials import Credentials, ca_bundle
from qlora_trainer.remote.files import Choose, Digest, RemoteFile
from qlora_trainer.remote.patience import Interrupted, Patience, retry_after

CONNECT_SECONDS = 20.0
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that may be others a moment later."""


class Hub:
    """A repository of the Hub."""

    def __init__(
        self, remote: Remote, credentials: Credentials, environ: Mapping[str, str], read_seconds: float
    ) -> None:
        """Say which repository, and what to show.

        Args:
            remote: the repository.
            credentials: with the key `token`, or nothing: then HF_TOKEN, or who logged in on this machine.
            environ: names the endpoint, and certificates to trust; httpx reads the proxies from its process's own.
            read_seconds: how long to wait for the next byte.

        Raises:
            ConfigurationError: HF_ENDPOINT is no address, or there is no such file of certificates.
            TransferRefused: huggingface_hub was told to stay offline.
        """
        self._remote = remote
        self._credentials = credentials
        self._token = credentials.values.get("token") or get_token()
        self._endpoint = environ.get("HF_ENDPOINT") or constants.ENDPOINT
        self._api = HfApi(endpoint=self._endpoint, token=self._token)
        if is_offline_mode():
            raise TransferRefused(f"{remote.uri} is not asked for: HF_HUB_OFFLINE is set; unset it")
        if not re.match(r"https?://[^/]+", self._endpoint):
            raise ConfigurationError(
                f"HF_ENDPOINT is {self._endpoint!r}; it must be http://HOST or https://HOST"
            )
        _configure(ca_bundle(environ, "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), read_seconds)

    # --- a source

    def listing(self, revision: str, choose: Choose) -> tuple[str, list[RemoteFile]]:
        """The commit of a branch, tag or commit, and the files of it that are chosen."""
        with self._asking():
            info = self._api.repo_info(self._remote.root, repo_type=self._kind, revision=revision)
            if info.sha is None:
                raise TransferFailed(f"{self._remote.uri}: the Hub does not say which commit {revision} is")
            entries = list(
                self._api.list_repo_tree(
                    self._remote.root, self._folder(), revision=info.sha, repo_type=self._kind
                )
            )
        return info.sha, choose([_file(entry) for entry in entries if isinstance(entry, RepoFile)])

    def _folder(self) -> str | None:
        """The folder to list: the parent, for a path that names a file."""
        path = self._remote.path
        folder = path.parent if path.suffix else path
        return str(folder) if folder.parts else None

    @property
    def _kind(self) -> str:
        return "dataset" if self._remote.kind == "dataset" else "model"

    def read(self, revision: str, file: RemoteFile, offset: int) -> Generator[bytes]:
        """A file's bytes from an offset on."""
        url = hf_hub_url(
            self._remote.root,
            file.name,
            repo_type=self._kind,
            revision=revision,
            endpoint=self._endpoint,
        )
        # Compressed bytes could neither be counted nor resumed.
        headers = {"Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with self._asking(file.name), get_session().stream("GET", url, headers=headers) as response:
            if response.status_code >= 400:
                raise self._judge(response.status_code, response.headers, file.name)
            skip = offset if response.status_code == 200 else 0  # it sends all, whatever it was asked
            for chunk in response.iter_raw():  # as it comes: nothing is lost when it breaks off
                if wanted := chunk[skip:]:
                    yield wanted
                skip = max(0, skip - len(chunk))

    # --- a destination

    def send(
        self,
        folder: Path,
        names: Sequence[str],
        check: Callable[[], None],
        sent: Callable[[int], None],
        patience: Patience,
    ) -> str:
        """Put files there as one commit, into a new private repository if there is none; the URI of that commit.

        What is there already is not sent again: the same files twice are one commit.

        Args:
            folder: of the files.
            names: theirs.
            check: called before the commit; may raise.
            sent: called with the number of bytes that were sent.
            patience: how long to insist.
        """

        def commit() -> str:
            with self._asking():
                return self._commit(folder, names, check)

        oid = patience.insist(commit)
        sent(sum((folder / name).stat().st_size for name in names))
        return f"hf://{self._remote.root}@{oid}"

    def _commit(self, folder: Path, names: Sequence[str], check: Callable[[], None]) -> str:
        repository = self._remote.root
        self._api.create_repo(repository, private=True, exist_ok=True)
        # New for every try: they remember what the Hub had.
        files = [CommitOperationAdd(name, folder / name) for name in names]
        self._api.preupload_lfs_files(repository, files)
        check()
        return str(self._api.create_commit(repository, files, commit_message="Adapter by qlora-operator").oid)

    # --- errors

    @contextmanager
    def _asking(self, name: str = "") -> Iterator[None]:
        """Turn the library's errors into ours. None of them is quoted: they hold URLs, which may be signed."""
        try:
            yield
        except (httpx2.HTTPError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise self._translate(error, name) from None

    def _translate(self, error: BaseException, name: str) -> Exception:
        if isinstance(error, RuntimeError) and error.__cause__ is not None:  # huggingface_hub's, of an upload
            return self._translate(error.__cause__, name)
        if isinstance(error, HfHubHTTPError):
            return self._judge(error.response.status_code, error.response.headers, name)
        if isinstance(error, httpx2.TransportError | httpx2.StreamError):
            return self._broken(error)
        return Interrupted(f"{self._remote.uri}: no answer of a Hub at {self._host}: {type(error).__name__}")

    @property
    def _host(self) -> str:
        return httpx2.URL(self._endpoint).host

    def _broken(self, error: Exception) -> Exception:
        """A connection that was not made, or broke."""
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return TransferRefused(
                f"{self._remote.uri}: the certificate of {self._host}, or of a proxy, is signed by nobody that is "
                "trusted here; name the file of certificates to trust in SSL_CERT_FILE"
            )
        return Interrupted(f"{self._remote.uri}: {self._host}: {_plain(error)}")

    def _judge(self, status: int, headers: Mapping[str, str], name: str) -> Exception:
        """What an HTTP status means for us."""
        what = f"{name} of {self._remote.uri}" if name else self._remote.uri
        if status in PASSING:
            return Interrupted(f"{what}: HTTP {status}", retry_after(headers.get("Retry-After")))
        return TransferRefused(
            f"{what}: HTTP {status}: {self._advice(status, headers.get('X-Error-Code', ''))}"
        )

    def _advice(self, status: int, code: str) -> str:
        field, repository = self._credentials.field, self._remote.root
        if code == "GatedRepo":
            return (
                f"{repository} is gated: accept its terms at {self._endpoint}/{repository} with the account "
                f"whose token {field} holds"
            )
        if code == "RevisionNotFound":
            return f"{repository} has no such revision; {self._credentials.role}.revision names a branch, tag or commit"
        if code == "EntryNotFound":
            return f"{repository} has no such file or folder"
        if status == 401 and self._token:
            return f"the token of {field} is not valid; make a new one"
        if status in (401, 404):
            return (
                f"there is no {repository}, or it is private and needs a token that may read it, by {field}"
            )
        if status == 403:
            return f"the token of {field} may not do this; give it the permission, or use another"
        return "the Hub refuses it"


def _configure(certificates: str | None, read_seconds: float) -> None:
    """Time-outs and certificates for all requests of huggingface_hub; no bars, and no URLs in the log."""
    verify = ssl.create_default_context(cafile=certificates) if certificates else True

    def client() -> httpx2.Client:
        timeout = httpx2.Timeout(read_seconds, connect=min(CONNECT_SECONDS, read_seconds))
        return httpx2.Client(follow_redirects=True, timeout=timeout, verify=verify)

    set_client_factory(client)
    constants.HF_HUB_DISABLE_XET = True
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _file(entry: RepoFile) -> RemoteFile:
    if entry.lfs is not None:
        return RemoteFile(entry.path, entry.lfs.size, Digest("sha256", entry.lfs.sha256))
    return RemoteFile(entry.path, entry.size, Digest("git-sha1", entry.blob_id))


def _plain(error: Exception) -> str:
    """An error of the connection in words, without a URL."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}" + (f" ({text[0]})" if text and "://" not in text[0] else "")
