"""What the children of a job may be, said once more and independently of the code that makes them."""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.desired.admission import policy_violation
from qlora_operator.desired.attempt_job import attempt_job
from qlora_operator.desired.network import network_policy
from qlora_operator.desired.service import ranks_service
from qlora_operator.settings import Settings

Object = dict[str, Any]
NAMESPACE = "team-a"
UID = "6c7c3c4b-0000-4000-8000-000000000001"
IMAGE = "registry.example/trainer:1"
ALLOWED_IMAGE = "registry.example/team/"
STAGES = ("fetch", "train", "publish")

POD_KEYS = {
    "affinity",
    "automountServiceAccountToken",
    "containers",
    "enableServiceLinks",
    "nodeSelector",
    "priorityClassName",
    "restartPolicy",
    "securityContext",
    "subdomain",
    "terminationGracePeriodSeconds",
    "tolerations",
    "topologySpreadConstraints",
    "volumes",
}
"""No hostNetwork, hostPID, hostUsers, serviceAccountName, initContainers, nodeName, schedulerName or dnsConfig."""
CONTAINER_KEYS = {
    "command",
    "env",
    "image",
    "imagePullPolicy",
    "name",
    "ports",
    "resources",
    "securityContext",
    "terminationMessagePath",
    "terminationMessagePolicy",
    "volumeMounts",
}
"""No args, envFrom, lifecycle or probes, which run commands of their own."""
COMMANDS = {
    "fetch": ["python", "-m", "qlora_trainer.transfer"],
    "train": ["python", "-m", "qlora_trainer.launch"],
    "publish": ["python", "-m", "qlora_trainer.transfer"],
}
CHECK = ["python", "-m", "qlora_trainer.check"]
ENVIRONMENT = {
    "HF_HOME",
    "HOME",
    "QLORA_HANDOFF",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PYTHONUNBUFFERED",
    "QLORA_REQUESTED",
    "TMPDIR",
}
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "runAsGroup": 1000,
    "fsGroup": 1000,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
VOLUMES = {"persistentVolumeClaim", "secret", "downwardAPI", "emptyDir"}
OWN_LABEL = re.compile(r"(qlora\.dev|app\.kubernetes\.io)/")


@pytest.fixture(scope="session")
def administrator() -> Settings:
    """What the administrator set."""
    return Settings.model_validate({"trainerImage": IMAGE, "allowedImages": [f"{ALLOWED_IMAGE}*"]})


@pytest.fixture(scope="session")
def children(administrator: Settings) -> Callable[[QLoRAJob], dict[str, list[Object]]]:
    """children(job) -> by stage, all that the operator makes for it; nothing for a job that it refuses."""

    def make(job: QLoRAJob) -> dict[str, list[Object]]:
        if policy_violation(job, administrator) is not None:
            return {}
        image = job.spec.image or administrator.trainer_image
        return {
            stage: [
                attempt_job(
                    job,
                    uid=UID,
                    attempt=0,
                    isa="avx512",
                    image=image,
                    settings=administrator,
                    stage=stage,
                ),
                ranks_service(job, uid=UID),
                network_policy(job, uid=UID, settings=administrator),
            ]
            for stage in STAGES
        }

    return make


@pytest.fixture(scope="session")
def breaches(children: Callable[[QLoRAJob], dict[str, list[Object]]]) -> Callable[[QLoRAJob], list[str]]:
    """breaches(job) -> what its children have that they must not, each in a phrase; none is as it should be."""

    def look(job: QLoRAJob) -> list[str]:
        document = job.model_dump(by_alias=True, mode="json")
        made = children(job)
        return [
            f"{stage} {child['kind']}: {breach}"
            for stage, objects in made.items()
            for child in objects
            for breach in itertools.chain(_metadata(child, document), _kind(child, document, stage))
        ]

    return look


def _metadata(child: Object, job: Object) -> Iterator[str]:
    """Of every child: in the job's namespace, named after the job, owned by it, with the operator's labels."""
    metadata, name = child["metadata"], job["metadata"]["name"]
    if metadata["namespace"] != NAMESPACE:
        yield f"in namespace {metadata['namespace']}"
    if metadata["name"] not in (f"{name}-a0", f"{name}-ranks"):
        yield f"called {metadata['name']}"
    if [owner["uid"] for owner in metadata["ownerReferences"]] != [UID]:
        yield f"owned by {metadata['ownerReferences']}"
    yield from _labels(metadata["labels"], name, {"kueue.x-k8s.io/queue-name"})


def _labels(labels: dict[str, str], name: str, others: set[str]) -> Iterator[str]:
    fixed = {
        "app.kubernetes.io/name": "qlorajob",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/managed-by": "qlora-operator",
        "qlora.dev/job-name": name,
        "qlora.dev/job-uid": UID,
    }
    if not fixed.items() <= labels.items():
        yield f"labels {labels}"
    if strange := {key for key in labels if not OWN_LABEL.match(key)} - others:
        yield f"labels {strange}"


def _kind(child: Object, job: Object, stage: str) -> Iterator[str]:
    if child["kind"] == "Job":
        yield from _gang(child["spec"], job, stage)
    elif child["kind"] == "Service":
        if child["spec"]["selector"]["qlora.dev/job-uid"] != UID or child["spec"]["clusterIP"] != "None":
            yield f"a service for {child['spec']}"
    elif child["kind"] == "NetworkPolicy":
        own = {"podSelector": {"matchLabels": {"qlora.dev/job-uid": UID}}}
        if (
            child["spec"]["ingress"] != [{"from": [own]}]
            or child["spec"]["podSelector"] != own["podSelector"]
        ):
            yield f"open to {child['spec']['ingress']}"
    else:
        yield "an object that no job needs"


def _gang(spec: Object, job: Object, stage: str) -> Iterator[str]:
    template = spec["template"]
    yield from _labels(template["metadata"]["labels"], job["metadata"]["name"], set())
    stay = {"karpenter.sh/do-not-disrupt", "cluster-autoscaler.kubernetes.io/safe-to-evict"}
    told = {"qlora.dev/run-config"} | ({"qlora.dev/rank-zero"} if stage == "train" else set())
    if set(template["metadata"]["annotations"]) - stay != told:
        yield f"annotations {set(template['metadata']['annotations'])}"
    yield from _pod(template["spec"], job)
    container, *others = template["spec"]["containers"]
    shown = {mount["name"] for mount in container["volumeMounts"]}
    of_others = {mount["name"] for other in others for mount in other["volumeMounts"]} - shown
    if [other["name"] for other in others] != (["check"] if stage == "fetch" else []):
        yield f"containers {others}"
    yield from _container(container, COMMANDS[stage])
    volumes = template["spec"]["volumes"]
    mine = [volume for volume in volumes if volume["name"] not in of_others]
    yield from _volumes(mine, container["volumeMounts"], job, stage)
    for other in others:
        yield from _container(other, CHECK)
        yield from _check(volumes, other["volumeMounts"], job)


def _pod(pod: Object, job: Object) -> Iterator[str]:
    if more := set(pod) - POD_KEYS:
        yield f"pod fields {more}"
    if pod["securityContext"] != POD_SECURITY:
        yield f"pod security {pod['securityContext']}"
    if pod["automountServiceAccountToken"] is not False or pod["enableServiceLinks"] is not False:
        yield "a service account's token, or others' addresses"
    scheduling = job["spec"]["scheduling"]
    if pod.get("nodeSelector", {}) != scheduling["nodeSelector"]:
        yield f"node selector {pod['nodeSelector']}"
    if pod.get("priorityClassName") != scheduling["priorityClassName"]:
        yield f"priority {pod['priorityClassName']}"
    if len(pod.get("tolerations", [])) != len(scheduling["tolerations"]):
        yield f"tolerations {pod['tolerations']}"


def _check(volumes: list[Object], mounts: list[Object], job: Object) -> Iterator[str]:
    """Of the container that reads files of strangers: no credentials, and nothing to write to but its own /tmp."""
    named = {mount["name"] for mount in mounts}
    seen = [volume for volume in volumes if volume["name"] in named]
    if any({"secret", "configMap", "projected"} & set(volume) for volume in seen):
        yield f"what reads the data has {seen}"
    if (claims := _named(seen, "persistentVolumeClaim", "claimName")) != _claims(job["spec"], "train"):
        yield f"what reads the data has the claims {claims}"
    if written := {mount["name"] for mount in mounts if not mount.get("readOnly")} - {"check-tmp"}:
        yield f"what reads the data may write {written}"
    for mount in mounts:
        yield from _mount(mount)


def _container(container: Object, command: list[str]) -> Iterator[str]:
    if more := set(container) - CONTAINER_KEYS:
        yield f"container fields {more}"
    if container["securityContext"] != RESTRICTED:
        yield f"security {container['securityContext']}"
    if container["image"] != IMAGE and not container["image"].startswith(ALLOWED_IMAGE):
        yield f"image {container['image']}"
    if container["command"] != command:
        yield f"command {container['command']}"
    for entry in container["env"]:
        of_the_pod = re.fullmatch(
            r"metadata\.annotations\['qlora\.dev/(rank-zero|requested)'\]",
            entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", ""),
        )
        known = {"name", "valueFrom"} if of_the_pod else {"name", "value"}
        if set(entry) != known or entry["name"] not in ENVIRONMENT or "$" in entry.get("value", ""):
            yield f"environment {entry}"


def _volumes(volumes: list[Object], mounts: list[Object], job: Object, stage: str) -> Iterator[str]:
    if {volume["name"] for volume in volumes} != {mount["name"] for mount in mounts}:
        yield "volumes that are not mounted, or the other way round"
    kinds = [set(volume) - {"name"} for volume in volumes]
    if any(len(kind) != 1 or not kind <= VOLUMES for kind in kinds):
        yield f"volumes {kinds}"
    if (claims := _named(volumes, "persistentVolumeClaim", "claimName")) != _claims(job["spec"], stage):
        yield f"claims {claims}"
    if (secrets := _named(volumes, "secret", "secretName")) != _secrets(job["spec"], stage):
        yield f"Secrets {secrets}"
    for mount in mounts:
        yield from _mount(mount)
    for volume, mount in zip(volumes, mounts, strict=True):
        own = volume.get("persistentVolumeClaim", {}).get("claimName") == _claim(job["spec"]["workspace"])
        if "persistentVolumeClaim" in volume and mount["readOnly"] is not (not own):
            yield f"claim {volume} is mounted to be written, or the workspace is not"


def _mount(mount: Object) -> Iterator[str]:
    path = mount["mountPath"]
    if "subPath" in mount or "subPathExpr" in mount or ".." in path.split("/"):
        yield f"mount {mount}"
    own = path in ("/tmp", "/dev/shm", "/etc/qlora", "/run/qlora/handoff")
    if not own and not re.fullmatch(
        r"/volumes/[^/]+|/etc/qlora/credentials/(model|dataset|output|adapter-initialadapter)", path
    ):
        yield f"mount at {path}"


def _named(volumes: list[Object], kind: str, key: str) -> set[str]:
    return {volume[kind][key] for volume in volumes if kind in volume}


def _claims(spec: Object, stage: str) -> set[str]:
    """The claims that a stage may see: the workspace's, and while training those of what it reads."""
    initial = [spec["adapter"]["initialAdapter"]] if spec["adapter"]["initialAdapter"] else []
    uris = [spec["model"]["source"], spec["dataset"]["source"], *initial] if stage == "train" else []
    return {_claim(uri) for uri in (spec["workspace"], *uris) if uri.startswith("pvc://")}


def _claim(uri: str) -> str:
    return uri.split("/")[2]


def _secrets(spec: Object, stage: str) -> set[str]:
    """The Secrets that a stage may see: those of what it transfers."""
    parts = {"fetch": ("model", "dataset"), "train": (), "publish": ("output",)}[stage]
    named = {spec[part]["credentialsSecret"] for part in parts}
    if stage == "fetch":
        named.add(spec["adapter"]["initialAdapterCredentialsSecret"])
    return named - {None}
