"""What tests may ask of any cluster, whoever started it."""

import json
import os
import subprocess
import tempfile
from functools import cached_property
from pathlib import Path

from testcluster import kubeconfig
from testcluster.client import Client
from testcluster.errors import KubectlError

TOKEN_SECONDS = 24 * 3600


class Cluster:
    """A cluster that a kubeconfig reaches as its administrator."""

    def __init__(self, folder: Path, kubeconfig: Path, kubectl: Path) -> None:
        self.folder = folder
        """For files of this cluster; removed with it."""
        self.kubeconfig = kubeconfig
        """The administrator's."""
        self._kubectl = kubectl

    @cached_property
    def client(self) -> Client:
        """The administrator's requests."""
        return Client(self.kubeconfig)

    def kubectl(self, *arguments: str, input: str | None = None, kubeconfig: Path | None = None) -> str:  # noqa: A002
        """What kubectl prints; raises KubectlError when it ends with an error."""
        done = subprocess.run(
            [self._kubectl, f"--cache-dir={self.folder}/kubectl", *arguments],
            env={**os.environ, "KUBECONFIG": str(kubeconfig or self.kubeconfig)},
            input=input,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise KubectlError(arguments, done.returncode, done.stderr)
        return done.stdout

    def kubeconfig_for(self, service_account: str, namespace: str) -> Path:
        """A kubeconfig, in a file of its own, with a token the API issues to the service account."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{service_account}/token"
        answer = self.client.post(path, {"spec": {"expirationSeconds": TOKEN_SECONDS}})
        reached = json.loads(self.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
        config = kubeconfig.with_token(reached["clusters"][0]["cluster"], answer["status"]["token"])
        handle, name = tempfile.mkstemp(
            prefix=f"{namespace}-{service_account}-", suffix=".kubeconfig", dir=self.folder
        )
        os.close(handle)
        return kubeconfig.write(Path(name), config)
