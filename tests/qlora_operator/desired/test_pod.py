"""The pods of an attempt."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from qlora_contract.run import ISA_TIERS, IsaTier, RunConfig
from qlora_operator.api import names
from qlora_operator.api.types import QLoRAJob
from qlora_operator.desired.pod import pod_template
from qlora_operator.desired.run_config import run_config
from qlora_operator.settings import Settings

Make = Callable[..., dict[str, Any]]
ANNOTATIONS_LIMIT = 256 * 1024
"""Bytes of all keys and values of an object's annotations, as the API server counts them."""


@pytest.fixture
def template(a_job: Callable[..., QLoRAJob], settings: Callable[..., Settings]) -> Make:
    """A maker of templates: settings by keyword, the spec as `spec`."""

    def make(isa: IsaTier = "avx512", spec: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        return pod_template(a_job(**(spec or {})), "u", 3, isa, "registry.example/t:1", settings(**fields))

    return make


# --- Pod Security


def violations(pod: dict[str, Any]) -> list[str]:
    """What of a pod Pod Security *restricted* forbids: the controls of the Kubernetes standard, one by one."""
    containers = [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]
    return [
        *_of_pod(pod),
        *(fault for container in containers for fault in _of_container(container, pod["spec"])),
    ]


ALLOWED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected",
    "secret",
}  # fmt: skip
SAFE_SECCOMP = ("RuntimeDefault", "Localhost")


def _of_pod(pod: dict[str, Any]) -> Iterator[str]:
    spec, security = pod["spec"], pod["spec"].get("securityContext", {})
    yield from (field for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field))
    yield from (
        key for key in pod["metadata"].get("annotations", {}) if key.startswith("container.apparmor.security")
    )
    yield from (volume["name"] for volume in spec["volumes"] if not set(volume) - {"name"} <= ALLOWED_VOLUMES)
    yield from (field for field in ("sysctls", "seLinuxOptions", "windowsOptions") if field in security)
    yield from _of_profile(security)
    if security.get("runAsUser") == 0:
        yield "runAsUser"


def _of_container(container: dict[str, Any], spec: dict[str, Any]) -> Iterator[str]:
    security = container.get("securityContext", {})
    of_pod = spec.get("securityContext", {})
    capabilities = security.get("capabilities", {})
    forbidden = ("privileged", "procMount", "seLinuxOptions", "windowsOptions")
    yield from (field for field in forbidden if security.get(field))
    yield from _of_profile(security)
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "hostPort"
    if security.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "capabilities"
    if security.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot"
    if security.get("runAsUser") == 0:
        yield "runAsUser"
    if "seccompProfile" not in security and "seccompProfile" not in of_pod:
        yield "seccompProfile"
    handlers = {"livenessProbe", "readinessProbe", "startupProbe", "lifecycle"}
    yield from handlers & set(container)


def _of_profile(security: dict[str, Any]) -> Iterator[str]:
    """Profiles that a pod or a container names itself."""
    for field in ("seccompProfile", "appArmorProfile"):
        if security.get(field, {}).get("type", "RuntimeDefault") not in SAFE_SECCOMP:
            yield field


BROKEN: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "host's network": (("spec", "hostNetwork"), True),
    "host's processes": (("spec", "hostPID"), True),
    "host's folder": (("spec", "volumes", 0), {"name": "v", "hostPath": {"path": "/"}}),
    "root by number": (("spec", "securityContext", "runAsUser"), 0),
    "perhaps root": (("spec", "securityContext", "runAsNonRoot"), False),
    "no seccomp": (("spec", "securityContext", "seccompProfile", "type"), "Unconfined"),
    "sysctls": (("spec", "securityContext", "sysctls"), [{"name": "kernel.msgmax", "value": "1"}]),
    "an unconfined container": (
        ("metadata", "annotations", "container.apparmor.security.beta.kubernetes.io/trainer"),
        "unconfined",
    ),
    "privileged": (("spec", "containers", 0, "securityContext", "privileged"), True),
    "escalation": (("spec", "containers", 0, "securityContext", "allowPrivilegeEscalation"), True),
    "keeps capabilities": (("spec", "containers", 0, "securityContext", "capabilities", "drop"), ["KILL"]),
    "more capabilities": (("spec", "containers", 0, "securityContext", "capabilities", "add"), ["SYS_NICE"]),
    "host's port": (("spec", "containers", 0, "ports", 0, "hostPort"), 80),
    "unmasked /proc": (("spec", "containers", 0, "securityContext", "procMount"), "Unmasked"),
}


@pytest.mark.parametrize(("path", "value"), BROKEN.values(), ids=BROKEN)
def test_the_check_of_pod_security_sees(path: tuple[str | int, ...], value: Any, template: Make) -> None:
    """The check below would notice each control of the standard being broken."""
    pod = copy.deepcopy(template())
    place: Any = pod
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value

    assert violations(template()) == []
    assert violations(pod) != []


@hypothesis.settings(deadline=None)
@given(data=st.data())
def test_pods_meet_pod_security_restricted(
    gangs: SearchStrategy[dict[str, Any]], data: st.DataObject
) -> None:
    """Whatever users and administrators write, a namespace that enforces *restricted* admits the pods."""
    pod = pod_template(**data.draw(gangs))
    (container,) = pod["spec"]["containers"]

    assert violations(pod) == []
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["enableServiceLinks"] is False
    assert "serviceAccountName" not in pod["spec"]


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({}, {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000}),
        ({"runAsUser": None, "runAsGroup": None, "fsGroup": None}, {}),
        ({"runAsUser": 7, "runAsGroup": 8, "fsGroup": 9}, {"runAsUser": 7, "runAsGroup": 8, "fsGroup": 9}),
    ],
    ids=["by default", "left to the platform", "as set"],
)
def test_pods_run_as_whom_the_administrator_says(
    fields: dict[str, Any], ids: dict[str, int], template: Make
) -> None:
    """Ids are set as in the settings; null leaves them to the image or the platform."""
    security = template(**fields)["spec"]["securityContext"]

    assert {key: security[key] for key in ("runAsUser", "runAsGroup", "fsGroup") if key in security} == ids
    assert ("fsGroupChangePolicy" in security) == ("fsGroup" in ids)


# --- RunConfig


@hypothesis.settings(deadline=None)
@given(data=st.data())
def test_the_ranks_read_what_the_user_wrote(
    gangs: SearchStrategy[dict[str, Any]], data: st.DataObject
) -> None:
    """The annotation, read back by the trainer's own class, is the attempt's RunConfig, whatever is in it."""
    gang = data.draw(gangs)
    annotation = pod_template(**gang)["metadata"]["annotations"][names.RUN_CONFIG_ANNOTATION]
    read = RunConfig.model_validate_json(annotation)

    assert read == run_config(gang["job"], uid=gang["uid"], attempt=gang["attempt"], isa=gang["isa"])
    assert (read.model, read.training, read.adapter) == (
        gang["job"].spec.model,
        gang["job"].spec.training,
        gang["job"].spec.adapter,
    )


def test_the_largest_run_config_fits_an_annotation(template: Make) -> None:
    """With every bound of the API exhausted by the longest characters, half the room is left."""
    uri = "pvc://c/" + "\U0001f600" * 504
    spec = {
        "workspace": uri,
        "model": {"source": uri},
        "dataset": {"source": uri, "trainSplit": "s" * 64, "evalSplit": "s" * 64},
        "adapter": {"targetModules": ["\x01" * 256] * 64},
    }
    annotations = template(spec=spec)["metadata"]["annotations"]
    size = sum(len(text.encode()) for pair in annotations.items() for text in pair)

    assert 100_000 < size < ANNOTATIONS_LIMIT / 2


def test_the_run_config_is_compact(template: Make) -> None:
    """The annotation has no line breaks: it is stored with every pod."""
    text = template()["metadata"]["annotations"][names.RUN_CONFIG_ANNOTATION]

    assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)


# --- resources


def quality_of_service(pod: dict[str, Any]) -> str:
    """The class that a kubelet puts a pod into."""
    resources = [container["resources"] for container in pod["spec"]["containers"]]
    guaranteed = all(
        each.get("limits", {}).get(name) is not None
        and each["limits"][name] == each.get("requests", each["limits"]).get(name)
        for each in resources
        for name in ("cpu", "memory")
    )
    return "Guaranteed" if guaranteed else "Burstable" if any(resources) else "BestEffort"


@hypothesis.settings(deadline=None)
@given(data=st.data())
def test_strict_pinning_means_guaranteed_whole_cpus(
    gangs: SearchStrategy[dict[str, Any]], data: st.DataObject
) -> None:
    """With strict pinning a kubelet with static CPU management gives the pod CPUs of its own."""
    gang = data.draw(gangs)
    pod = pod_template(**gang)
    topology = gang["job"].spec.topology
    requests = pod["spec"]["containers"][0]["resources"]["requests"]

    assert quality_of_service(pod) == ("Guaranteed" if topology.pinning == "strict" else "Burstable")
    assert requests["cpu"] == str(topology.ranks_per_pod * topology.cpus_per_rank)
    assert re.fullmatch("[0-9]+", requests["memory"])


def test_memory_is_the_ranks_and_what_lies_in_memory(template: Make) -> None:
    """The request counts every rank, /tmp and /dev/shm, and is the limit too, however CPUs are shared."""
    topology = {"ranksPerPod": 2, "cpusPerRank": 3, "memoryPerRank": "1Gi", "pinning": "best-effort"}
    pod = template(spec={"topology": topology})
    in_memory = sum(
        int(volume["emptyDir"]["sizeLimit"]) for volume in pod["spec"]["volumes"] if "emptyDir" in volume
    )

    memory = str(2 * 2**30 + in_memory)
    assert pod["spec"]["containers"][0]["resources"] == {
        "requests": {"cpu": "6", "memory": memory},
        "limits": {"memory": memory},
    }


# --- placement


@pytest.mark.parametrize("isa", ISA_TIERS)
def test_only_nodes_of_the_tier_will_do(isa: IsaTier, template: Make) -> None:
    """Every label of the tier is required: one term, so that all its expressions must hold."""
    affinity = template(isa)["spec"]["affinity"]["nodeAffinity"]

    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert set(affinity) == {"requiredDuringSchedulingIgnoredDuringExecution"}
    assert term == {
        "matchExpressions": [
            {"key": label, "operator": "In", "values": ["true"]} for label in names.TIER_LABELS[isa]
        ]
    }


def test_nodes_to_avoid_are_ruled_out_by_name(
    a_job: Callable[..., QLoRAJob],
    settings: Callable[..., Settings],
    misfits: Callable[[Any, str], list[str]],
) -> None:
    """In the one term that must hold, besides the tier: every name in a requirement of its own."""
    pod = pod_template(a_job(), "u", 3, "avx2", "a", settings(), avoid=("node-a", "node-b"))
    affinity = pod["spec"]["affinity"]["nodeAffinity"]

    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert len(term["matchExpressions"]) == len(names.TIER_LABELS["avx2"])
    assert term["matchFields"] == [
        {"key": "metadata.name", "operator": "NotIn", "values": ["node-a"]},
        {"key": "metadata.name", "operator": "NotIn", "values": ["node-b"]},
    ]
    assert misfits(pod, "V1PodTemplateSpec") == []


def test_pods_spread_over_nodes_where_they_can(template: Make) -> None:
    """Pods of the job keep away from each other's nodes, but go there rather than wait."""
    affinity = template()["spec"]["affinity"]["podAntiAffinity"]

    (preference,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    assert set(affinity) == {"preferredDuringSchedulingIgnoredDuringExecution"}
    assert preference["podAffinityTerm"] == {
        "labelSelector": {"matchLabels": {names.JOB_UID_LABEL: "u"}},
        "topologyKey": "kubernetes.io/hostname",
    }


def test_the_users_scheduling_is_taken_over(template: Make) -> None:
    """Node selector, tolerations and priority class stand in the pod as the user wrote them."""
    tolerations = [
        {"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0},
        {"operator": "Exists"},
    ]
    scheduling = {
        "nodeSelector": {"disk": "ssd"},
        "tolerations": tolerations,
        "priorityClassName": "low",
    }
    spec = template(spec={"scheduling": scheduling})["spec"]

    assert {key: spec[key] for key in scheduling} == scheduling


def test_what_nobody_set_is_left_to_the_cluster(template: Make) -> None:
    """Without a word of user and administrator the cluster's own defaults hold."""
    unset = {"nodeSelector", "tolerations", "priorityClassName", "schedulerName", "imagePullSecrets"}

    assert unset & set(template()["spec"]) == set()


# --- the administrator's settings


def test_the_administrators_settings_are_taken_over(template: Make) -> None:
    """Scheduler, pull secrets and pull policy stand in every pod."""
    spec = template(schedulerName="other", imagePullSecrets=["a", "b"], imagePullPolicy="Always")["spec"]

    assert spec["schedulerName"] == "other"
    assert spec["imagePullSecrets"] == [{"name": "a"}, {"name": "b"}]
    assert spec["containers"][0]["imagePullPolicy"] == "Always"


def test_the_operators_own_labels_and_annotations_win(template: Make) -> None:
    """The administrator's labels and annotations are added, and never hide whose a pod is or what it runs."""
    metadata = template(
        podLabels={"team": "a", names.JOB_UID_LABEL: "stolen"},
        podAnnotations={"note": "b", names.RUN_CONFIG_ANNOTATION: "{}"},
    )["metadata"]

    assert (metadata["labels"]["team"], metadata["labels"][names.JOB_UID_LABEL]) == ("a", "u")
    assert metadata["annotations"]["note"] == "b"
    assert json.loads(metadata["annotations"][names.RUN_CONFIG_ANNOTATION])["version"] == 1


# --- the container


def test_the_launcher_is_told_where_rank_0_is(template: Make) -> None:
    """The container runs the launcher, finds rank 0 of its own attempt, and writes only where it can."""
    (container,) = template()["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]

    assert container["command"] == ["python", "-m", "qlora_trainer.launch"]
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("small-a3-0.small-ranks", "29500")
    assert writable == ["/volumes/team", "/tmp", "/dev/shm"]
    assert {environment[name] for name in ("HOME", "TMPDIR", "HF_HOME")} == {"/tmp", "/tmp/hf"}


def test_a_failed_pod_says_why(template: Make) -> None:
    """The launcher's report, or else the end of the log, is what Kubernetes keeps of the container."""
    (container,) = template()["spec"]["containers"]

    assert container["terminationMessagePath"] == "/dev/termination-log"
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_pods_have_the_time_that_the_user_gives_them_to_end(template: Make) -> None:
    """The grace period of the pod is the one that the launcher counts with."""
    pod = template(spec={"terminationGracePeriodSeconds": 40})
    run = json.loads(pod["metadata"]["annotations"][names.RUN_CONFIG_ANNOTATION])

    assert pod["spec"]["terminationGracePeriodSeconds"] == 40
    assert run["terminationGracePeriodSeconds"] == 40
    assert pod["spec"]["restartPolicy"] == "Never"
