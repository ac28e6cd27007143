"""The volumes of an attempt's pods, and where they are mounted."""

from collections.abc import Sequence
from pathlib import PurePath, PurePosixPath
from typing import Any

from qlora_contract.paths import (
    CREDENTIALS_ROOT,
    HANDOFF_ROOT,
    RUN_CONFIG_PATH,
    VOLUMES_ROOT,
    credentials_folder,
    split_pvc,
)
from qlora_contract.remote import is_remote
from qlora_contract.run_config import TRANSFERS, RunStage
from qlora_operator.api import names
from qlora_operator.api.pod_resources import TMP_BYTES, shm_bytes, stage_topology
from qlora_operator.api.v1alpha1 import QLoRAJobSpec
from qlora_operator.settings import Settings

TMP = "/tmp"  # noqa: S108 - the pod's own
CA_BUNDLE = PurePosixPath("/etc/qlora/ca/ca.crt")
SHM = "/dev/shm"  # noqa: S108 - the pod's own

HANDOFF_BYTES = 2**20

Volume = tuple[dict[str, Any], dict[str, Any]]
"""A volume of a pod, and its mount in the container."""


def volumes(spec: QLoRAJobSpec, stage: RunStage, settings: Settings) -> list[Volume]:
    """Every volume of a pod: claims, run.json, and what can be written besides the workspace. Credentials only
    for what the stage reaches: ranks see at most those for the tracking server."""
    sources = {"train": spec.read_uris, "export": [spec.model.source]}.get(stage, [])
    uris = [spec.workspace, *(uri for uri in sources if not is_remote(uri))]
    mlflow = spec.tracking.mlflow
    secrets = {
        "fetch": {credentials_folder(source.field): source.credentials_secret for source in spec.sources},
        "train": {"tracking": mlflow.credentials_secret if mlflow is not None else None},
        "export": {},
        "publish": {"output": spec.output.credentials_secret},
    }[stage]
    shm = shm_bytes(stage_topology(spec.topology, stage))
    ca_bundle = settings.transfer.ca_bundle_config_map
    authorities = []
    if ca_bundle is not None and stage in TRANSFERS:
        items = [{"key": CA_BUNDLE.name, "path": CA_BUNDLE.name}]
        config_map = {"configMap": {"name": ca_bundle, "items": items}}
        authorities = [_volume("ca-bundle", config_map, CA_BUNDLE.parent, readOnly=True)]
    return [
        *_claims(uris, written=split_pvc(spec.workspace)[0]),
        _run_config(),
        *(
            _volume(
                f"credentials-{of}", {"secret": {"secretName": name}}, CREDENTIALS_ROOT / of, readOnly=True
            )
            for of, name in secrets.items()
            if name is not None
        ),
        *authorities,
        *([_handoff()] if stage == "fetch" and settings.transfer.checks_data else []),
        _volume("tmp", {"emptyDir": {"medium": "Memory", "sizeLimit": str(TMP_BYTES)}}, TMP),
        _volume("shm", {"emptyDir": {"medium": "Memory", "sizeLimit": str(shm)}}, SHM),
    ]


def check_volumes(spec: QLoRAJobSpec) -> list[Volume]:
    """Every volume of the container beside a fetch that looks at the data: it writes nowhere but into a /tmp of its
    own, and no credentials are among them."""
    uris = [spec.workspace, *(uri for uri in spec.read_uris if not is_remote(uri))]
    return [
        *_claims(uris, written=None),
        _run_config(),
        _handoff(readOnly=True),
        _volume("check-tmp", {"emptyDir": {"medium": "Memory", "sizeLimit": str(TMP_BYTES)}}, TMP),
    ]


def _claims(uris: Sequence[str], written: str | None) -> list[Volume]:
    """The claims of URIs; only one of them, if any, can be written.

    Numbered, since the name of a claim may be too long for the name of a volume, and have dots.
    """
    return [
        _volume(
            f"claim-{number}",
            {"persistentVolumeClaim": {"claimName": claim}},
            VOLUMES_ROOT / claim,
            readOnly=claim != written,
        )
        for number, claim in enumerate(dict.fromkeys(split_pvc(uri)[0] for uri in uris))
    ]


def _run_config() -> Volume:
    annotation = f"metadata.annotations['{names.RUN_CONFIG_ANNOTATION}']"
    items = [{"path": RUN_CONFIG_PATH.name, "fieldRef": {"fieldPath": annotation}}]
    return _volume("run-config", {"downwardAPI": {"items": items}}, RUN_CONFIG_PATH.parent, readOnly=True)


def _handoff(**mount: Any) -> Volume:
    """Where a fetch leaves word for the container beside it."""
    folder = {"emptyDir": {"medium": "Memory", "sizeLimit": str(HANDOFF_BYTES)}}
    return _volume("handoff", folder, HANDOFF_ROOT, **mount)


def _volume(name: str, source: dict[str, Any], path: PurePath | str, **mount: Any) -> Volume:
    return {"name": name, **source}, {"name": name, "mountPath": str(path), **mount}
