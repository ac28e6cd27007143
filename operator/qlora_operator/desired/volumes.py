"""The volumes of an attempt's pods, and where they are mounted."""

from pathlib import PurePosixPath
from typing import Any

from qlora_contract.paths import CREDENTIALS_ROOT, RUN_CONFIG_PATH, VOLUMES_ROOT, split_pvc
from qlora_contract.remote import is_remote
from qlora_contract.run_config import RunStage
from qlora_operator.api import names
from qlora_operator.api.pod_resources import TMP_BYTES, shm_bytes
from qlora_operator.api.v1alpha1 import QLoRAJobSpec
from qlora_operator.settings import Settings

TMP = "/tmp"  # noqa: S108 - the pod's own
CA_BUNDLE = PurePosixPath("/etc/qlora/ca/ca.crt")
SHM = "/dev/shm"  # noqa: S108 - the pod's own

Volume = tuple[dict[str, Any], dict[str, Any]]
"""A volume of a pod, and its mount in the container."""


def volumes(spec: QLoRAJobSpec, stage: RunStage, settings: Settings) -> list[Volume]:
    """Every volume of a pod: claims, run.json, and what can be written besides the workspace. Credentials only
    for what the stage transfers: no rank sees any."""
    return [
        *_claims(spec, stage),
        _run_config(),
        *_credentials(spec, stage),
        *(_ca_bundle(settings) if stage != "train" else []),
        _in_memory("tmp", TMP, TMP_BYTES),
        _in_memory("shm", SHM, shm_bytes(spec.topology)),
    ]


def _claims(spec: QLoRAJobSpec, stage: RunStage) -> list[Volume]:
    """Each claim that the stage needs, once; only the workspace's can be written."""
    sources = [spec.model.source, spec.dataset.source] if stage == "train" else []
    workspace, *others = (
        split_pvc(uri)[0] for uri in (spec.workspace, *(uri for uri in sources if not is_remote(uri)))
    )
    return [
        # Numbered, since the name of a claim may be too long for the name of a volume, and have dots.
        _claim(f"claim-{number}", claim, read_only=claim != workspace)
        for number, claim in enumerate(dict.fromkeys([workspace, *others]))
    ]


def _claim(name: str, claim: str, *, read_only: bool) -> Volume:
    volume = {"name": name, "persistentVolumeClaim": {"claimName": claim}}
    return volume, {"name": name, "mountPath": str(VOLUMES_ROOT / claim), "readOnly": read_only}


def _credentials(spec: QLoRAJobSpec, stage: RunStage) -> list[Volume]:
    secrets = {
        "fetch": {"model": spec.model.credentials_secret, "dataset": spec.dataset.credentials_secret},
        "train": {},
        "publish": {"output": spec.output.credentials_secret},
    }[stage]
    return [_secret(what, name) for what, name in secrets.items() if name is not None]


def _secret(what: str, name: str) -> Volume:
    volume = {"name": f"credentials-{what}", "secret": {"secretName": name}}
    path = str(CREDENTIALS_ROOT / what)
    return volume, {"name": volume["name"], "mountPath": path, "readOnly": True}


def _ca_bundle(settings: Settings) -> list[Volume]:
    name = settings.transfer.ca_bundle_config_map
    if name is None:
        return []
    items = [{"key": CA_BUNDLE.name, "path": CA_BUNDLE.name}]
    volume = {"name": "ca-bundle", "configMap": {"name": name, "items": items}}
    return [(volume, {"name": "ca-bundle", "mountPath": str(CA_BUNDLE.parent), "readOnly": True})]


def _run_config() -> Volume:
    field = {"fieldPath": f"metadata.annotations['{names.RUN_CONFIG_ANNOTATION}']"}
    volume = {
        "name": "run-config",
        "downwardAPI": {"items": [{"path": RUN_CONFIG_PATH.name, "fieldRef": field}]},
    }
    return volume, {"name": "run-config", "mountPath": str(RUN_CONFIG_PATH.parent), "readOnly": True}


def _in_memory(name: str, path: str, limit: int) -> Volume:
    volume = {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": str(limit)}}
    return volume, {"name": name, "mountPath": path}
