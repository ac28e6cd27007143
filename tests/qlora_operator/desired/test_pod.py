"""The pods of an attempt."""

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from builders import environment_of
from qlora_contract.env import HANDOFF_ENV, PRICE_ENV, REQUESTED_ENV
from qlora_contract.run_config import ISA_TIERS, IsaTier, ResolvedRevisions, RunConfig, RunStage
from qlora_operator.api import names
from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.desired.pod import LOOPBACK, pod_template
from qlora_operator.settings import Settings

Make = Callable[..., dict[str, Any]]
ANNOTATIONS_LIMIT = 256 * 1024
"""Bytes of all keys and values of an object's annotations, as the API server counts them."""


@pytest.fixture
def template(a_job: Callable[..., QLoRAJob], settings: Callable[..., Settings]) -> Make:
    """A maker of templates: settings by keyword, the spec as `spec`."""

    def make(
        isa: IsaTier = "avx512",
        spec: dict[str, Any] | None = None,
        stage: RunStage = "train",
        avoid: Sequence[str] = (),
        shun: Sequence[str] = (),
        requested: str | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        job = a_job(**(spec or {}))
        run = to_run_config(job, uid="u", attempt=3, isa=isa, stage=stage)
        return pod_template(job, run, "registry.example/t:1", settings(**fields), avoid, shun, requested)

    return make


def run_of(attempt: dict[str, Any]) -> RunConfig:
    """The RunConfig of a random attempt."""
    given = ("uid", "attempt", "isa", "stage", "fetched")
    return to_run_config(attempt["job"], **{name: attempt[name] for name in given})


def template_of(attempt: dict[str, Any]) -> dict[str, Any]:
    """The template of a random attempt."""
    return pod_template(attempt["job"], run_of(attempt), attempt["image"], attempt["settings"])


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
    attempts: SearchStrategy[dict[str, Any]], data: st.DataObject
) -> None:
    """Whatever users and administrators write, a namespace that enforces *restricted* admits the pods."""
    pod = template_of(data.draw(attempts))

    assert violations(pod) == []
    for container in pod["spec"]["containers"]:
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["enableServiceLinks"] is False


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


# --- what the report tells of cost


@pytest.mark.parametrize(
    ("stage", "fields", "expected"),
    [
        pytest.param("train", {}, {}, id="nothing is known"),
        pytest.param(
            "train",
            {"requested": "2026-01-31T12:00:00Z", "costs": {"pricePerCoreHour": 0.04, "currency": "EUR"}},
            {REQUESTED_ENV: "2026-01-31T12:00:00Z", PRICE_ENV: "0.04 EUR"},
            id="both",
        ),
        pytest.param(
            "fetch",
            {"requested": "2026-01-31T12:00:00Z", "costs": {"pricePerCoreHour": 1.0}},
            {},
            id="transfers write no report",
        ),
    ],
)
def test_ranks_are_told_the_price_and_since_when_they_were_waited_for(
    stage: RunStage, fields: dict[str, Any], expected: dict[str, str], template: Make
) -> None:
    """Neither is the job's own business, so neither is in its RunConfig."""
    environment = environment_of(template(stage=stage, **fields))

    told = {name: environment[name] for name in (REQUESTED_ENV, PRICE_ENV) if environment.get(name)}
    assert told == expected


# --- RunConfig


@hypothesis.settings(deadline=None)
@given(data=st.data())
def test_the_ranks_read_what_the_user_wrote(
    attempts: SearchStrategy[dict[str, Any]], data: st.DataObject
) -> None:
    """The annotation, read back by the trainer's own class, is the attempt's RunConfig, whatever is in it."""
    attempt = data.draw(attempts)
    annotation = template_of(attempt)["metadata"]["annotations"][names.RUN_CONFIG_ANNOTATION]
    read = RunConfig.model_validate_json(annotation)

    assert read == run_of(attempt)
    assert (read.stage, read.fetched) == (attempt["stage"], attempt["fetched"])
    assert read.training.model_dump() == attempt["job"].spec.training.model_dump()


def test_the_largest_run_config_fits_an_annotation(template: Make) -> None:
    """With every bound of the API exhausted by the longest characters, half the room is left."""
    secret = "s" * 253
    remote = {"source": "s3://buc/" + "\U0001f600" * 503, "credentialsSecret": secret}
    spec = {
        "workspace": "pvc://c/" + "\U0001f600" * 504,
        "model": remote,
        "dataset": {**remote, "trainSplit": "s" * 64, "evalSplit": "s" * 64},
        "output": {"destination": remote["source"], "credentialsSecret": secret},
        "adapter": {"targetModules": ["\x01" * 254 + f"{number:02}" for number in range(64)]},
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
    attempts: SearchStrategy[dict[str, Any]], data: st.DataObject
) -> None:
    """With strict pinning a kubelet with static CPU management gives the ranks' pod CPUs of its own."""
    attempt = {**data.draw(attempts), "stage": "train"}
    pod = template_of(attempt)
    topology = attempt["job"].spec.topology
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


def test_autoscalers_leave_pods_where_they_are(template: Make) -> None:
    """To save a node they would restart a whole attempt; administrators may let them."""
    name = "cluster-autoscaler.kubernetes.io/safe-to-evict"

    assert template("avx2")["metadata"]["annotations"][name] == "false"
    assert template("avx2")["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"
    assert template("avx2", podAnnotations={name: "true"})["metadata"]["annotations"][name] == "true"


def test_nodes_that_are_shunned_are_the_last_choice(
    template: Make, misfits: Callable[[Any, str], list[str]]
) -> None:
    """A preference: if there are no others, the pods go there all the same."""
    affinity = template("avx2", shun=("node-a", "node-b"))["spec"]["affinity"]["nodeAffinity"]
    required = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    (preferred,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]

    assert "matchFields" not in required[0]
    assert [each["values"] for each in preferred["preference"]["matchFields"]] == [["node-a"], ["node-b"]]
    assert misfits(affinity, "V1NodeAffinity") == []


def test_nodes_to_avoid_are_ruled_out_by_name(
    template: Make, misfits: Callable[[Any, str], list[str]]
) -> None:
    """In the one term that must hold, besides the tier: every name in a requirement of its own."""
    pod = template("avx2", avoid=("node-a", "node-b"))
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
    assert template()["spec"]["topologySpreadConstraints"] == [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {names.JOB_UID_LABEL: "u"}},
        }
    ]


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
    unset = {
        "nodeSelector",
        "tolerations",
        "priorityClassName",
        "schedulerName",
        "imagePullSecrets",
        "hostUsers",
    }

    assert unset & set(template()["spec"]) == set()


# --- the administrator's settings


def test_the_administrators_settings_are_taken_over(template: Make) -> None:
    """Scheduler, user namespace, pull secrets and pull policy stand in every pod."""
    spec = template(
        schedulerName="other", hostUsers=False, imagePullSecrets=["a", "b"], imagePullPolicy="Always"
    )["spec"]

    assert (spec["schedulerName"], spec["hostUsers"]) == ("other", False)
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
    pod = template(spec={"topology": {"pods": 2}})
    (container,) = pod["spec"]["containers"]
    environment = environment_of(pod)
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


# --- transfers

TRANSFERS: tuple[RunStage, ...] = ("fetch", "publish")
REMOTE = {
    "model": {"source": "hf://org/model", "credentialsSecret": "hub"},
    "dataset": {"source": "s3://bucket/data", "credentialsSecret": "store"},
    "output": {"destination": "hf://org/adapter", "credentialsSecret": "writer"},
}
NETWORK = {
    "serviceAccountName": "transfers",
    "httpProxy": "http://proxy.example:3128",
    "httpsProxy": "http://proxy.example:3129",
    "noProxy": "s3.example",
    "caBundleConfigMap": "authorities",
    "hubEndpoint": "https://hub.example",
    "s3Endpoint": "https://s3.example",
    "s3Region": "eu-1",
}
SCRATCH = {"HOME": "/tmp", "TMPDIR": "/tmp", "HF_HOME": "/tmp/hf", "PYTHONUNBUFFERED": "1"}


def test_a_transfer_runs_the_transfers_module(template: Make) -> None:
    """Fetch and publish have a command, a role and resources of their own, in a pod like the ranks' otherwise."""
    topology = {"pods": 4, "ranksPerPod": 2, "cpusPerRank": 8, "memoryPerRank": "64Gi", "pinning": "strict"}
    for stage, role in (("fetch", "fetcher"), ("publish", "publisher")):
        pod = template(spec={**REMOTE, "topology": topology}, stage=stage)
        container = pod["spec"]["containers"][0]

        assert container["name"] == names.TRAINER_CONTAINER
        assert container["command"] == ["python", "-m", "qlora_trainer.transfer"]
        assert "args" not in container
        assert pod["metadata"]["labels"][names.ROLE_LABEL] == role
        assert container["resources"] == {
            "requests": {"cpu": "900m" if stage == "fetch" else "1", "memory": "2Gi"},
            "limits": {"memory": "2Gi"},
        }
        assert violations(pod) == []


def test_an_export_is_one_rank_alone(template: Make) -> None:
    """With what each rank has that trained; the nodes of the others are free, and it meets nobody."""
    topology = {"pods": 4, "ranksPerPod": 2, "cpusPerRank": 8, "memoryPerRank": "64Gi", "pinning": "strict"}
    spec = {**REMOTE, "topology": topology, "output": {"formats": ["merged"]}}
    pod = template(spec=spec, stage="export", transfer=NETWORK)
    (container,) = pod["spec"]["containers"]

    assert pod["metadata"]["labels"][names.ROLE_LABEL] == "exporter"
    assert container["command"] == ["python", "-m", "qlora_trainer.launch"]
    both = {"cpu": "8", "memory": str(64 * 2**30 + 256 * 2**20 + 64 * 2**20)}
    assert container["resources"] == {"requests": both, "limits": both}
    assert environment_of(pod)["MASTER_ADDR"] == LOOPBACK
    assert "serviceAccountName" not in pod["spec"]
    run = json.loads(pod["metadata"]["annotations"][names.RUN_CONFIG_ANNOTATION])
    assert run["stage"] == "export"
    assert (run["layout"].get("pods", 1), run["layout"].get("ranksPerPod", 1)) == (1, 1)
    assert violations(pod) == []


def test_a_proxys_password_stays_in_its_secret(template: Make) -> None:
    """Transfers have its address from there and from nowhere else; ranks, which need no proxy, have nothing of it."""
    for stage in ("fetch", "train", "publish"):
        pod = template(spec=REMOTE, stage=stage, transfer={**NETWORK, "proxySecret": "proxy"})
        found = [each for each in pod["spec"]["containers"][0]["env"] if each["name"].endswith("S_PROXY")]
        reference = {"name": "proxy", "key": "HTTPS_PROXY", "optional": True}
        wanted = [{"name": "HTTPS_PROXY", "valueFrom": {"secretKeyRef": reference}}]

        assert found == ([] if stage == "train" else wanted)
        assert "proxy.example" not in json.dumps(pod)


def test_the_administrator_sizes_transfers(template: Make) -> None:
    """transfer.cpu and transfer.memory are the transfers' alone."""
    transfer = {"cpu": "250m", "memory": "512Mi"}

    requests = {
        stage: [
            container["resources"]["requests"]
            for container in template(spec=REMOTE, stage=stage, transfer=transfer)["spec"]["containers"]
        ]
        for stage in ("fetch", "publish")
    }

    assert requests == {
        "fetch": [{"cpu": "150m", "memory": "512Mi"}, {"cpu": "100m", "memory": "512Mi"}],
        "publish": [transfer],
    }
    assert template(spec=REMOTE, transfer=transfer) == template(spec=REMOTE)


@pytest.mark.parametrize("stage", TRANSFERS)
def test_a_transfer_is_told_of_the_administrators_network(stage: RunStage, template: Make) -> None:
    """Proxy, authorities, mirror and S3 server stand in the environment under the names that libraries read."""
    ca_file = "/etc/qlora/ca/ca.crt"

    assert environment_of(template(spec=REMOTE, stage=stage, transfer=NETWORK)) == {
        **SCRATCH,
        "HTTP_PROXY": "http://proxy.example:3128",
        "HTTPS_PROXY": "http://proxy.example:3129",
        "NO_PROXY": "s3.example",
        "SSL_CERT_FILE": ca_file,
        "REQUESTS_CA_BUNDLE": ca_file,
        "AWS_CA_BUNDLE": ca_file,
        "HF_ENDPOINT": "https://hub.example",
        "AWS_ENDPOINT_URL_S3": "https://s3.example",
        "AWS_DEFAULT_REGION": "eu-1",
    }


@pytest.mark.parametrize("stage", TRANSFERS)
def test_what_the_administrator_leaves_out_is_not_in_the_environment(stage: RunStage, template: Make) -> None:
    """An empty variable would mean something else to a library than none."""
    handoff = {HANDOFF_ENV: "/run/qlora/handoff"} if stage == "fetch" else {}
    assert environment_of(template(spec=REMOTE, stage=stage)) == {**SCRATCH, **handoff}


def test_beside_a_fetch_somebody_looks_at_the_data(template: Make) -> None:
    """With the memory of a transfer and hardly a CPU, and with nothing of what the fetch is told or may write."""
    network = {name: value for name, value in NETWORK.items() if name != "serviceAccountName"}
    pod = template(spec=REMOTE, stage="fetch", transfer={**network, "memory": "3Gi", "proxySecret": "proxy"})
    _, container = pod["spec"]["containers"]

    assert (container["name"], container["command"]) == ("check", ["python", "-m", "qlora_trainer.check"])
    assert {entry["name"]: entry["value"] for entry in container["env"]} == {
        **SCRATCH,
        HANDOFF_ENV: "/run/qlora/handoff",
    }
    assert container["resources"] == {
        "requests": {"cpu": "100m", "memory": "3Gi"},
        "limits": {"memory": "3Gi"},
    }
    secret = {volume["name"] for volume in pod["spec"]["volumes"] if {"secret", "configMap"} & set(volume)}
    assert secret
    assert not secret & {mount["name"] for mount in container["volumeMounts"]}
    assert violations(pod) == []


@pytest.mark.parametrize(
    ("stage", "transfer"),
    [("train", {}), ("export", {}), ("publish", {}), ("fetch", {"serviceAccountName": "transfers"})],
    ids=["train", "export", "publish", "a fetch with an identity"],
)
def test_elsewhere_nobody_looks_at_the_data(
    stage: RunStage, transfer: dict[str, Any], template: Make
) -> None:
    """The identity of a pod is that of all its containers, so data are not read in one that has any."""
    pod = template(spec=REMOTE, stage=stage, transfer=transfer)

    assert [container["name"] for container in pod["spec"]["containers"]] == ["trainer"]
    assert "handoff" not in [volume["name"] for volume in pod["spec"]["volumes"]]


@pytest.mark.parametrize(
    ("stage", "account"),
    [("fetch", "transfers"), ("train", None), ("publish", "transfers")],
    ids=["fetch", "train", "publish"],
)
def test_only_transfers_have_a_service_account(stage: RunStage, account: str | None, template: Make) -> None:
    """The workload identity is a credential; even who has it gets no token of the cluster's API."""
    spec = template(spec=REMOTE, stage=stage, transfer=NETWORK)["spec"]

    assert spec.get("serviceAccountName") == account
    assert spec["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in template(spec=REMOTE, stage=stage)["spec"]


def test_ranks_know_nothing_of_transfers(template: Make) -> None:
    """Whatever the administrator sets for transfers, the ranks' pods are the same, with no Secret in them."""
    pod = template(spec=REMOTE, transfer=NETWORK)

    assert pod == template(spec=REMOTE)
    assert [volume for volume in pod["spec"]["volumes"] if {"secret", "configMap"} & set(volume)] == []


@hypothesis.settings(deadline=None)
@given(data=st.data())
def test_credentials_are_files_of_transfers_only(
    attempts: SearchStrategy[dict[str, Any]], data: st.DataObject
) -> None:
    """In no stage does a pod name more Secrets than its transfer shows, and in its environment only the proxies'."""
    attempt = data.draw(attempts)
    pod, spec = template_of(attempt), attempt["job"].spec
    named = {
        "fetch": [spec.model.credentials_secret, spec.dataset.credentials_secret],
        "train": [spec.tracking.mlflow.credentials_secret if spec.tracking.mlflow is not None else None],
        "export": [],
        "publish": [spec.output.credentials_secret],
    }[attempt["stage"]]
    mounted = [volume["secret"]["secretName"] for volume in pod["spec"]["volumes"] if "secret" in volume]
    container, *others = pod["spec"]["containers"]

    assert mounted == [name for name in named if name is not None]
    proxies = attempt["settings"].transfer.proxy_secret if attempt["stage"] in TRANSFERS else None
    references = [entry["valueFrom"] for entry in container["env"] if "valueFrom" in entry]
    sources = [each["secretKeyRef"]["name"] for each in references if "secretKeyRef" in each]
    assert set(sources) == ({proxies} if proxies is not None else set())
    assert "envFrom" not in container
    for other in others:
        paths = [mount["mountPath"] for mount in other["volumeMounts"]]
        assert not any(path.startswith("/etc/qlora/c") for path in paths)
        assert all({*entry} == {"name", "value"} for entry in other["env"])
    account = attempt["settings"].transfer.service_account_name if attempt["stage"] in TRANSFERS else None
    assert pod["spec"].get("serviceAccountName") == account


def test_a_transfer_goes_where_the_ranks_may_or_where_the_claim_is(template: Make) -> None:
    """A claim may be bound to the first node that uses it: sources are fetched where ranks may run. It is bound when
    the adapter is sent, and that needs no processor of a kind, but the user's own selection holds."""
    scheduling = {"nodeSelector": {"disk": "ssd"}, "tolerations": [{"operator": "Exists"}]}
    spec = {**REMOTE, "scheduling": scheduling}
    placed = ("affinity", "nodeSelector", "tolerations")
    ranks = template("amx_bf16", spec=spec, avoid=["node-a"])["spec"]

    fetcher, publisher = (
        template("amx_bf16", spec=spec, avoid=["node-a"], stage=stage)["spec"] for stage in TRANSFERS
    )
    assert {key: fetcher[key] for key in placed} == {key: ranks[key] for key in placed}
    assert "affinity" not in publisher
    assert {key: publisher[key] for key in placed[1:]} == {key: ranks[key] for key in placed[1:]}


def test_a_transfer_knows_what_was_fetched_before(a_job: Callable[..., QLoRAJob], settings: Any) -> None:
    """The revisions that the job has found stand in run.json, so that a second fetch finds the same."""
    known = ResolvedRevisions(model="c" * 40)
    job = a_job(**REMOTE)
    run = to_run_config(job, uid="u", attempt=1, isa="avx2", stage="fetch", fetched=known)

    annotations = pod_template(job, run, "a", settings())["metadata"]["annotations"]

    read = json.loads(annotations[names.RUN_CONFIG_ANNOTATION])
    assert (read["stage"], read["fetched"]) == ("fetch", {"model": "c" * 40})
