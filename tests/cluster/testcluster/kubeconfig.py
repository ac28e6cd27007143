"""kubeconfig files: everything in one file, so that it can be copied."""

import base64
import json
import os
from pathlib import Path
from typing import Any


def with_certificate(server: str, authority: Path, name: str) -> dict[str, Any]:
    """A kubeconfig for the client certificate <name>.crt beside the authority's."""
    folder = authority.parent
    user = {
        "client-certificate-data": _encoded(folder / f"{name}.crt"),
        "client-key-data": _encoded(folder / f"{name}.key"),
    }
    return _config({"server": server, "certificate-authority-data": _encoded(authority)}, user)


def with_token(cluster: dict[str, Any], token: str) -> dict[str, Any]:
    """A kubeconfig for a bearer token on a cluster as another kubeconfig describes it."""
    return _config(cluster, {"token": token})


def write(path: Path, config: dict[str, Any]) -> Path:
    """Write it, readable by this user alone. (JSON is YAML.)"""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(config, file, indent=1)
    return path


def _config(cluster: dict[str, Any], user: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
