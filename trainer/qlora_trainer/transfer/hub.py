"""The Hugging Face Hub, or what speaks its protocol at HF_ENDPOINT.

Listing and upload are huggingface_hub's. Bytes are read from its URLs directly: why its download does not do is said in
download.py. Xet is not used: it bypasses the proxy and the certificates that are set here.
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

from qlora_contract.job_folder import MANIFEST
from qlora_contract.remote import Remote, setting_of
from qlora_contract.units import first_line
from qlora_trainer.errors import ConfigurationError, TransferFailed, TransferRefused
from qlora_trainer.transfer.credentials import Credentials, ca_bundle
from qlora_trainer.transfer.remote_files import Digest, RemoteFile, Selection, list_down
from qlora_trainer.transfer.retry import (
    CONNECT_SECONDS,
    RETRYABLE_STATUS,
    Retrier,
    TransientError,
    retry_after,
)


def _remote_file(entry: RepoFile) -> RemoteFile:
    """A file of a listing; large ones are kept apart from git, by their sha256."""
    if entry.lfs is not None:
        return RemoteFile(entry.path, entry.lfs.size, Digest("sha256", entry.lfs.sha256))
    return RemoteFile(entry.path, entry.size, Digest("git-sha1", entry.blob_id))


class Hub:
    """A repository of the Hub."""

    def __init__(
        self, remote: Remote, credentials: Credentials, environ: Mapping[str, str], read_seconds: float
    ) -> None:
        """Set up the client, without sending anything.

        Args:
            remote: the repository.
            credentials: with the key `token`; without one, HF_TOKEN or the login on this machine is used.
            environ: names the endpoint and trusted certificates; httpx takes proxies from the process's environment.
            read_seconds: how long to wait for the next byte.

        Raises:
            ConfigurationError: HF_ENDPOINT is not a URL, or the file of certificates does not exist.
            TransferRefused: huggingface_hub is set to stay offline.
        """
        self._remote = remote
        self._credentials = credentials
        self._token = credentials.values.get("token") or get_token()
        self._endpoint = environ.get("HF_ENDPOINT") or constants.ENDPOINT
        self._api = HfApi(endpoint=self._endpoint, token=self._token)
        self._repo_type = "dataset" if remote.kind == "dataset" else "model"
        if is_offline_mode():
            raise TransferRefused(f"{remote.uri} cannot be fetched while HF_HUB_OFFLINE is set; unset it")
        if not re.match(r"https?://[^/]+", self._endpoint):
            raise ConfigurationError(
                f"HF_ENDPOINT is {self._endpoint!r}; it must be http://HOST or https://HOST"
            )
        _configure(ca_bundle(environ, "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), read_seconds)

    # --- a source

    def list_files(self, revision: str, select: Selection) -> tuple[str, list[RemoteFile]]:
        """(the commit of a branch, tag or commit, its selected files)."""
        path = self._remote.path
        folder = path.parent if path.suffix else path  # of a path that names a file, its folder
        with self._translate_errors():
            info = self._api.repo_info(self._remote.root, repo_type=self._repo_type, revision=revision)
            if info.sha is None:
                raise TransferFailed(f"{self._remote.uri}: the Hub does not say which commit {revision} is")
            commit = info.sha

            def list_folder(path: str) -> tuple[list[RemoteFile], list[str]]:
                entries = self._api.list_repo_tree(
                    self._remote.root, path or None, revision=commit, repo_type=self._repo_type
                )
                files, folders = [], []
                for entry in entries:
                    if isinstance(entry, RepoFile):
                        files.append(_remote_file(entry))
                    else:
                        folders.append(entry.path)
                return files, folders

            start = str(folder) if folder.parts else ""
            is_dataset = self._remote.kind == "dataset"
            files = list_down(list_folder, start) if is_dataset else list_folder(start)[0]
        return commit, select(files)

    def read(self, revision: str, file: RemoteFile, offset: int) -> Generator[bytes]:
        """The bytes of a file from an offset on, also from a server that ignores ranges."""
        url = hf_hub_url(
            self._remote.root,
            file.name,
            repo_type=self._repo_type,
            revision=revision,
            endpoint=self._endpoint,
        )
        # Compressed bytes could be neither counted nor resumed.
        headers = {"Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with (
            self._translate_errors(file.name),
            get_session().stream("GET", url, headers=headers) as response,
        ):
            if response.status_code >= 400:
                raise self._status_error(response.status_code, response.headers, file.name)
            skip = offset if response.status_code == 200 else 0  # it sends the whole file
            for chunk in response.iter_raw():  # as it arrives, so that a break loses nothing
                if wanted := chunk[skip:]:
                    yield wanted
                skip = max(0, skip - len(chunk))

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
        """Commit files to the repository, which is created private if need be, and return the URI of the commit.

        Files that are there already are not sent again; when all are, there is no new commit.

        Args:
            folder: of the files.
            names: of the files, without the manifest, which goes with them.
            check: called before the commit; what it raises ends the upload.
            on_bytes: called with the number of bytes that were sent.
            retrier: how long to continue without progress.
            under: what the names begin with there, such as `exports/merged/`.
        """
        names = [*names, MANIFEST]
        repository = self._remote.root

        def commit() -> str:
            with self._translate_errors():
                self._api.create_repo(repository, private=True, exist_ok=True)
                # New for each attempt: they remember what the Hub had.
                files = [CommitOperationAdd(f"{under}{name}", folder / name) for name in names]
                self._api.preupload_lfs_files(repository, files)
                check()
                made = self._api.create_commit(repository, files, commit_message="Adapter by qlora-operator")
                return str(made.oid)

        oid = retrier.call(commit)
        on_bytes(sum((folder / name).stat().st_size for name in names))
        return f"hf://{repository}@{oid}"

    # --- errors

    @contextmanager
    def _translate_errors(self, name: str = "") -> Iterator[None]:
        """Turn the library's errors into ours. They are not quoted: they hold URLs, which may be signed."""
        try:
            yield
        except (httpx2.HTTPError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise self._classify(error, name) from None

    def _classify(self, error: BaseException, name: str) -> Exception:
        if isinstance(error, RuntimeError) and error.__cause__ is not None:  # an upload's, by huggingface_hub
            return self._classify(error.__cause__, name)
        if isinstance(error, HfHubHTTPError):
            return self._status_error(error.response.status_code, error.response.headers, name)
        if isinstance(error, ValueError) and isinstance(error.__cause__, HfHubHTTPError):
            # The Hub's check of the card, whose words huggingface_hub has taken out of the answer.
            return TransferRefused(f"{self._remote.uri}: {' '.join(str(error).split())}")
        host = httpx2.URL(self._endpoint).host
        if not isinstance(error, httpx2.TransportError | httpx2.StreamError):
            return TransientError(
                f"{self._remote.uri}: the answer of {host} is not a Hub's ({type(error).__name__})"
            )
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return TransferRefused(
                f"{self._remote.uri}: the certificate of {host}, or of a proxy, is not signed by a trusted authority; "
                "set SSL_CERT_FILE to a file of certificates to trust"
            )
        text = first_line(error)
        detail = f" ({text})" if "://" not in text and text != type(error).__name__ else ""
        return TransientError(f"{self._remote.uri}: {host}: {type(error).__name__}{detail}")

    def _status_error(self, status: int, headers: Mapping[str, str], name: str) -> Exception:
        what = f"{name} of {self._remote.uri}" if name else self._remote.uri
        if status in RETRYABLE_STATUS:
            return TransientError(f"{what}: HTTP {status}", retry_after(headers.get("Retry-After")))
        return TransferRefused(
            f"{what}: HTTP {status}: {self._advice(status, headers.get('X-Error-Code', ''))}"
        )

    def _advice(self, status: int, code: str) -> str:
        """What is wrong with a request that was refused, and what would be right."""
        field, repository = self._credentials.field, self._remote.root
        if code == "GatedRepo":
            return (
                f"{repository} is gated; accept its terms at {self._endpoint}/{repository} with the account that the "
                f"token in {field} belongs to"
            )
        if code == "RevisionNotFound":
            field = setting_of(self._credentials.owner, "revision")
            return f"{repository} has no such revision; {field} names a branch, tag or commit"
        if code == "EntryNotFound":
            return f"{repository} has no such file or folder"
        if status == 401 and self._token:
            return f"the token in {field} is not valid; create a new one"
        if status in (401, 404):
            return f"{repository} does not exist, or is private and needs a token with read access in {field}"
        if status == 403:
            return f"the token in {field} lacks the permission for this; grant it, or use another token"
        return "the Hub refuses the request"


def _configure(certificates: str | None, read_seconds: float) -> None:
    """Set time-outs and certificates for all requests of huggingface_hub; no progress bars, no URLs in the log."""
    verify = ssl.create_default_context(cafile=certificates) if certificates else True

    def client() -> httpx2.Client:
        timeout = httpx2.Timeout(read_seconds, connect=min(CONNECT_SECONDS, read_seconds))
        return httpx2.Client(follow_redirects=True, timeout=timeout, verify=verify)

    set_client_factory(client)
    constants.HF_HUB_DISABLE_XET = True
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
