"""The grammar of sources and destinations, and where those of `hf://` and `s3://` lie once they are fetched."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from qlora_contract.paths import InvalidUriError

SOURCES = "sources"
"""Folder of a workspace that holds what was fetched; shared by its jobs."""

HUB_NAME = r"[A-Za-z0-9]([-A-Za-z0-9._]{0,94}[A-Za-z0-9])?"
"""An organization, or a repository, of the Hub."""
BUCKET = r"[a-z0-9][-a-z0-9.]{1,61}[a-z0-9]"
PATH = r"(/[^/\x00-\x1f\x7f]+)*/?"
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
DATASET_PATTERN = f"^({_PVC_FORM}|hf://datasets/{_HUB_FORM}{PATH}|{_S3_FORM})$"
DESTINATION_PATTERN = f"^(hf://{_HUB_FORM}/?|{_S3_FORM}|oci://{REGISTRY}/{REPOSITORY}:{TAG})$"
SECRET_PATTERN = "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"  # noqa: S105 - the name of one
REVISION_PATTERN = "^[A-Za-z0-9][-A-Za-z0-9._/]*$"

_HUB_DATASET = re.compile(rf"hf://datasets/(?P<root>{HUB_NAME}/{HUB_NAME})(?P<path>{PATH})")
_HUB_MODEL = re.compile(rf"hf://(?P<root>{HUB_NAME}/{HUB_NAME})/?")
_S3 = re.compile(rf"s3://(?P<root>{BUCKET})(?P<path>{PATH})")

_OCI = re.compile(rf"oci://(?P<root>{REGISTRY}/{REPOSITORY}):(?P<tag>{TAG})")

Kind = Literal["model", "dataset", "bucket", "artifact"]


@dataclass(frozen=True)
class Remote:
    """What a remote URI names."""

    uri: str
    kind: Kind
    """A model or a dataset of the Hub, a bucket of S3, or an artifact of an OCI registry."""
    root: str
    """`org/name` of the Hub, the bucket, or `registry/name`."""
    path: PurePosixPath
    """Within it; `.` for all of it. Of an artifact: the tag."""

    @property
    def cache_folder(self) -> str:
        """Folder, within SOURCES, that holds a folder for each of its revisions."""
        return {"model": "hf", "dataset": "hf/datasets", "bucket": "s3"}[self.kind] + f"/{self.root}"


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
    if found := _OCI.fullmatch(uri):
        return Remote(uri, "artifact", found["root"], PurePosixPath(found["tag"]))
    raise InvalidUriError(
        f"{uri!r} is not of the form hf://org/name, hf://datasets/org/name, s3://bucket/path or oci://registry/name:tag"
    )


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
