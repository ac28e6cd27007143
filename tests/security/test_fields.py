"""Whoever may create jobs gains nothing else by it: hostile text in every string that a job can hold.

Every field of the API's schema that is a string is walked, so that a field that is added is tried too.
"""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from builders import OMIT, job_manifest
from qlora_operator.api.schema import job_schema
from qlora_operator.api.v1alpha1 import QLoRAJob
from testcluster.client import ApiError, Client
from testcluster.cluster import Cluster
from testcluster.fixtures import fresh_namespace

Object = dict[str, Any]
Path = tuple[str | int, ...]
NAMESPACE = "team-a"
KEY = "{key}"
"""Last part of a path: the name of an entry of a map, not its value."""

JOB = job_manifest(
    metadata={"namespace": NAMESPACE, "labels": {}, "annotations": {}},
    workspace="pvc://work/here",
    model={"source": "hf://org/model", "credentialsSecret": "hub"},
    dataset={"source": "hf://datasets/org/data", "credentialsSecret": "hub"},
    adapter={
        "targetModules": ["q_proj"],
        "initialAdapter": "hf://org/adapter",
        "initialAdapterCredentialsSecret": "hub",
    },
    output={"destination": "s3://bucket/out", "credentialsSecret": "bucket"},
    topology={"cpusPerRank": OMIT},
    isa={"allowed": ["avx512"]},
    scheduling={
        "nodeSelector": {},
        "tolerations": [{"key": "dedicated", "operator": "Equal", "value": "x", "effect": "NoExecute"}],
    },
)
"""With all that a hostile value may go with."""

HOSTILE: dict[str, list[str]] = {
    "paths": [
        "..",
        "../",
        "/",
        "//",
        "../../etc/shadow",
        "/etc/shadow",
        "/var/run/docker.sock",
        "~root",
        "a/../b",
    ],
    "claims": [
        "pvc://other/path",
        "pvc://../x",
        "pvc://a/..",
        "pvc://a/../../b",
        "pvc://a//etc",
        "pvc://a/%2e%2e/b",
        "pvc://a/b\n/etc",
        "pvc:///etc",
        "pvc://other-ns/secret",
        "pvc://a.b/c",
        "pvc://-a/b",
        "pvc://A/b",
    ],
    "addresses": [
        "file:///etc/shadow",
        "hostpath:///",
        "http://169.254.169.254/latest/meta-data",
        "hf://org/model/../../other",
        "hf://datasets/org/data/../../../x",
        "hf://user:password@host/x",
        "s3://bucket/../other",
        "s3://bucket@host/x",
        "s3://buck\x00et/x",
        "s3://bucket/key",
        "hf://org/other",
        "hf://datasets/org/data/part.jsonl",
    ],
    "other namespaces": ["kube-system/admin", "other-ns/secret", "kube-system", "secret.kube-system"],
    "accounts": ["system:serviceaccount:kube-system:default", "system:masters", "cluster-admin", "default"],
    "expansions": ["$(HOME)", "$(SECRET)", "${HOME}", "$HOME", "$(cat /etc/shadow)", "`id`", "%(x)s", "{0}"],
    "commands": ["; id", "| id", "&& id", "--privileged", "-rf", "x --x", "'; id; '"],
    "documents": [
        '{"hostPath": {"path": "/"}}',
        'x", "hostPath": {"path": "/"}, "y": "',
        "x\nhostPath:\n  path: /",
        "- x",
        "&a *a",
        "!!python/object/apply:os.system [id]",
        "{{ .Values }}",
        "x\x00y",
        "x\ny",
        "x\r\ny: z",
        "\x1b[2J",
        "null",
        "true",
        "1e9",
    ],
    "letters": [
        "",
        " ",
        "-",
        ".",
        "\u202exyz",
        "\u2028",
        "é",
        "😀",
        "\uff41",
        "\u0445",
        "a" * 64,
        "a" * 254,
        "a" * 10_000,
    ],
    "labels": [
        "qlora.dev/job-uid",
        "qlora.dev/job-name",
        "app.kubernetes.io/managed-by",
        "batch.kubernetes.io/job-completion-index",
        "kubernetes.io/hostname",
        "node-role.kubernetes.io/control-plane",
        "pod-security.kubernetes.io/enforce",
    ],
    "images": [
        "evil/image",
        "registry.example/trainer:2",
        "registry.example/trainer:1@evil/image",
        "evil/registry.example/team/x",
        "registry.example/team/mine:1",
        "registry.example/team/../../evil",
    ],
    "names": [
        "other",
        "a.b",
        "a..b",
        "a-",
        "0a",
        "privileged",
        "hub",
        "Exists",
        "none",
        "gloo",
        "1Gi",
        "1e30",
        "-1Gi",
    ],
}
VALUES = [value for values in HOSTILE.values() for value in values]


def strings(node: Object, path: Path = ()) -> Iterator[tuple[Path, Object]]:
    """Every string of a schema: where it stands, and what the schema says of it."""
    if node.get("type") == "string":
        yield path, node
    for name, child in node.get("properties", {}).items():
        yield from strings(child, (*path, name))
    if isinstance(node.get("additionalProperties"), dict):
        yield (*path, KEY), {"type": "string"}
        yield from strings(node["additionalProperties"], (*path, "example.org/key"))
    if "items" in node:
        yield from strings(node["items"], (*path, 0))


SCHEMA = job_schema()["properties"]
FIELDS: dict[str, tuple[Path, Object]] = {
    ".".join(map(str, path)): (path, node)
    for part in ("spec", "metadata")
    for path, node in strings(SCHEMA[part], (part,))
    if path not in {("metadata", "namespace")}  # the API server compares it with the request's
}


def with_value(path: Path, value: str) -> Object:
    """A job with this text in one place."""
    job = copy.deepcopy(JOB)
    if path[-1] == "source":  # a claim needs no credentials
        del job["spec"][str(path[1])]["credentialsSecret"]
    node: Any = job
    for part in path[:-1]:
        node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]
    if path[-1] == KEY:
        node[value] = "x"
    else:
        node[path[-1]] = value
    return job


def test_the_walk_goes_everywhere() -> None:
    """The fields through which something could be reached are among those that are tried."""
    assert {
        "spec.workspace",
        "spec.model.source",
        "spec.output.credentialsSecret",
        "spec.adapter.targetModules.0",
        "spec.scheduling.nodeSelector.{key}",
        "spec.scheduling.tolerations.0.value",
        "spec.image",
        "metadata.name",
        "metadata.labels.{key}",
        "metadata.annotations.example.org/key",
    } <= set(FIELDS)


def test_the_job_itself_is_taken(breaches: Callable[[QLoRAJob], list[str]], children: Any) -> None:
    """The job that the hostile values are put into is one that runs."""
    job = QLoRAJob.model_validate(JOB)

    assert set(children(job)) == {"fetch", "train", "publish"}
    assert breaches(job) == []


@pytest.mark.parametrize("path", [path for path, _ in FIELDS.values()], ids=FIELDS)
def test_hostile_text(path: Path, breaches: Callable[[QLoRAJob], list[str]]) -> None:
    """Hostile text in a field is refused, or changes nothing of what the job's pods may reach."""
    for value in VALUES:
        try:
            job = QLoRAJob.model_validate(with_value(path, value))
        except ValidationError:
            continue
        assert breaches(job) == [], value


def texts(node: Object) -> st.SearchStrategy[str]:
    """What a field takes, and anything else."""
    if "enum" in node:
        return st.sampled_from(node["enum"]) | st.text()
    if "pattern" not in node:
        return st.text()
    pattern = node["pattern"].removeprefix("^").removesuffix("$")
    return st.from_regex(re.compile(pattern), fullmatch=True) | st.text()


@given(st.data())
def test_any_text(breaches: Callable[[QLoRAJob], list[str]], data: st.DataObject) -> None:
    """Whatever text a field takes, the job's pods reach what the job names and nothing else."""
    path, node = data.draw(st.sampled_from(list(FIELDS.values())))
    try:
        job = QLoRAJob.model_validate(with_value(path, data.draw(texts(node))))
    except ValidationError:
        return
    assert breaches(job) == []


@pytest.fixture(scope="module")
def shared_namespace(api_cluster: Cluster, crd: None) -> Iterator[str]:
    """One for all fields: nothing is created in it."""
    with fresh_namespace(api_cluster, "fields") as name:
        yield name


@pytest.mark.cluster
@pytest.mark.parametrize("path", [path for path, _ in FIELDS.values()], ids=FIELDS)
def test_hostile_text_at_the_api_server(
    api_cluster: Cluster, shared_namespace: str, path: Path, breaches: Callable[[QLoRAJob], list[str]]
) -> None:
    """What both the operator and the API server take of hostile text comes back as harmless as it was sent."""
    for value in VALUES:
        body = with_value(path, value)
        if not readable(body):
            continue  # the operator makes nothing of it, whatever the API server says
        taken = sent(api_cluster.client, shared_namespace, body)
        assert taken is None or breaches(taken) == [], value


def sent(client: Client, namespace: str, body: Object) -> QLoRAJob | None:
    """The job as the API server would keep it; None when it refuses it."""
    body["metadata"]["namespace"] = namespace
    try:
        taken = client.post(f"/apis/qlora.dev/v1alpha1/namespaces/{namespace}/qlorajobs?dryRun=All", body)
    except ApiError as error:
        if error.code in (400, 422):
            return None
        raise
    taken["metadata"]["namespace"] = NAMESPACE
    return QLoRAJob.model_validate(taken)


def readable(body: Object) -> bool:
    """Whether the operator can read the job."""
    try:
        QLoRAJob.model_validate(body)
    except ValidationError:
        return False
    return True
