"""The pod of `kubectl qlora chat`, against the pods of the job's ranks."""

import json
from typing import Any

import pytest

from builders import a_job
from qlora_contract.paths import RUN_CONFIG_PATH, VOLUMES_ROOT
from qlora_operator.api import names
from qlora_operator.api.run_config import to_run_config
from qlora_operator.desired.pod import pod_template
from qlora_operator.kubectl.chat_pod import chat_pod
from qlora_operator.settings import Settings

SETTINGS: dict[str, Any] = {
    "trainerImage": "registry.example/trainer:1",
    "imagePullSecrets": ["pull"],
    "podLabels": {"mesh.example/inject": "false"},
    "podAnnotations": {"team.example/cost": "7"},
}
UID = "u-1"


@pytest.fixture
def made() -> tuple[dict[str, Any], dict[str, Any]]:
    """The template of a job's ranks, and the pod that is made of it."""
    job = a_job(
        "docs",
        metadata={"uid": UID},
        model={"source": "pvc://models/m"},
        topology={"cpusPerRank": 3, "ranksPerPod": 2},
        scheduling={"nodeSelector": {"pool": "cpu"}},
    )
    run = to_run_config(job, uid=UID, attempt=2, isa="avx512")
    settings = Settings.model_validate(SETTINGS)
    template = pod_template(job, run, "registry.example/trainer:2", settings, avoid=["bad"])
    before = json.dumps(template, sort_keys=True)
    pod = chat_pod(job, template)
    assert json.dumps(template, sort_keys=True) == before
    return template, pod


def container(pod: dict[str, Any]) -> dict[str, Any]:
    """Its only one."""
    (found,) = pod["spec"]["containers"]
    return dict(found)


def test_it_is_as_large_and_as_bound_as_a_rank_s_pod(made: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Image, size, nodes, user, secrets for pulling and security are those that the operator gave the ranks."""
    template, pod = made
    spec = template["spec"]

    for field in (
        "affinity",
        "nodeSelector",
        "securityContext",
        "imagePullSecrets",
        "automountServiceAccountToken",
    ):
        assert pod["spec"][field] == spec[field], field
    for field in ("image", "resources", "securityContext", "imagePullPolicy"):
        assert container(pod)[field] == spec["containers"][0][field], field
    assert container(pod)["image"] == "registry.example/trainer:2"
    assert "subdomain" not in pod["spec"]


def test_it_speaks_through_its_input_and_ends_with_it(made: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """It runs the program that answers, with no port, and no longer than it is needed."""
    _, pod = made

    assert container(pod)["command"] == ["python", "-m", "qlora_trainer.chat"]
    assert (container(pod)["stdin"], container(pod)["stdinOnce"], "ports" in container(pod)) == (
        True,
        True,
        False,
    )
    assert (pod["spec"]["restartPolicy"], pod["spec"]["activeDeadlineSeconds"]) == ("Never", 43200)
    assert {variable["name"] for variable in container(pod)["env"]} == {
        "HOME", "TMPDIR", "HF_HOME", "PYTHONUNBUFFERED",
    }  # fmt: skip


def test_it_writes_to_no_claim(made: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """The workspace, which ranks write to, is mounted read-only; only memory can be written."""
    template, pod = made
    writable = {m["mountPath"] for m in container(pod)["volumeMounts"] if not m.get("readOnly")}
    of_ranks = {
        m["mountPath"] for m in template["spec"]["containers"][0]["volumeMounts"] if not m.get("readOnly")
    }
    mounted = {m["mountPath"] for m in container(pod)["volumeMounts"]}

    assert of_ranks - writable == {str(VOLUMES_ROOT / "team")}
    assert writable == {"/tmp", "/dev/shm"}
    assert {str(VOLUMES_ROOT / "models"), str(RUN_CONFIG_PATH.parent)} <= mounted


def test_it_has_the_run_json_of_the_ranks(made: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """By the annotation that the volume shows."""
    template, pod = made
    run = pod["metadata"]["annotations"][names.RUN_CONFIG_ANNOTATION]

    assert run == template["metadata"]["annotations"][names.RUN_CONFIG_ANNOTATION]
    assert json.loads(run)["job"]["name"] == "docs"


def test_it_is_no_pod_of_the_job_but_goes_with_it(made: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """No label by which the operator, a Service or a NetworkPolicy would take it for a rank's."""
    _, pod = made
    labels = pod["metadata"]["labels"]
    (owner,) = pod["metadata"]["ownerReferences"]

    assert not [label for label in labels if label.startswith("qlora.dev/")]
    assert labels["mesh.example/inject"] == "false"
    assert labels["app.kubernetes.io/component"] == "chat"
    assert (owner["name"], owner["uid"], owner.get("controller"), owner.get("blockOwnerDeletion")) == (
        "docs", UID, None, None,
    )  # fmt: skip
    assert pod["metadata"]["generateName"] == "docs-chat-"
