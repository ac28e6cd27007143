"""What `helm test` asks with a claim: does a tiny job succeed?

    train.py API_SERVER CREDENTIALS NAMESPACE NAME CLAIM MOUNT SECONDS

Writes a model and data into a folder of the claim, which is mounted at MOUNT, creates a QLoRAJob on them, and waits
until it is over. Job and folder are removed when it has succeeded, and stay for a look when it has not.
"""

# ruff: noqa: S310 - the address is the chart's own

import json
import secrets
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from qlora_trainer import tiny  # the name that images of release 0.1.0 have, too

FOLDER = "qlora-helm-test"


class Api:
    """QLoRAJobs of one namespace."""

    def __init__(self, server: str, credentials: Path, namespace: str) -> None:
        self._url = f"{server}/apis/qlora.dev/v1alpha1/namespaces/{namespace}/qlorajobs"
        self._token = credentials / "token"
        self._trust = ssl.create_default_context(cafile=str(credentials / "ca.crt"))

    def ask(self, method: str, name: str = "", body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """The answer; None when there is no such job."""
        request = urllib.request.Request(
            f"{self._url}/{name}".rstrip("/"),
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": f"Bearer {self._token.read_text()}",
                "Content-Type": "application/json",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=30, context=self._trust) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            said = error.read(2000).decode(errors="replace")
            raise SystemExit(f"{method} {error.url}: {error.code}: {said}") from error


def job(name: str, claim: str, folder: str) -> dict[str, Any]:
    """One pod, ten steps."""
    here = f"pvc://{claim}/{FOLDER}/{folder}"
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": name},
        "spec": {
            "workspace": f"{here}/work",
            "model": {"source": f"{here}/model"},
            "dataset": {"source": f"{here}/data.jsonl"},
            "training": {
                "maxSteps": 10,
                "globalBatchTokens": 1024,
                "maxSequenceLength": 128,
                "learningRate": 0.02,
                "warmupRatio": 0.0,
            },
            "topology": {"cpusPerRank": 1, "memoryPerRank": "1Gi", "pinning": "best-effort"},
            "terminationGracePeriodSeconds": 30,
        },
    }


def follow(api: Api, name: str, seconds: float) -> str:
    """Print what it does until it is over; its last phase."""
    deadline, said = time.monotonic() + seconds, ""
    while True:
        status = (api.ask("GET", name) or {}).get("status") or {}
        phase, now = str(status.get("phase")), f"{status.get('phase')}: {status.get('message')}"
        if now != said:
            print(now, flush=True)
            said = now
        if phase in ("Succeeded", "Failed") or time.monotonic() > deadline:
            return phase
        time.sleep(1)


def main() -> int:
    """0 when the job has succeeded."""
    server, credentials, namespace, name, claim, mount, seconds = sys.argv[1:]
    api = Api(server, Path(credentials), namespace)
    while api.ask("DELETE", name) is not None:  # an earlier test's
        time.sleep(1)
    folder = secrets.token_hex(4)
    place = Path(mount, FOLDER, folder)
    tiny.write(place)
    api.ask("POST", body=job(name, claim, folder))
    phase = follow(api, name, float(seconds))
    if phase != "Succeeded":
        print(f"no adapter after {seconds} s: kubectl -n {namespace} describe qlj {name}", flush=True)
        return 1
    api.ask("DELETE", name)
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
