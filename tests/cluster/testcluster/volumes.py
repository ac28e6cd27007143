"""Claims that pods on every node of this machine may write to: folders of the machine."""

import os
from pathlib import Path

from testcluster.client import Client

POD_USER = 1000
"""User and group of the project's pods, who own the folders: a hostPath volume ignores fsGroup."""


def shared_volume(client: Client, folders: Path, namespace: str, claim: str, size: str = "10Gi") -> Path:
    """Make a ReadWriteMany claim; gives its folder, which is one of `folders`."""
    folder = folders / f"{namespace}-{claim}"
    folder.mkdir(parents=True)
    os.chown(folder, POD_USER, POD_USER)
    common = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    volume = {
        "metadata": {"name": folder.name},
        "spec": {
            **common,
            "capacity": {"storage": size},
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {"namespace": namespace, "name": claim},
            "hostPath": {"path": str(folder), "type": "Directory"},
        },
    }
    wanted = {
        "metadata": {"name": claim},
        "spec": {**common, "volumeName": folder.name, "resources": {"requests": {"storage": size}}},
    }
    client.post("/api/v1/persistentvolumes", volume)
    client.post(f"/api/v1/namespaces/{namespace}/persistentvolumeclaims", wanted)
    return folder
