"""A pod of an attempt: what all pods of its Job are made from."""

import json
from collections.abc import Sequence
from typing import Any

from qlora_contract import entry_points
from qlora_contract.env import (
    HANDOFF_ENV,
    PRICE_ENV,
    PROGRESS_PORT,
    RENDEZVOUS_PORT,
    REQUESTED_ENV,
    WEB_SOURCES_ENV,
)
from qlora_contract.paths import HANDOFF_ROOT, TERMINATION_LOG
from qlora_contract.remote import WEB
from qlora_contract.run_config import TRANSFERS, IsaTier, RunConfig, RunStage
from qlora_operator.api import names
from qlora_operator.api.pod_resources import fetch_cpus, pod_cpus, pod_memory, stage_topology
from qlora_operator.api.v1alpha1 import QLoRAJob, Scheduling, Topology
from qlora_operator.desired.defaults import scheduling
from qlora_operator.desired.metadata import labels, pods_of
from qlora_operator.desired.service import has_service
from qlora_operator.desired.volumes import CA_BUNDLE, TMP, check_volumes, volumes
from qlora_operator.settings import Settings, TransferSettings

ROLES: dict[RunStage, names.Role] = {
    "fetch": names.Role.FETCHER,
    "train": names.Role.TRAINER,
    "export": names.Role.EXPORTER,
    "publish": names.Role.PUBLISHER,
}
_MODULES: dict[RunStage, str] = {
    "fetch": entry_points.TRANSFER,
    "train": entry_points.LAUNCH,
    "export": entry_points.LAUNCH,
    "publish": entry_points.TRANSFER,
}

LOOPBACK = "127.0.0.1"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY")

SCRATCH = {"HOME": TMP, "TMPDIR": TMP, "HF_HOME": f"{TMP}/hf", "PYTHONUNBUFFERED": "1"}
"""The root is read-only, and the user has no home."""

_NOT_TO_BE_MOVED = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}
"""Keeps autoscalers from moving pods to save nodes: it would restart all of an attempt's ranks."""


def pod_template(
    job: QLoRAJob,
    run: RunConfig,
    image: str,
    settings: Settings,
    avoid: Sequence[str] = (),
    shun: Sequence[str] = (),
    requested: str | None = None,
) -> dict[str, Any]:
    """The pod template of an attempt, with its RunConfig as an annotation.

    An object may have 256 KiB of annotations; the API's bounds keep a RunConfig below half of that.

    Args:
        job: as the user wrote it.
        run: the attempt.
        image: the trainer's.
        settings: the administrator's.
        avoid: names of nodes that the pods may not go to.
        shun: names of nodes that the pods go to if there are no others.
        requested: when the attempt was decided upon, RFC 3339.
    """
    uid, attempt, role = run.job.uid, run.job.attempt, ROLES[run.stage]
    given = job.metadata.annotations
    topology = {name: given[name] for name in names.TOPOLOGY_ANNOTATIONS if name in given}
    annotations = {**topology, **_of_attempt(job, run, requested)}
    pull_secrets = [{"name": name} for name in settings.image_pull_secrets]
    account = settings.transfer.service_account_name
    checks = run.stage == "fetch" and settings.transfer.checks_data
    mounted = volumes(job.spec, run.stage, settings) + (check_volumes(job.spec) if checks else [])
    where, tier = scheduling(job.spec.scheduling, settings), None if run.stage == "publish" else run.isa
    return {
        "metadata": {
            "labels": {**settings.pod_labels, **labels(job, uid, role, attempt)},
            "annotations": {**_NOT_TO_BE_MOVED, **settings.pod_annotations, **annotations},
        },
        "spec": {
            "restartPolicy": "Never",
            **({"subdomain": names.ranks_service(job.metadata.name)} if has_service(job) else {}),
            "terminationGracePeriodSeconds": job.spec.termination_grace_period_seconds,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            **({} if settings.host_users is None else {"hostUsers": settings.host_users}),
            "securityContext": _pod_security(settings),
            # Sources are fetched where ranks may run: a claim may be bound to the first node that uses it. When the
            # adapter is sent it is bound, and any processor will do.
            **_placement(where, uid, None if tier is None else _affinity(tier, avoid, shun), settings),
            **({"imagePullSecrets": pull_secrets} if pull_secrets else {}),
            # A workload identity is a credential, and ranks have none.
            **({"serviceAccountName": account} if account is not None and run.stage in TRANSFERS else {}),
            "containers": [
                _container(job, run, image, settings),
                *([_check_container(job, image, settings)] if checks else []),
            ],
            # The two of a fetch share some.
            "volumes": list({volume["name"]: volume for volume, _ in mounted}.values()),
        },
    }


def _pod_security(settings: Settings) -> dict[str, Any]:
    """Pod Security *restricted*, with the ids that the administrator gave."""
    ids = {
        "runAsUser": settings.run_as_user,
        "runAsGroup": settings.run_as_group,
        "fsGroup": settings.fs_group,
        # By default every file of every volume is given to the group before each start.
        "fsGroupChangePolicy": None if settings.fs_group is None else "OnRootMismatch",
    }
    given = {key: value for key, value in ids.items() if value is not None}
    return {"runAsNonRoot": True, **given, "seccompProfile": {"type": "RuntimeDefault"}}


def _placement(
    asked: Scheduling, uid: str, affinity: dict[str, Any] | None, settings: Settings
) -> dict[str, Any]:
    """Where the pods may go; unset fields are left out."""
    # Prefers different nodes for the pods of a job, so that they do not share memory bandwidth. Anti-affinity would
    # make the scheduler look at the pods of all jobs; with neither, it would search the namespace's Services for
    # what to spread.
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": pods_of(uid),
    }
    fields = {
        "affinity": affinity,
        "topologySpreadConstraints": [spread],
        "nodeSelector": dict(asked.node_selector),
        "tolerations": [
            toleration.model_dump(by_alias=True, exclude_none=True) for toleration in asked.tolerations
        ],
        "priorityClassName": asked.priority_class_name,
        "schedulerName": settings.scheduler_name,
    }
    return {key: value for key, value in fields.items() if value}


def _affinity(isa: IsaTier, avoid: Sequence[str], shun: Sequence[str]) -> dict[str, Any]:
    """Requires nodes of the tier, and prefers some of them. A tier that was only preferred would be weighed pod by pod,
    and an attempt could mix tiers."""
    term: dict[str, Any] = {
        "matchExpressions": [
            {"key": label, "operator": "In", "values": ["true"]} for label in names.TIER_LABELS[isa]
        ]
    }
    if avoid:
        term["matchFields"] = _not_in(avoid)
    rules: dict[str, Any] = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    if shun:
        preference = {"weight": 100, "preference": {"matchFields": _not_in(shun)}}
        rules["preferredDuringSchedulingIgnoredDuringExecution"] = [preference]
    return {"nodeAffinity": rules}


def _not_in(nodes: Sequence[str]) -> list[dict[str, Any]]:
    """By name, not by the label kubernetes.io/hostname, which may differ; the API server allows one name for each
    requirement."""
    return [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]


_REFERENCES = {"MASTER_ADDR": names.RANK_ZERO_ANNOTATION, REQUESTED_ENV: names.REQUESTED_ANNOTATION}
"""Variables -> the annotations of the pod that have their values."""


def _of_attempt(job: QLoRAJob, run: RunConfig, requested: str | None) -> dict[str, str]:
    """Annotations of a pod: all in which one attempt's differ from another's, as their containers are equal."""
    given = {names.RUN_CONFIG_ANNOTATION: run.to_json(indent=None)}
    if run.stage not in TRANSFERS:
        # What exports is alone.
        alone = run.stage == "export" or not has_service(job)
        given[names.RANK_ZERO_ANNOTATION] = (
            LOOPBACK if alone else names.rank_zero_host(job.metadata.name, run.job.attempt)
        )
        if requested is not None:
            given[names.REQUESTED_ANNOTATION] = requested
    return given


def _from_annotation(name: str) -> dict[str, Any]:
    """A variable that has the value of its annotation, and is empty without."""
    field = f"metadata.annotations['{_REFERENCES[name]}']"
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": field}}}


def _environment(job: QLoRAJob, run: RunConfig, settings: Settings) -> dict[str, str]:
    """The main container's environment: what the report of rank 0 tells of cost, or how transfers reach the network."""
    transfer, price = settings.transfer, settings.costs.price
    if run.stage not in TRANSFERS:
        known = {} if price is None else {PRICE_ENV: str(price)}
        return {"MASTER_PORT": str(RENDEZVOUS_PORT), **known, **SCRATCH}
    ca_bundle = None if transfer.ca_bundle_config_map is None else str(CA_BUNDLE)
    network = {
        "HTTP_PROXY": transfer.http_proxy,
        "HTTPS_PROXY": transfer.https_proxy,
        "NO_PROXY": transfer.no_proxy,
        "SSL_CERT_FILE": ca_bundle,
        "REQUESTS_CA_BUNDLE": ca_bundle,
        "AWS_CA_BUNDLE": ca_bundle,
        "HF_ENDPOINT": transfer.hub_endpoint,
        "AWS_ENDPOINT_URL_S3": transfer.s3_endpoint,
        "AWS_DEFAULT_REGION": transfer.s3_region,
    }
    if any(source.uri.startswith(WEB) for source in job.spec.sources):
        network[WEB_SOURCES_ENV] = json.dumps(
            [each for each in settings.allowed_sources if each.startswith(WEB)]
        )
    if run.stage == "fetch" and transfer.checks_data:
        network[HANDOFF_ENV] = str(HANDOFF_ROOT)
    return {**SCRATCH, **{name: value for name, value in network.items() if value is not None}}


def _from_secret(name: str, secret: str) -> dict[str, Any]:
    """A variable that has the Secret's key of its name, and is unset without such a key."""
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name, "optional": True}}}


def _container(job: QLoRAJob, run: RunConfig, image: str, settings: Settings) -> dict[str, Any]:
    environment = _environment(job, run, settings)
    references = [] if run.stage in TRANSFERS else [_from_annotation(name) for name in _REFERENCES]
    secret = settings.transfer.proxy_secret if run.stage in TRANSFERS else None
    if secret is not None:
        environment = {name: value for name, value in environment.items() if name not in PROXIES}
    return {
        **_program(names.TRAINER_CONTAINER, image, _MODULES[run.stage], settings),
        "env": references
        + [{"name": name, "value": value} for name, value in environment.items()]
        + [_from_secret(name, secret) for name in PROXIES if secret is not None],
        "ports": [{"name": "progress", "containerPort": PROGRESS_PORT, "protocol": "TCP"}],
        "resources": _resources(job.spec.topology, run.stage, settings.transfer),
        "volumeMounts": [mount for _, mount in volumes(job.spec, run.stage, settings)],
    }


def _check_container(job: QLoRAJob, image: str, settings: Settings) -> dict[str, Any]:
    """Looks at the data that the fetch beside it has brought. Files of strangers are read here, so nothing of the
    fetch's is: no credentials, no proxy, and nothing that can be written but a /tmp of its own."""
    memory = {"memory": settings.transfer.memory}
    environment = {**SCRATCH, HANDOFF_ENV: str(HANDOFF_ROOT)}
    return {
        **_program(names.CHECK_CONTAINER, image, entry_points.CHECK, settings),
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "resources": {"requests": {"cpu": fetch_cpus(settings.transfer.cpu)[1], **memory}, "limits": memory},
        "volumeMounts": [mount for _, mount in check_volumes(job.spec)],
    }


def _program(name: str, image: str, module: str, settings: Settings) -> dict[str, Any]:
    """What all containers have in common: a module of the trainer's, under Pod Security *restricted*."""
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python", "-m", module],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "terminationMessagePath": str(TERMINATION_LOG),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _resources(topology: Topology, stage: RunStage, transfer: TransferSettings) -> dict[str, Any]:
    """Requests and limits.

    For ranks they are equal and in whole CPUs with strict pinning: a kubelet with static CPU management gives only such
    pods exclusive CPUs. With best-effort pinning the pod may also use idle CPUs of its node. So may a transfer, which
    waits for the network most of the time.
    """
    if stage in TRANSFERS:
        memory = {"memory": transfer.memory}
        checks = stage == "fetch" and transfer.checks_data
        cpu = fetch_cpus(transfer.cpu)[0] if checks else transfer.cpu
        return {"requests": {"cpu": cpu, **memory}, "limits": memory}
    topology = stage_topology(topology, stage)
    memory = {"memory": str(pod_memory(topology))}
    both = {"cpu": str(pod_cpus(topology)), **memory}
    return {"requests": both, "limits": dict(both) if topology.pinning == "strict" else memory}
