"""A small synchronous client: objects are dicts, paths are those of the API."""

import json
from pathlib import Path
from typing import Any

import urllib3
from kubernetes.client import Configuration
from kubernetes.config import load_kube_config

from testcluster.errors import ClusterError

MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
Object = dict[str, Any]


class ApiError(ClusterError):
    """The API server refused; `code` is the HTTP status, `reason` and `message` are the Status object's."""

    def __init__(self, method: str, path: str, code: int, body: str) -> None:
        try:
            status = json.loads(body)
        except ValueError:
            status = {"message": body}
        self.code = code
        self.reason: str = status.get("reason", "")
        self.message: str = status.get("message", "")
        super().__init__(f"{method} {path}: {code} {self.reason}: {self.message}")


class Client:
    """One user's requests to one API server, each answered within `seconds` or an error. Threads may share it."""

    def __init__(self, kubeconfig: Path, *, seconds: float = 30) -> None:
        self._settings = Configuration()
        load_kube_config(str(kubeconfig), client_configuration=self._settings, persist_config=False)
        self._pool = urllib3.PoolManager(
            maxsize=16,
            timeout=seconds,
            retries=1,  # a connection that was kept may have been closed
            cert_reqs="CERT_REQUIRED" if self._settings.verify_ssl else "CERT_NONE",
            ca_certs=self._settings.ssl_ca_cert,
            cert_file=self._settings.cert_file,
            key_file=self._settings.key_file,
        )

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def get(self, path: str) -> Any:
        """The object or list at the path (a query may follow it)."""
        return self._request("GET", path)

    def items(self, path: str) -> list[Object]:
        """The objects of the list at the path."""
        items: list[Object] = self.get(path)["items"]
        return items

    def post(self, path: str, body: Object) -> Object:
        """Create; gives the created object."""
        created: Object = self._request("POST", path, body)
        return created

    def put(self, path: str, body: Object) -> Object:
        """Replace; gives the replaced object."""
        replaced: Object = self._request("PUT", path, body)
        return replaced

    def patch(self, path: str, body: Any, kind: str = MERGE_PATCH) -> Object:
        """Change; `kind` is the content type of the patch."""
        changed: Object = self._request("PATCH", path, body, kind)
        return changed

    def delete(self, path: str, options: Object | None = None) -> Object:
        """Delete, with DeleteOptions; gives the object or a Status."""
        answer: Object = self._request("DELETE", path, options or {})
        return answer

    def text(self, path: str) -> str:
        """What the path answers, undecoded."""
        return self._send("GET", path, None, "application/json")

    def _request(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        return json.loads(self._send(method, path, body, kind))

    def _send(self, method: str, path: str, body: Any, kind: str) -> str:
        headers = {"Accept": "application/json", "Content-Type": kind}
        if token := self._settings.get_api_key_with_prefix("BearerToken", "authorization"):
            headers["Authorization"] = token
        sent = None if body is None else json.dumps(body)
        try:
            answer = self._pool.request(method, self._settings.host + path, body=sent, headers=headers)
        except urllib3.exceptions.HTTPError as error:
            raise ApiError(method, path, 0, str(error)) from error
        text = answer.data.decode(errors="replace")
        if not 200 <= answer.status < 300:
            raise ApiError(method, path, answer.status, text)
        return text
