"""The volumes of an attempt's pods, and where they are mounted."""

from typing import Any

from qlora_contract.places import RUN_CONFIG_PATH, VOLUMES_ROOT, split_pvc
from qlora_operator.api import names
from qlora_operator.api.sizes import SHM_BYTES, TMP_BYTES
from qlora_operator.api.types import QLoRAJobSpec

TMP = "/tmp"  # noqa: S108 - the pod's own
SHM = "/dev/shm"  # noqa: S108 - the pod's own

Volume = tuple[dict[str, Any], dict[str, Any]]
"""A volume of a pod, and its mount in the container."""


def volumes(spec: QLoRAJobSpec) -> list[Volume]:
    """Every volume of a pod: claims, run.json, and what can be written besides the workspace."""
    return [
        *_claims(spec),
        _run_config(),
        _in_memory("tmp", TMP, TMP_BYTES),
        _in_memory("shm", SHM, SHM_BYTES),
    ]


def _claims(spec: QLoRAJobSpec) -> list[Volume]:
    """Each claim that the job names, once; only the workspace's can be written."""
    workspace, *others = (
        split_pvc(uri)[0] for uri in (spec.workspace, spec.model.source, spec.dataset.source)
    )
    return [
        # Numbered, since the name of a claim may be too long for the name of a volume, and have dots.
        _claim(f"claim-{number}", claim, read_only=claim != workspace)
        for number, claim in enumerate(dict.fromkeys([workspace, *others]))
    ]


def _claim(name: str, claim: str, *, read_only: bool) -> Volume:
    volume = {"name": name, "persistentVolumeClaim": {"claimName": claim}}
    return volume, {"name": name, "mountPath": str(VOLUMES_ROOT / claim), "readOnly": read_only}


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
