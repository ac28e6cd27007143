"""The volumes of an attempt's pods, and where they are mounted."""

from pathlib import PurePath, PurePosixPath
from typing import Any

from qlora_contract.paths import (
    CREDENTIALS_ROOT,
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

Volume = tuple[dict[str, Any], dict[str, Any]]
"""A volume of a pod, and its mount in the container."""


def volumes(spec: QLoRAJobSpec, stage: RunStage, settings: Settings) -> list[Volume]:
    """Every volume of a pod: claims, run.json, and what can be written besides the workspace. Credentials only
    for what the stage reaches: ranks see at most those for the tracking server."""
    sources = {"train": spec.read_uris, "export": [spec.model.source]}.get(stage, [])
    uris = [spec.workspace, *(uri for uri in sources if not is_remote(uri))]
    workspace = split_pvc(spec.workspace)[0]
    run_config = f"metadata.annotations['{names.RUN_CONFIG_ANNOTATION}']"
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
        *(
            # Numbered, since the name of a claim may be too long for the name of a volume, and have dots.
            _volume(
                f"claim-{number}",
                {"persistentVolumeClaim": {"claimName": claim}},
                VOLUMES_ROOT / claim,
                # Only the workspace can be written.
                readOnly=claim != workspace,
            )
            for number, claim in enumerate(dict.fromkeys(split_pvc(uri)[0] for uri in uris))
        ),
        _volume(
            "run-config",
            {
                "downwardAPI": {
                    "items": [{"path": RUN_CONFIG_PATH.name, "fieldRef": {"fieldPath": run_config}}]
                }
            },
            RUN_CONFIG_PATH.parent,
            readOnly=True,
        ),
        *(
            _volume(
                f"credentials-{of}", {"secret": {"secretName": name}}, CREDENTIALS_ROOT / of, readOnly=True
            )
            for of, name in secrets.items()
            if name is not None
        ),
        *authorities,
        _volume("tmp", {"emptyDir": {"medium": "Memory", "sizeLimit": str(TMP_BYTES)}}, TMP),
        _volume("shm", {"emptyDir": {"medium": "Memory", "sizeLimit": str(shm)}}, SHM),
    ]


def _volume(name: str, source: dict[str, Any], path: PurePath | str, **mount: Any) -> Volume:
    return {"name": name, **source}, {"name": name, "mountPath": str(path), **mount}
