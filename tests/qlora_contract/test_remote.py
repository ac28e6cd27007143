"""Remote URIs: what they name, and where their files lie once fetched."""

import re
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.paths import InvalidUriError, resolve
from qlora_contract.remote import (
    BUCKET,
    DATASET_PATTERN,
    DESTINATION_PATTERN,
    HUB_NAME,
    MODEL_PATTERN,
    PATH,
    SOURCES,
    Remote,
    fetched_uri,
    is_remote,
    parse_remote,
)

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
WORKSPACE = "pvc://team/work"

NAMED = {
    "a model": ("hf://org/Name-1.5_b", "model", "org/Name-1.5_b", "."),
    "a model, with a slash": ("hf://org/name/", "model", "org/name", "."),
    "a dataset": ("hf://datasets/org/name", "dataset", "org/name", "."),
    "a folder of a dataset": ("hf://datasets/org/name/data/v1/", "dataset", "org/name", "data/v1"),
    "a file of a dataset": ("hf://datasets/org/name/train.jsonl", "dataset", "org/name", "train.jsonl"),
    "a bucket": ("s3://bucket", "bucket", "bucket", "."),
    "a bucket, with a slash": ("s3://bucket/", "bucket", "bucket", "."),
    "a folder of a bucket": ("s3://my.bucket-1/a b/c", "bucket", "my.bucket-1", "a b/c"),
    "a file of a web server": ("https://a.example/x/d.jsonl", "web", "a.example", "x/d.jsonl"),
    "a file of a web server's port": (
        "https://a.example:8443/d%20e.csv",
        "web",
        "a.example:8443",
        "d%20e.csv",
    ),
    "an artifact": (
        "oci://registry.example:5000/team/a-b_c.d:v1.0",
        "artifact",
        "registry.example:5000/team/a-b_c.d",
        "v1.0",
    ),
    "two dots within a name": ("s3://bucket/a..b/..c", "bucket", "bucket", "a..b/..c"),
}


@pytest.mark.parametrize(("uri", "kind", "root", "path"), NAMED.values(), ids=NAMED)
def test_what_a_remote_uri_names(uri: str, kind: str, root: str, path: str) -> None:
    """Its kind, its repository or bucket, and the path within."""
    remote = parse_remote(uri)

    assert (remote.uri, remote.kind, remote.root) == (uri, kind, root)
    assert remote.path == PurePosixPath(path)
    assert is_remote(uri)


REFUSED = {
    "a claim": "pvc://team/model",
    "nothing": "",
    "no scheme": "org/name",
    "a scheme alone": "hf://",
    "a model without an organisation": "hf://gpt2",
    "a file of a model": "hf://org/name/config.json",
    "a dataset without a name": "hf://datasets",
    "the web without encryption": "http://hub.example/data.jsonl",
    "the web without a file": "https://hub.example",
    "the web with a folder": "https://hub.example/data/",
    "the web with a password": "https://user:word@hub.example/data.jsonl",
    "the web with a password of digits": "https://user:123@hub.example/data.jsonl",
    "the web with a query": "https://hub.example/data.jsonl?token=x",
    "the node": "file:///etc/shadow",
    "a name in the bucket's place": "s3://Bucket/x",
    "a bucket of two letters": "s3://ab",
    "credentials in the URI": "s3://key:secret@bucket/x",
    "another port": "hf://org:443/name",
    "a scheme in capitals": "S3://bucket/x",
    "two slashes": "s3://bucket/a//b",
    "a line break": "s3://bucket/a\nb",
    "a line break at the end": "hf://org/name\n",
    "a null character": "s3://bucket/a\0",
    "a name that is a path": "hf://../name",
    "an artifact without a tag": "oci://registry.example/team/adapter",
    "an artifact by its digest": f"oci://registry.example/team/adapter@sha256:{'0' * 64}",
    "an artifact without a registry": "oci:///team/adapter:v1",
    "an artifact of a name in capitals": "oci://registry.example/Team/adapter:v1",
    "a login in the address of a registry": "oci://user:password@registry.example/team:v1",
    "an artifact that leads upwards": "oci://registry.example/../adapter:v1",
    "a name that is hidden": "hf://org/.git",
}


@pytest.mark.parametrize("uri", REFUSED.values(), ids=REFUSED)
def test_another_uri_is_refused_with_the_forms_that_are_right(uri: str) -> None:
    """What is no remote URI is never guessed at."""
    with pytest.raises(
        InvalidUriError,
        match="is not of the form hf://org/name, hf://datasets/org/name, s3://bucket/path, https://host/path or oci",
    ):
        parse_remote(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/..",
        "s3://bucket/a/../../b",
        "hf://datasets/org/name/../other",
        "hf://datasets/org/name/..",
    ],
)
def test_a_path_that_leaves_its_repository_is_refused(uri: str) -> None:
    """A path has no `..`, even where it would lead back."""
    with pytest.raises(InvalidUriError, match="leads out of its repository or bucket"):
        parse_remote(uri)


@pytest.mark.parametrize(
    ("uri", "remote"), [("pvc://team/x", False), ("hf://org/name", True), ("s3://bucket", True)]
)
def test_only_claims_are_not_remote(uri: str, remote: bool) -> None:
    """What is not mounted is fetched."""
    assert is_remote(uri) is remote


PLACES = {
    "hf://org/name": f"sources/hf/org/name/{COMMIT}",
    "hf://datasets/org/name": f"sources/hf/datasets/org/name/{COMMIT}",
    "hf://datasets/org/name/data/train.jsonl": f"sources/hf/datasets/org/name/{COMMIT}/data/train.jsonl",
    "s3://bucket/a/b/": f"sources/s3/bucket/{COMMIT}/a/b",
    "s3://bucket": f"sources/s3/bucket/{COMMIT}",
}


@pytest.mark.parametrize(("uri", "path"), PLACES.items(), ids=PLACES)
@pytest.mark.parametrize("workspace", [WORKSPACE, f"{WORKSPACE}/", "pvc://team"])
def test_where_a_source_lies_once_fetched(uri: str, path: str, workspace: str) -> None:
    """In a folder of its revision, which the jobs of a workspace share."""
    assert fetched_uri(workspace, parse_remote(uri), COMMIT) == f"{workspace.rstrip('/')}/{path}"


def test_a_model_and_a_dataset_of_one_name_are_apart() -> None:
    """The Hub has both under the same name; an organisation called `datasets` has neither's folder."""
    uris = ("hf://datasets/name", "hf://datasets/org/name", "hf://org/name", "s3://datasets/org/name")

    assert len({fetched_uri(WORKSPACE, parse_remote(uri), COMMIT) for uri in uris}) == len(uris)


# --- whatever the URI


hub_names = st.from_regex(rf"\A{HUB_NAME}\Z")
buckets = st.from_regex(rf"\A{BUCKET}\Z")
paths = st.from_regex(rf"\A{PATH}\Z")
remotes = (
    st.builds("hf://{}/{}".format, hub_names, hub_names)
    | st.builds("hf://datasets/{}/{}{}".format, hub_names, hub_names, paths)
    | st.builds("s3://{}{}".format, buckets, paths)
)
revisions = st.from_regex(r"\A[0-9a-f]{40,64}\Z")


def parsed(uri: str) -> Remote | None:
    """What it names; None when it is refused."""
    try:
        return parse_remote(uri)
    except InvalidUriError:
        return None


@given(remotes, revisions)
def test_what_is_fetched_stays_in_the_workspace(uri: str, revision: str) -> None:
    """Every URI is refused, or has its place below the revision's own folder in `sources`."""
    remote = parsed(uri)
    if remote is None:
        assert ".." in uri.split("/")
        return
    place = resolve(fetched_uri(WORKSPACE, remote, revision), {"team": Path("/claim")})

    cached = Path("/claim/work", SOURCES, remote.cache_folder, revision)
    assert place.is_relative_to(cached)
    assert place.relative_to(cached).as_posix() == remote.path.as_posix()


@given(remotes)
def test_the_parts_make_the_uri_again(uri: str) -> None:
    """Nothing of a URI gets lost but slashes and single dots that mean nothing."""
    remote = parsed(uri)
    if remote is None:
        return
    start = {"model": "hf://", "dataset": "hf://datasets/", "bucket": "s3://", "web": "https://"}[remote.kind]
    again = parse_remote(
        f"{start}{remote.root}" + ("" if remote.path == PurePosixPath() else f"/{remote.path}")
    )

    assert (again.kind, again.root, again.path) == (remote.kind, remote.root, remote.path)


@given(remotes, remotes, revisions, revisions)
def test_other_sources_have_other_places(first: str, second: str, one: str, other: str) -> None:
    """Two sources share a place only when they are the same revision of the same thing."""
    a, b = parsed(first), parsed(second)
    if a is None or b is None:
        return
    same = (a.kind, a.root, a.path, one) == (b.kind, b.root, b.path, other)

    assert (fetched_uri(WORKSPACE, a, one) == fetched_uri(WORKSPACE, b, other)) == same


@given(remotes)
def test_what_the_api_takes_is_parsed(uri: str) -> None:
    """No job that its schema accepts, `..` apart, fails for a URI that cannot be read."""
    patterns = (MODEL_PATTERN, DATASET_PATTERN, DESTINATION_PATTERN)
    remote = parsed(uri)

    assert any(re.fullmatch(pattern[1:-1], uri) for pattern in patterns)
    assert remote is not None or ".." in uri.split("/")
