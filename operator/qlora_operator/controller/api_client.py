"""The only module that talks to the API server.

Nothing is retried here: the work queue requeues the key of the caller, with backoff.
"""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.parse import urlencode
from urllib.request import getproxies_environment

import aiohttp
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config

from qlora_operator.api import names
from qlora_operator.controller.clock import Clock
from qlora_operator.errors import OperatorError

Raw = dict[str, Any]

REQUEST_SECONDS = 30
PAGE = 100
"""Objects of one page of a list: as Python objects a page of 500 jobs is as large as the rest of the operator."""
MAX_EVENTS = 200
"""Events about one object that are read: the kubelet and the scheduler count repetitions instead of repeating them."""
CONNECTIONS = 16
"""Each holds a quarter of a MiB for TLS; more requests at a time only wait in the API server instead of here."""
KUEUE_VERSIONS = ("v1beta2", "v1beta1")
"""Versions of Kueue's API in which a Workload has the fields that are read, the newest first."""
NAMESPACE_TERMINATING = "NamespaceTerminating"
"""The cause that the API gives for a Forbidden while a namespace is being deleted: nothing can be created in it."""

QLORAJOBS = f"apis/{names.GROUP}/{names.VERSION}", names.PLURAL
BATCH_JOBS = "apis/batch/v1", "jobs"
SERVICES = "api/v1", "services"
NETWORK_POLICIES = "apis/networking.k8s.io/v1", "networkpolicies"
PODS = "api/v1", "pods"
NODES = "api/v1", "nodes"
EVENTS = "api/v1", "events"
LEASES = "apis/coordination.k8s.io/v1", "leases"

Resource = tuple[str, str]


class ApiError(OperatorError):
    """The API server refused a request, or did not answer.

    Attributes:
        code: HTTP status; 0 when there was no answer.
        reason: the API's reason, such as AlreadyExists.
        retry_after: seconds to wait, when the server gives them.
    """

    def __init__(self, code: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.retry_after = code, reason, retry_after


class RequestObserver(Protocol):
    """Is told about every request."""

    def api_request(self, verb: str, resource: str, code: int | None, seconds: float) -> None:
        """A request has ended with this HTTP status; None: without an answer."""


async def load_configuration() -> kubernetes_client.Configuration:
    """Server and credentials: the pod's service account, else the kubeconfig."""
    settings = kubernetes_client.Configuration()
    try:
        config.load_incluster_config(client_configuration=settings)
    except config.ConfigException:
        await config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=settings)
    settings.connection_pool_maxsize = CONNECTIONS
    # With trust_env aiohttp looks for proxies and for ~/.netrc in another thread, at each request.
    settings.client_session_kwargs = {"trust_env": bool(getproxies_environment())}
    return settings


class ApiClient:
    """The requests that the operator makes. An async context manager."""

    def __init__(self, observer: RequestObserver, may_write: Callable[[], bool] = lambda: True) -> None:
        """Prepare a client.

        Args:
            observer: told about every request.
            may_write: asked before each request that changes something, in the last moment.
        """
        self._observer, self._may_write = observer, may_write
        self.clock = Clock()
        """The API server's time, by its answers."""
        self._client: kubernetes_client.ApiClient | None = None
        self.went_back = asyncio.Event()
        """Set once the API server's data are older than they were: it was restored from a copy."""
        self._versions: dict[str, int] = {}
        """Plural of a resource -> the newest version at which it was listed."""
        self._throttled_until: dict[str, float] = {}
        """Plural of a resource -> monotonic time until which the server asked not to be asked about it (HTTP 429)."""

    async def __aenter__(self) -> "ApiClient":
        self._client = kubernetes_client.ApiClient(await load_configuration())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.close()

    async def list_all(
        self, resource: Resource, namespace: str | None, selector: str = ""
    ) -> AsyncIterator[Raw]:
        """Every object of a namespace, or of all, page by page."""
        async for raw in self._pages(resource, namespace, selector):
            yield raw

    async def nodes(self) -> AsyncIterator[Raw]:
        """The cluster's nodes, page by page."""
        async for raw in self._pages(NODES, None, ""):
            yield raw

    async def pods(self, namespace: str, job_uid: str) -> list[Raw]:
        """The pods of a job, of all its attempts."""
        selector = f"{names.JOB_UID_LABEL}={job_uid}"
        return [raw async for raw in self._pages(PODS, namespace, selector)]

    async def attempt_jobs(self, namespace: str, job_uid: str) -> list[Raw]:
        """The batch/v1 Jobs of a job, of all its attempts."""
        selector = f"{names.JOB_UID_LABEL}={job_uid}"
        return [raw async for raw in self._pages(BATCH_JOBS, namespace, selector)]

    async def warning_events(self, namespace: str, uid: str) -> list[Raw]:
        """Events of type Warning about one object, at most MAX_EVENTS: whoever may create Events may create any number
        of them about anything."""
        found = []
        async for raw in self._pages(EVENTS, namespace, "", f"type=Warning,involvedObject.uid={uid}"):
            found.append(raw)
            if len(found) == MAX_EVENTS:
                break
        return found

    async def workloads(self, namespace: str, job_uid: str) -> list[Raw]:
        """Kueue's Workloads of a batch/v1 Job; none without Kueue, or without the permission to list them."""
        for version in KUEUE_VERSIONS:
            selector = f"{names.WORKLOAD_JOB_LABEL}={job_uid}"
            try:
                return [raw async for raw in self._pages(_workloads(version), namespace, selector)]
            except ApiError as error:
                if error.code not in (403, 404):
                    raise
        return []

    async def patch_workload(self, namespace: str, name: str, body: Mapping[str, Any]) -> Raw:
        """Merge into one of Kueue's Workloads."""
        for version in KUEUE_VERSIONS[:-1]:
            try:
                return await self.patch(_workloads(version), namespace, name, body)
            except ApiError as error:
                if error.code != 404:
                    raise
        return await self.patch(_workloads(KUEUE_VERSIONS[-1]), namespace, name, body)

    async def delete_workload(self, namespace: str, name: str) -> None:
        """Delete one of Kueue's Workloads, if it is there."""
        for version in KUEUE_VERSIONS:
            try:
                await self._request("DELETE", _workloads(version), namespace, name)
            except ApiError as error:
                if error.code not in (403, 404):
                    raise
            else:
                return

    async def get(self, resource: Resource, namespace: str, name: str) -> Raw:
        """One object."""
        return await self._request("GET", resource, namespace, name)

    async def create(self, resource: Resource, namespace: str, body: Mapping[str, Any]) -> Raw:
        """Create an object."""
        return await self._request("POST", resource, namespace, body=body)

    async def replace(self, resource: Resource, body: Mapping[str, Any]) -> Raw:
        """Replace an object. Raises ApiError with code 409 when it has changed since it was read."""
        metadata = body["metadata"]
        return await self._request("PUT", resource, metadata["namespace"], metadata["name"], body=body)

    async def patch(self, resource: Resource, namespace: str, name: str, body: Mapping[str, Any]) -> Raw:
        """Merge into an object (RFC 7386). Raises ApiError with code 409 when it has another uid than the patch."""
        return await self._request("PATCH", resource, namespace, name, body=body)

    async def save_status(self, raw: Mapping[str, Any]) -> Raw:
        """Replace a job's status. Raises ApiError with code 409 when the job has changed since it was read."""
        metadata = raw["metadata"]
        return await self._request(
            "PUT", QLORAJOBS, metadata["namespace"], metadata["name"], subresource="status", body=raw
        )

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str) -> bool:
        """Delete the object with this uid in the foreground, that is, after what it owns. Returns whether it was there:
        another one of that name is left alone."""
        body = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        try:
            await self._request("DELETE", resource, namespace, name, body=body)
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            return False
        return True

    async def _pages(
        self, resource: Resource, namespace: str | None, labels: str, fields: str = ""
    ) -> AsyncIterator[Raw]:
        proceed, plural = "", resource[1]
        while True:
            known = self._versions.get(plural, 0)
            query = {
                "limit": str(PAGE),
                "labelSelector": labels,
                "fieldSelector": fields,
                "continue": proceed,
            }
            page = await self._request("GET", resource, namespace, query=query)
            if not proceed:  # later pages are of the version of the first
                version = int(page["metadata"].get("resourceVersion") or 0)
                self._versions[plural] = max(version, self._versions.get(plural, 0))
                # What is listed is never older than what was listed before it was asked for.
                if 0 < version < known:
                    self.went_back.set()
            for raw in page["items"]:
                yield raw
            proceed = page["metadata"].get("continue") or ""
            if not proceed:
                return

    async def _request(
        self,
        method: str,
        resource: Resource,
        namespace: str | None,
        name: str = "",
        *,
        subresource: str = "",
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> Raw:
        group, plural = resource
        parts = [group, f"namespaces/{namespace}" if namespace else "", plural, name, subresource]
        path = "/" + "/".join(part for part in parts if part)
        wait = self._throttled_until.get(plural, 0.0) - time.monotonic()
        if wait > 0:
            message = f"{method} {path}: not sent: the API server has asked for a pause"
            raise ApiError(429, "TooManyRequests", message, wait)
        begun, code = time.monotonic(), None
        try:
            code, headers, content = await self._send(method, path, query or {}, body)
            if code == 401:  # the token has been rotated; other requests are under way with the same client
                assert self._client is not None
                self._client.configuration.api_key = (await load_configuration()).api_key
                code, headers, content = await self._send(method, path, query or {}, body)
        except (OSError, aiohttp.ClientError, TimeoutError) as error:
            raise ApiError(0, "NoAnswer", f"{method} {path}: {type(error).__name__}: {error}") from error
        finally:
            self._observer.api_request(method.lower(), plural, code, time.monotonic() - begun)
        if told := headers.get("Date"):
            with contextlib.suppress(ValueError):
                self.clock.observe(parsedate_to_datetime(told))
        try:
            return _parse_response(method, path, code, headers, content)
        except ApiError as error:
            if error.code == 429:
                self._throttled_until[plural] = time.monotonic() + (error.retry_after or 1.0)
            raise

    async def _send(
        self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        client = self._client
        assert client is not None
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Accept": "application/json", "Content-Type": kind}
        headers["User-Agent"] = names.COMPONENT
        await client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        url = client.configuration.host + path
        pairs = urlencode({key: value for key, value in query.items() if value})
        if method != "GET" and not self._may_write():
            raise ApiError(
                0, "NotLeader", f"{method} {path}: not sent, since another operator may lead by now"
            )
        response = await client.rest_client.request(
            method,
            f"{url}?{pairs}" if pairs else url,
            headers=headers,
            body=body,
            _request_timeout=REQUEST_SECONDS,
        )
        content = await response.read()
        return int(response.status), response.getheaders(), content


def _workloads(version: str) -> Resource:
    return f"apis/kueue.x-k8s.io/{version}", "workloads"


def _parse_response(method: str, path: str, code: int, headers: Mapping[str, str], content: bytes) -> Raw:
    try:
        raw = json.loads(content)
    except ValueError:
        raw = {"message": content[:200].decode(errors="replace")}
    if 200 <= code < 300:
        return dict(raw)
    after = headers.get("Retry-After", "")
    causes = {cause.get("reason") for cause in (raw.get("details") or {}).get("causes") or ()}
    raise ApiError(
        code,
        NAMESPACE_TERMINATING if NAMESPACE_TERMINATING in causes else str(raw.get("reason") or code),
        str(raw.get("message") or f"{method} {path}: {code}"),
        float(after) if after.isdigit() else None,
    )
