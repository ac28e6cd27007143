"""The CRD on a real API server: accepted with room to spare, and a job's life as a stored object."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.run_config import SINCE
from qlora_operator.api import names
from qlora_operator.api.loader import parse_job
from qlora_operator.api.schema import custom_resource_definition
from qlora_operator.api.v1alpha1 import MUTABLE, MUTABLE_WHILE_SUSPENDED, QLoRAJobSpec
from qlora_operator.api.yaml_reader import read_documents
from testcluster.client import ApiError, Client
from testcluster.cluster import Cluster

pytestmark = pytest.mark.cluster

MANIFESTS = Path(__file__).parents[2] / "manifests"
SAMPLES = sorted((MANIFESTS / "samples").glob("*.yaml"))
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
SPARE = 10
"""How many times as large every bound could be."""

Object = dict[str, Any]


@pytest.fixture
def jobs(api_cluster: Cluster, crd: None, namespace: str) -> str:
    """Path of the jobs in the test's namespace."""
    return f"/apis/{names.API_VERSION}/namespaces/{namespace}/{names.PLURAL}"


@pytest.fixture
def client(api_cluster: Cluster) -> Client:
    """The administrator's."""
    return api_cluster.client


def read(path: Path) -> Object:
    """The job in a sample."""
    (job,) = read_documents(path.read_bytes())
    return dict(job)


def sample(name: str) -> Object:
    """The job in the sample of this name."""
    return read(next(path for path in SAMPLES if path.stem == name))


# --- the definition


BOUNDS = ("maxLength", "maxItems", "maxProperties")


def other_definition(bounds: Callable[[int], int | None], which: Sequence[str] = BOUNDS) -> Object:
    """The definition under another name, with other bounds of these kinds: without one where None."""

    def rewritten(value: Any) -> Any:
        if isinstance(value, list):
            return [rewritten(item) for item in value]
        if not isinstance(value, dict):
            return value
        result = {key: rewritten(item) for key, item in value.items()}
        for key in which:
            if isinstance(value.get(key), int):
                result[key] = bounds(value[key])
        return {key: item for key, item in result.items() if item is not None}

    definition: Object = rewritten(custom_resource_definition())
    definition["spec"]["group"] = "spare.example"
    definition["metadata"]["name"] = f"{names.PLURAL}.spare.example"
    return definition


@pytest.mark.parametrize("longer", [BOUNDS[:1], BOUNDS[1:]], ids=["strings", "lists and maps"])
def test_rules_cost_a_fraction_of_what_they_may(longer: Sequence[str], client: Client) -> None:
    """With strings, or lists and maps, ten times as long the API server would still accept every rule."""
    made = client.post(f"{DEFINITIONS}?dryRun=All", other_definition(lambda bound: bound * SPARE, longer))

    assert made["spec"]["group"] == "spare.example"


def test_the_server_counts_what_rules_cost(client: Client) -> None:
    """The same definition without bounds is refused for its rules' cost: acceptance means something."""
    with pytest.raises(ApiError, match="estimated rule cost exceeds budget by factor"):
        client.post(f"{DEFINITIONS}?dryRun=All", other_definition(lambda _: None))


def test_the_definition_is_established_as_it_was_sent(client: Client, crd: None) -> None:
    """The API server neither drops nor doubts any part of the schema."""
    stored = client.get(f"{DEFINITIONS}/{names.CRD_NAME}")
    conditions = {condition["type"]: condition["status"] for condition in stored["status"]["conditions"]}
    sent = custom_resource_definition()["spec"]

    assert conditions["NamesAccepted"] == conditions["Established"] == "True"
    assert "NonStructuralSchema" not in conditions
    assert stored["spec"]["versions"][0]["schema"] == sent["versions"][0]["schema"]
    assert stored["spec"]["names"] == sent["names"]


# --- what a user applies


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_a_sample_is_accepted_and_means_what_qlora_validate_says(
    path: Path, client: Client, jobs: str
) -> None:
    """Under strict field validation every sample is taken; with its defaults it means what the models say. Those of
    later fields than release 0.1.0's are the models' alone."""
    job = parse_job(read(path))
    assert job is not None
    stored = client.post(f"{jobs}?fieldValidation=Strict", read(path))

    again = parse_job({**read(path), "spec": stored["spec"]})
    assert again is not None
    assert again.spec == job.spec
    written = job.spec.adapter.model_dump(by_alias=True, exclude_none=True)
    later = {path.partition(".")[2] for path in SINCE if path.startswith("adapter.")}
    later -= read(path)["spec"].get("adapter", {}).keys()
    assert stored["spec"]["adapter"] == {name: value for name, value in written.items() if name not in later}


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_kubectl_reads_a_sample_as_we_do(
    path: Path, told_cluster: Cluster, namespace: str, jobs: str
) -> None:
    """What kubectl makes of the file is what the project's own reader makes of it."""
    arguments = ("create", "--validate=strict", "--dry-run=server", "-o", "json", "-n", namespace)
    sent = json.loads(told_cluster.kubectl(*arguments, "-f", str(path)))
    ours = told_cluster.client.post(f"{jobs}?fieldValidation=Strict&dryRun=All", read(path))

    assert sent["spec"] == ours["spec"]


def test_the_workspace_shell_is_accepted(told_cluster: Cluster, namespace: str) -> None:
    """The pod that holds a claim open may run in a namespace that enforces Pod Security *restricted*."""
    path = MANIFESTS / "workspace-shell.yaml"
    enforce = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    told_cluster.client.patch(f"/api/v1/namespaces/{namespace}", enforce)

    arguments = ("create", "--validate=strict", "--dry-run=server", "-o", "name", "-n", namespace)

    assert told_cluster.kubectl(*arguments, "-f", str(path)).endswith(f"/{path.stem}\n")


@pytest.mark.parametrize("how", ["--server-side", "--server-side=false"])
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_applying_a_file_twice_changes_nothing(
    how: str, path: Path, told_cluster: Cluster, namespace: str, jobs: str
) -> None:
    """Generation and resourceVersion are the same after the same file was applied again."""

    def applied() -> tuple[int, str]:
        told_cluster.kubectl("apply", how, "--validate=strict", "-n", namespace, "-f", str(path))
        (job,) = told_cluster.client.items(jobs)
        return job["metadata"]["generation"], job["metadata"]["resourceVersion"]

    first = applied()

    assert first[0] == 1
    assert applied() == first


# --- status


STATUS = {
    "phase": "Running",
    "message": "training",
    "attempt": 1,
    "placement": {"isa": "avx512", "dtype": "fp32"},
    "checkpoint": {"step": 100},
    "adapter": {"uri": "pvc://team-data/qlora/jobs/smollm2-docs/adapter"},
    "columns": {
        "ranks": "2/2",
        "step": "120/400",
        "loss": "1.83",
        "tokensPerSecond": "412",
        "eta": "9m",
        "restarts": "1",
    },
}


def test_the_columns_print(told_cluster: Cluster, namespace: str, jobs: str) -> None:
    """`kubectl get qlj` shows a job in nine columns, `-o wide` in five more, `kubectl get all` too."""
    job = told_cluster.client.post(jobs, sample("minimal"))
    told_cluster.client.patch(f"{jobs}/{job['metadata']['name']}/status", {"status": STATUS})
    get = ("get", "-n", namespace)
    header, row = told_cluster.kubectl(*get, "qlj").splitlines()
    _, wide = told_cluster.kubectl(*get, "qlj", "-o", "wide").splitlines()

    assert header.split() == [
        "NAME",
        "PHASE",
        "RANKS",
        "ISA",
        "STEP",
        "LOSS",
        "TOK/S",
        "ETA",
        "RESTARTS",
        "AGE",
    ]
    shown = ["smollm2-docs", "Running", "2/2", "avx512", "120/400", "1.83", "412", "9m", "1"]
    assert row.split()[:-1] == shown
    assert wide.split()[:9] == shown
    assert wide.split()[10:] == ["1", "fp32", "100", STATUS["adapter"]["uri"], "training"]
    assert "qlorajob.qlora.dev/smollm2-docs" in told_cluster.kubectl(*get, "all")


def test_a_user_cannot_set_the_status(client: Client, jobs: str) -> None:
    """A status that comes with the job is passed over, and the status alone never changes the spec."""
    job = client.post(jobs, {**sample("minimal"), "status": STATUS})
    path = f"{jobs}/{job['metadata']['name']}"
    assert "status" not in job
    assert "status" not in client.put(path, {**client.get(path), "status": STATUS})

    told = client.patch(f"{path}/status", {"status": STATUS, "spec": {"suspend": True}})

    assert told["status"]["phase"] == "Running"
    assert told["spec"]["suspend"] is False
    assert told["metadata"]["generation"] == 1


# --- changes


ALWAYS: dict[str, list[object]] = {
    "suspend": [True, False, True, None],
    "ttlSecondsAfterFinished": [0, 60, None],
    "activeDeadlineSeconds": [60, 1, None],
    "backoffLimit": [0, 10_000, None],
    "infrastructureBackoffLimit": [0, 10_000, None],
    "pendingDeadlineSeconds": [60, 1, None],
    "progressDeadlineSeconds": [60, 1, None],
    "tracking": [{"mlflow": {"uri": "http://mlflow:5000", "experiment": "mine"}}, None],
    "schedule": [
        {"windows": [{"start": "0 20 * * *", "durationSeconds": 3600}]},
        {"timeZone": "Europe/Berlin", "windows": [{"start": "0 20 * * MON-FRI", "end": "0 6 * * *"}]},
        None,
    ],
}
"""Values that a field takes one after the other; None takes it away."""


@pytest.mark.parametrize(("field", "values"), ALWAYS.items(), ids=ALWAYS)
def test_some_fields_may_always_change(field: str, values: list[object], client: Client, jobs: str) -> None:
    """A mutable field of an active job may be set, changed and unset."""
    job = client.post(jobs, sample("minimal"))
    path = f"{jobs}/{job['metadata']['name']}"
    for generation, value in enumerate(values, start=2):
        job = client.patch(path, {"spec": {field: value}})
        assert job["metadata"]["generation"] == generation
        if value is not None:
            assert job["spec"][field] == value


def test_every_mutable_field_is_tried() -> None:
    """A field that becomes mutable gets a line in the table above."""
    assert set(ALWAYS) == MUTABLE


HELD: dict[str, Object] = {
    "more pods": {"topology": {"pods": 3, "ranksPerPod": 2}},
    "more memory": {"topology": {"memoryPerRank": "8Gi"}},
    "a selector": {"scheduling": {"nodeSelector": {"a": "b"}}},
    "a toleration": {"scheduling": {"tolerations": [{"operator": "Exists"}]}},
    "a priority": {"scheduling": {"priorityClassName": "low"}},
    "a queue": {"scheduling": {"queueName": "team"}},
}
"""Changes that a job takes only while it is suspended."""


@pytest.mark.parametrize("change", HELD.values(), ids=HELD)
def test_topology_and_scheduling_may_change_while_suspended(
    change: Object, client: Client, jobs: str
) -> None:
    """An active job refuses the change and says how; with or after suspension, and with resumption, it is taken."""
    job = client.post(jobs, sample("minimal"))
    path = f"{jobs}/{job['metadata']['name']}"
    (field,) = change
    with pytest.raises(ApiError, match=rf"spec\.{field}: .*set suspend: true first"):
        client.patch(path, {"spec": change})

    client.patch(path, {"spec": {**change, "suspend": True}})
    client.patch(path, {"spec": {field: job["spec"][field]}})
    resumed = client.patch(path, {"spec": {**change, "suspend": False}})

    (name, value), *_ = change[field].items()
    assert resumed["spec"][field][name] == value


OTHER: dict[str, object] = {
    "workspace": "pvc://team-data/other",
    "model": {"source": "pvc://team-data/other"},
    "dataset": {"source": "pvc://team-data/other"},
    "adapter": {"rank": 8},
    "quantization": {"scheme": "none"},
    "training": {"epochs": 4},
    "evaluation": {"everySteps": 60},
    "checkpoint": {"keep": 3},
    "output": {"destination": "hf://org/other"},
    "isa": {"allowed": ["avx2"]},
    "distributed": {"timeoutSeconds": 60},
    "image": "registry.example/other",
    "managedBy": "kueue.x-k8s.io/multikueue",
    "terminationGracePeriodSeconds": 60,
    "topology": {"pods": 3},
    "scheduling": {"queueName": "other"},
}
"""Another value of each field that an active job does not change."""
IMMUTABLE = [str(info.alias) for info in QLoRAJobSpec.model_fields.values() if info.alias not in MUTABLE]


@pytest.fixture
def full(client: Client, jobs: str) -> tuple[str, Object]:
    """Path and object of a stored job that sets every immutable field to something that is no default."""
    job = sample("full")
    job["spec"] |= {
        "image": "registry.example/trainer:1",
        "managedBy": names.CONTROLLER,
        "terminationGracePeriodSeconds": 200,
        "adapter": {"rank": 4},
        "quantization": {"doubleQuantization": False},
        "checkpoint": {"everySteps": 7},
        "isa": {"stepDownSeconds": 7},
        "distributed": {"timeoutSeconds": 7},
        "output": {"destination": "s3://team-models/adapters"},
    }
    stored = client.post(jobs, job)
    return f"{jobs}/{stored['metadata']['name']}", stored


@pytest.mark.parametrize("field", IMMUTABLE)
def test_an_immutable_field_cannot_be_set(field: str, client: Client, full: tuple[str, Object]) -> None:
    """Another value is refused at the field, with what to do instead."""
    path, _ = full
    with pytest.raises(
        ApiError, match=rf"spec\.{field}: Forbidden: {field} (is immutable|may change only while)"
    ):
        client.patch(path, {"spec": {field: OTHER[field]}})


@pytest.mark.parametrize("field", IMMUTABLE)
def test_an_immutable_field_cannot_be_unset(field: str, client: Client, full: tuple[str, Object]) -> None:
    """Taking the field away, or what it holds, is a change, too: its default is another value."""
    path, _ = full
    with pytest.raises(
        ApiError, match=rf"spec\.{field}: (Forbidden: {field} (is immutable|may)|Required value)"
    ):
        client.patch(path, {"spec": {field: None}})


@pytest.mark.parametrize("field", IMMUTABLE)
def test_an_immutable_field_cannot_be_replaced(field: str, client: Client, full: tuple[str, Object]) -> None:
    """A whole object with another value is refused as a patch is."""
    path, stored = full
    job = copy.deepcopy(stored)
    value = OTHER[field]
    job["spec"][field] = {**job["spec"][field], **value} if isinstance(value, dict) else value
    with pytest.raises(
        ApiError, match=rf"spec\.{field}: Forbidden: {field} (is immutable|may change only while)"
    ):
        client.put(path, job)


@pytest.mark.parametrize("field", ["image", "managedBy"])
def test_an_optional_immutable_field_cannot_be_added(field: str, client: Client, jobs: str) -> None:
    """A field that the job was created without stays away."""
    job = client.post(jobs, sample("minimal"))
    with pytest.raises(
        ApiError, match=rf"spec\.{field}: Forbidden: {field} is immutable; create another job"
    ):
        client.patch(f"{jobs}/{job['metadata']['name']}", {"spec": {field: OTHER[field]}})


def test_suspension_does_not_open_the_rest(client: Client, full: tuple[str, Object]) -> None:
    """Only topology and scheduling open with suspend: true."""
    path, _ = full
    client.patch(path, {"spec": {"suspend": True}})
    for field in set(IMMUTABLE) - MUTABLE_WHILE_SUSPENDED:
        with pytest.raises(ApiError, match=rf"spec\.{field}: Forbidden: {field} is immutable"):
            client.patch(path, {"spec": {field: OTHER[field]}})


def test_a_wrong_change_is_refused_like_a_wrong_job(client: Client, full: tuple[str, Object]) -> None:
    """Rules between fields hold for changes as they do for new jobs."""
    path, _ = full
    with pytest.raises(ApiError, match=r"spec\.topology: .*at most 1024 ranks"):
        client.patch(path, {"spec": {"suspend": True, "topology": {"pods": 512, "ranksPerPod": 64}}})
