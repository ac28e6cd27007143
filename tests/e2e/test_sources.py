"""Sources of the Hub and of S3, and an adapter that goes back there, with servers that misbehave."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testcluster.chart import SYSTEM, Releases
from testcluster.cluster import Cluster
from testcluster.faulty_http import answer, cut, spoil
from testcluster.network import HOST_ADDRESS
from testcluster.nodes import NodeCluster
from testcluster.remote import BUCKET, HUB_TOKEN, SECRET_KEY, Remotes, remotes

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(900)]

Object = dict[str, Any]


@pytest.fixture(scope="module")
def servers(operator: Cluster, values: Object, settle: Callable[[], None]) -> Iterator[Remotes]:
    """A Hub and an S3 that pods reach, and an operator that is told of them."""
    if not isinstance(operator, NodeCluster):
        pytest.skip("pods of a cluster that exists cannot reach servers of this test")
    releases = Releases(operator, SYSTEM)
    # LFS objects come from another host, which must not be shown the token.
    with remotes(HOST_ADDRESS, operator.nodes["node-a"].address) as made:
        endpoints = {
            "hubEndpoint": made.hub_wire.url,
            "s3Endpoint": made.s3_wire.url,
            "s3Region": "eu-central-1",
        }
        releases.install({**values, "jobs": {**values["jobs"], "transfer": endpoints}})
        settle()
        yield made
        releases.install(values)
        settle()


@pytest.fixture
def filled(
    servers: Remotes,
    operator: Cluster,
    node_namespace: str,
    small_model: Callable[..., Path],
    demo_data: Path,
) -> Remotes:
    """A private model in the Hub, data in S3, and Secrets for both in the test's namespace."""
    servers.clear()
    servers.hub.commit_folder("org/tiny", small_model("llama"))
    servers.hub.repositories["models", "org/tiny"].private = True
    lines = (demo_data / "train.jsonl").read_bytes().splitlines(keepends=True)
    servers.put("data/train.jsonl", b"".join(lines[:300]))
    servers.put("data/eval.jsonl", b"".join(lines[300:320]))
    keys = ("AWS_ACCESS_KEY_ID=a", f"AWS_SECRET_ACCESS_KEY={SECRET_KEY}")
    for name, literals in (("hub", (f"token={HUB_TOKEN}",)), ("s3", keys)):
        arguments = [f"--from-literal={literal}" for literal in literals]
        operator.kubectl("-n", node_namespace, "create", "secret", "generic", name, *arguments)
    return servers


def remote(**model: Any) -> Object:
    """The fields of a job whose sources and destination are remote."""
    return {
        "model": {"source": "hf://org/tiny", **model},
        "dataset": {"source": f"s3://{BUCKET}/data", "credentialsSecret": "s3"},
        "output": {"destination": f"s3://{BUCKET}/out", "credentialsSecret": "s3"},
        "training": {"maxSteps": 60, "computeDtype": "fp32", "learningRate": 1e-3},
    }


def test_from_the_hub_and_s3_to_s3(
    filled: Remotes, operator: Cluster, node_namespace: str, small_job: Callable[..., Any], volume: Path
) -> None:
    """Servers that throttle, break off and send wrong bytes cost no restart; a second job fetches nothing; no token
    is to be found in what anybody may read."""
    filled.hub_wire.fault(answer(429, Retry_After="1"), path="/api/models")
    filled.cdn_wire.fault(cut(after=1000))
    filled.s3_wire.fault(spoil(), path="train.jsonl")
    job = small_job("remote", **remote(credentialsSecret="hub"))

    status = job.until_phase("Succeeded")

    assert [attempt["stage"] for attempt in status["attempts"]] == ["fetch", "train", "publish"]
    assert [attempt["reason"] for attempt in status["attempts"]] == ["Fetched", "Trained", "Succeeded"]
    # A container without the tokens has looked at what came, before there were ranks.
    assert "train.jsonl (a JSONL file): training: " in status["attempts"][0]["message"]
    assert status["restarts"] == {"user": 0, "infrastructure": 0}
    commit = filled.hub.repositories["models", "org/tiny"].branches["main"]
    assert status["provenance"]["modelRevision"] == commit
    assert status["adapter"]["publishedUri"] == f"s3://{BUCKET}/out"
    keys = filled.list_keys()
    sent = {key.removeprefix("out/") for key in keys if key.startswith("out/")}
    local = volume / "work" / "jobs" / "remote" / "adapter"
    assert sent == {path.name for path in local.iterdir()}
    weights = filled.s3.get_object(Bucket=BUCKET, Key="out/adapter_model.safetensors")["Body"].read()
    assert weights == (local / "adapter_model.safetensors").read_bytes()

    before = filled.cdn_wire.sent("")
    small_job("again", **remote(credentialsSecret="hub")).until_phase("Succeeded")
    assert filled.cdn_wire.sent("") == before > 0

    objects = operator.kubectl("-n", node_namespace, "get", "events,pods,jobs,qlj", "-o", "yaml")
    said = job.logs() + objects
    assert HUB_TOKEN not in said
    assert SECRET_KEY not in said


@pytest.mark.parametrize(
    ("model", "words"),
    [
        pytest.param({}, "model.credentialsSecret", id="private, without a secret"),
        pytest.param({"source": "hf://org/none", "credentialsSecret": "hub"}, "HTTP 404", id="not there"),
    ],
)
def test_a_model_that_cannot_be_had(
    filled: Remotes, small_job: Callable[..., Any], model: dict[str, str], words: str
) -> None:
    """The job fails at once, with the server's answer and what would be right."""
    job = small_job("refused", **remote(**model))

    status = job.until(lambda status: status.get("phase") == "Failed")

    assert status["attempts"][0]["reason"] == "TransferRefused"
    assert model.get("source", "hf://org/tiny") in status["message"]
    assert words in status["message"]
    assert len(status["attempts"]) == 1


def test_a_workspace_of_somebody_else(filled: Remotes, small_job: Callable[..., Any], volume: Path) -> None:
    """A workspace that the pods' user may not write in fails the job at once, and says whose it must be."""
    (volume / "work").mkdir(mode=0o755)
    job = small_job("theirs", **remote(credentialsSecret="hub"))

    status = job.until(lambda status: status.get("phase") == "Failed")

    assert status["attempts"][0]["reason"] == "InvalidConfiguration", status["message"]
    assert "Permission denied" in status["message"]
    assert "/work/" in status["message"]
    assert "grant user 1000 read access" in status["message"]
    assert len(status["attempts"]) == 1
