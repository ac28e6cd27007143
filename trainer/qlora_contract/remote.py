"""The grammar of sources and destinations, and where remote sources lie once they are fetched."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, Protocol

from qlora_contract.paths import InvalidUriError

SOURCES = "sources"
"""Folder of a workspace that holds what was fetched; shared by its jobs."""

HUB_NAME = r"[A-Za-z0-9]([-A-Za-z0-9._]{0,94}[A-Za-z0-9])?"
"""An organization, or a repository, of the Hub."""
BUCKET = r"[a-z0-9][-a-z0-9.]{1,61}[a-z0-9]"
PATH = r"(/[^/\x00-\x1f\x7f]+)*/?"
HOST = r"[A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?(:[0-9]{1,5})?"
WEB_PATH = r"(/[-A-Za-z0-9._~%!$&'()*+,;=:@]+)+"
"""Of a file: neither a query nor a fragment, which may hold credentials."""
CLAIM = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"

REGISTRY = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?(:[0-9]{1,5})?"
REPOSITORY = r"[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
TAG = "[A-Za-z0-9_][-A-Za-z0-9._]{0,127}"

_PVC_FORM = f"pvc://{CLAIM}{PATH}"
_HUB_FORM = f"{HUB_NAME}/{HUB_NAME}"
_S3_FORM = f"s3://{BUCKET}{PATH}"

MIN_URI, MAX_URI = 6, 512
"""Characters."""
PVC_PATTERN = f"^({_PVC_FORM})$"
MODEL_PATTERN = f"^({_PVC_FORM}|hf://{_HUB_FORM}/?|{_S3_FORM})$"
DATASET_PATTERN = f"^({_PVC_FORM}|hf://datasets/{_HUB_FORM}{PATH}|{_S3_FORM}|https://{HOST}{WEB_PATH})$"
DESTINATION_PATTERN = f"^(hf://{_HUB_FORM}/?|{_S3_FORM}|oci://{REGISTRY}/{REPOSITORY}:{TAG})$"
SECRET_PATTERN = "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"  # noqa: S105 - the name of one
REVISION_PATTERN = "^[A-Za-z0-9][-A-Za-z0-9._/]*$"

_HUB_DATASET = re.compile(rf"hf://datasets/(?P<root>{HUB_NAME}/{HUB_NAME})(?P<path>{PATH})")
_HUB_MODEL = re.compile(rf"hf://(?P<root>{HUB_NAME}/{HUB_NAME})/?")
_S3 = re.compile(rf"s3://(?P<root>{BUCKET})(?P<path>{PATH})")

_WEB = re.compile(rf"https://(?P<root>{HOST})(?P<path>{WEB_PATH})")
_OCI = re.compile(rf"oci://(?P<root>{REGISTRY}/{REPOSITORY}):(?P<tag>{TAG})")

WEB, OCI = "https://", "oci://"
SERVERS = (WEB, OCI)
"""How what names a server of its own begins: a job could ask whatever the cluster's network reaches, unless the
administrator names the servers."""

Kind = Literal["model", "dataset", "bucket", "web", "artifact"]


@dataclass(frozen=True)
class Remote:
    """What a remote URI names."""

    uri: str
    kind: Kind
    """A model or a dataset of the Hub, a bucket of S3, a file of a web server, or an artifact of an OCI registry."""
    root: str
    """`org/name` of the Hub, the bucket, the server with its port, or `registry/name`."""
    path: PurePosixPath
    """Within it; `.` for all of it. Of an artifact: the tag."""

    @property
    def cache_folder(self) -> str:
        """Folder, within SOURCES, that holds a folder for each of its revisions."""
        folder = {"model": "hf", "dataset": "hf/datasets", "bucket": "s3", "web": "https"}[self.kind]
        return f"{folder}/{self.root}"


class Source(Protocol):
    """What a job reads, in the API's form or the wire's."""

    @property
    def source(self) -> str:
        """Its URI."""

    @property
    def revision(self) -> str:
        """Of the Hub."""

    @property
    def credentials_secret(self) -> str | None:
        """Name of the Secret to fetch it with."""


INITIAL_ADAPTER = "adapter.initialAdapter"
"""The field of a job that names what its adapter starts as."""

Role = Literal["model", "dataset", "adapter"]
"""What a source is read as."""


@dataclass(frozen=True)
class NamedSource:
    """One of the sources that a job reads."""

    field: str
    """Of the job: `model`, `dataset`, `dataset.sources[2]` or INITIAL_ADAPTER."""
    role: Role
    number: int | None
    """In dataset.sources; None for the others."""
    uri: str
    revision: str
    """As the job asks for it."""
    credentials_secret: str | None

    @property
    def uri_field(self) -> str:
        """The field of the job that holds the URI."""
        return self.field if self.role == "adapter" else f"{self.field}.source"


def setting_of(field: str, setting: str) -> str:
    """The field of a job with a setting of what `field` names, as NamedSource has that: `model.revision`,
    `adapter.initialAdapterRevision`."""
    beside = field == INITIAL_ADAPTER
    return f"{field}{setting[0].upper()}{setting[1:]}" if beside else f"{field}.{setting}"


class Continued(Protocol):
    """The adapter of a job, as far as it starts as another, in the API's form or the wire's."""

    @property
    def initial_adapter(self) -> str | None:
        """The other's URI."""

    @property
    def initial_adapter_revision(self) -> str | None:
        """Of the Hub; None: main."""

    @property
    def initial_adapter_credentials_secret(self) -> str | None:
        """Name of the Secret to fetch it with."""


def named_sources(
    model: Source, data: Sequence[Source], adapter: Continued, *, listed: bool
) -> list[NamedSource]:
    """The sources of a job: the model, the data, the initial adapter. `listed`: whether the data are given as
    dataset.sources."""
    numbered = [("model", None, model)] + [
        (f"dataset.sources[{number}]", number, each) if listed else ("dataset", None, each)
        for number, each in enumerate(data)
    ]
    found = [
        NamedSource(
            field=field,
            role="model" if field == "model" else "dataset",
            number=number,
            uri=each.source,
            revision=each.revision,
            credentials_secret=each.credentials_secret,
        )
        for field, number, each in numbered
    ]
    if adapter.initial_adapter is not None:
        found.append(
            NamedSource(
                field=INITIAL_ADAPTER,
                role="adapter",
                number=None,
                uri=adapter.initial_adapter,
                revision=adapter.initial_adapter_revision or "main",
                credentials_secret=adapter.initial_adapter_credentials_secret,
            )
        )
    return found


def is_remote(uri: str) -> bool:
    """Whether it must be fetched, or sent, rather than mounted."""
    return not uri.startswith("pvc://")


def parse_remote(uri: str) -> Remote:
    """The parts of a remote URI. Raises InvalidUriError."""
    if found := _HUB_DATASET.fullmatch(uri):
        return Remote(uri, "dataset", found["root"], _relative(uri, found["path"]))
    if found := _S3.fullmatch(uri):
        return Remote(uri, "bucket", found["root"], _relative(uri, found["path"]))
    if found := _HUB_MODEL.fullmatch(uri):
        return Remote(uri, "model", found["root"], PurePosixPath())
    if found := _WEB.fullmatch(uri):
        return Remote(uri, "web", found["root"], _relative(uri, found["path"]))
    if found := _OCI.fullmatch(uri):
        return Remote(uri, "artifact", found["root"], PurePosixPath(found["tag"]))
    raise InvalidUriError(
        f"{uri!r} is not of the form hf://org/name, hf://datasets/org/name, s3://bucket/path, https://host/path or "
        "oci://registry/name:tag"
    )


def fits(text: str, pattern: str) -> bool:
    """Whether a pattern matches the whole text. `*` in it stands for any characters, or none; all else for itself."""
    return re.fullmatch(".*".join(re.escape(part) for part in pattern.split("*")), text) is not None


def source_allowed(uri: str, patterns: Sequence[str]) -> bool:
    """Whether patterns of allowed sources allow a source or destination: a server only those that begin as it does."""
    scheme = next((scheme for scheme in SERVERS if uri.startswith(scheme)), "")
    return any(fits(uri, pattern) for pattern in patterns if pattern.startswith(scheme))


def _relative(uri: str, path: str) -> PurePosixPath:
    relative = PurePosixPath(path.strip("/"))
    if ".." in relative.parts:
        raise InvalidUriError(f"{uri!r} leads out of its repository or bucket")
    return relative


def fetched_uri(workspace: str, remote: Remote, revision: str) -> str:
    """`pvc://` URI of what a remote URI names, once this revision of it was fetched into the workspace.

    Args:
        workspace: spec.workspace.
        remote: the source.
        revision: as the fetch found it: a commit of the Hub, or a hash over a bucket's listing.
    """
    path = PurePosixPath(SOURCES, remote.cache_folder, revision, remote.path)
    return f"{workspace.rstrip('/')}/{path}"
