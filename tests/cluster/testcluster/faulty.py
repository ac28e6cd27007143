"""An API server that misbehaves on demand: an HTTPS proxy between a client and the real one.

    with FaultyProxy(control_plane) as proxy:
        operator.kubeconfig = proxy.kubeconfig(account)
        with proxy.fault(answer(500), verb="update", resource="qlorajobs/status", skip=1, times=2):
            ...

It runs in a thread of its own. Requests pass unless a fault matches; every request is recorded.
"""

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
from aiohttp import web

from testcluster import kubeconfig as kubeconfigs
from testcluster.control_plane import LOOPBACK, ControlPlane

NAME = "faulty-proxy"
_HOP_BY_HOP = frozenset({"connection", "content-length", "host", "keep-alive", "transfer-encoding"})
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass(frozen=True, eq=False)
class Call:
    """A request, in the words of RBAC. `resource` has its subresource: `qlorajobs/status`."""

    verb: str
    resource: str
    namespace: str
    name: str
    agent: str
    """The client's User-Agent."""
    token: str
    """The client's bearer token."""
    time: float
    """When it came, by the proxy's monotonic clock."""

    @property
    def writes(self) -> bool:
        """Whether it changes anything."""
        return self.verb in ("create", "update", "patch", "delete")


@dataclass(frozen=True)
class Exchange:
    """A request under way, as a fault sees it."""

    call: Call
    forward: Callable[[], Awaitable[web.StreamResponse]]
    """Let the API server answer, to the end."""
    cut: Callable[[], web.StreamResponse]
    """Break the client's connection."""
    request: web.Request


Fault = Callable[[Exchange], Awaitable[web.StreamResponse]]


@dataclass
class Rule:
    """Which requests a fault meets."""

    fault: Fault
    matches: Callable[[Call], bool]
    skip: int
    times: int | None
    hits: list[Call] = field(default_factory=list)
    """The requests that the fault met."""
    active: bool = True

    def takes(self, call: Call) -> bool:
        """Whether the fault meets this request; counts it."""
        if not self.active or not self.matches(call):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is not None and len(self.hits) >= self.times:
            return False
        self.hits.append(call)
        return True


# --- faults


def answer(code: int, reason: str = "", *, message: str = "played", retry_after: int | None = None) -> Fault:
    """The server refuses with this status, having done nothing."""
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
    body = {**status, "reason": reason, "message": message}
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    async def fault(_: Exchange) -> web.StreamResponse:
        return web.json_response(body, status=code, headers=headers)

    return fault


async def cut(exchange: Exchange) -> web.StreamResponse:
    """The connection breaks before the server has the request."""
    return exchange.cut()


async def lose_answer(exchange: Exchange) -> web.StreamResponse:
    """The server does what it is asked, and the connection breaks before its answer."""
    await exchange.forward()
    return exchange.cut()


async def silence(exchange: Exchange) -> web.StreamResponse:
    """A watch begins and tells nothing, for ever; anything else is never answered."""
    if exchange.call.verb == "watch":
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(exchange.request)
    await asyncio.Event().wait()
    raise AssertionError


async def gone(exchange: Exchange) -> web.StreamResponse:
    """A watch begins and ends with 410: its resourceVersion is too old."""
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired"}
    event = {"type": "ERROR", "object": {**status, "message": "too old resource version"}}
    return web.json_response(event, dumps=lambda value: json.dumps(value) + "\n")


def hold(seconds: float) -> Fault:
    """The server answers late."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await exchange.forward()

    return fault


def before(hook: Callable[[], None]) -> Fault:
    """`hook` runs, and the request is lost: a client killed by it has not sent the request."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        await asyncio.to_thread(hook)
        return exchange.cut()

    return fault


def after(hook: Callable[[], None]) -> Fault:
    """The server does what it is asked, and `hook` runs: a client killed by it never gets the answer."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        if exchange.call.verb != "watch":
            await exchange.forward()
        await asyncio.to_thread(hook)
        return exchange.cut()

    return fault


# --- the proxy


class FaultyProxy:
    """The proxy. A context manager."""

    def __init__(self, cluster: ControlPlane) -> None:
        self._cluster = cluster
        self._rules: list[Rule] = []
        self._watches: dict[Call, web.Request] = {}
        self.calls: list[Call] = []
        """Every request so far."""

    def __enter__(self) -> Self:
        pki = self._cluster.folder / "pki"
        self._cluster.issue(NAME, NAME, addresses=(f"IP:{LOOPBACK}",))
        self._trust = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self._identity = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._identity.load_cert_chain(pki / f"{NAME}.crt", pki / f"{NAME}.key")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=NAME)
        self._thread.start()
        self.server = self._do(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def kubeconfig(self, original: Path) -> Path:
        """A kubeconfig like another one, whose bearer token it must have, that reaches this proxy."""
        config = json.loads(original.read_text())
        config["clusters"][0]["cluster"]["server"] = self.server
        path = original.with_name(f"{original.stem}-{self.server.rpartition(':')[2]}.kubeconfig")
        return kubeconfigs.write(path, config)

    @contextmanager
    def fault(self, fault: Fault, **which: Any) -> Iterator[Rule]:
        """Requests that match meet the fault while in the block: see `inject`."""
        rule = self.inject(fault, **which)
        try:
            yield rule
        finally:
            rule.active = False

    def inject(
        self,
        fault: Fault,
        *,
        verb: str = "",
        resource: str = "",
        matches: Callable[[Call], bool] = lambda _: True,
        skip: int = 0,
        times: int | None = None,
    ) -> Rule:
        """Let requests of the verb (any) for the resource (any) that match meet the fault.

        The first `skip` of them pass, and all after `times` of those that met it. Several verbs or
        resources are separated by spaces. The first rule that takes a request has it.
        """
        verbs, resources = verb.split(), resource.split()

        def all_match(call: Call) -> bool:
            return (
                (not verbs or call.verb in verbs)
                and (not resources or call.resource in resources)
                and matches(call)
            )

        rule = Rule(fault, all_match, skip, times)
        self._rules.append(rule)
        return rule

    def cut_watches(self, resource: str = "") -> None:
        """Break the connections of all watches, or of those of one resource."""

        async def work() -> None:
            for call, request in list(self._watches.items()):
                if resource in ("", call.resource):
                    _cut(request)

        self._do(work())

    # --- in the thread

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _open(self) -> str:
        timeout = aiohttp.ClientTimeout(total=None)
        self._connector = aiohttp.TCPConnector(ssl=self._trust, limit=0)
        self._session = aiohttp.ClientSession(
            connector=self._connector, timeout=timeout, auto_decompress=False
        )
        app = web.Application(client_max_size=16 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        # TLS says good-bye for half a minute, unless it may not.
        self._listener = await self._loop.create_server(
            self._runner.server, LOOPBACK, 0, ssl=self._identity, ssl_shutdown_timeout=0.1
        )
        return f"https://{LOOPBACK}:{self._listener.sockets[0].getsockname()[1]}"

    async def _close(self) -> None:
        self._listener.close()
        await self._runner.cleanup()
        await self._connector.close(abort_ssl=True)
        await self._session.close()
        await asyncio.sleep(0.2)  # until the transports have closed

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        call = parse(request, self._loop.time())
        self.calls.append(call)
        body = await request.read()
        exchange = Exchange(call, lambda: self._forward(request, body, call), lambda: _cut(request), request)
        rule = next((rule for rule in self._rules if rule.takes(call)), None)
        if call.verb == "watch":
            self._watches[call] = request
        try:
            return await (rule.fault(exchange) if rule else exchange.forward())
        except (aiohttp.ClientError, OSError):
            return _cut(request)  # the API server itself is away
        finally:
            self._watches.pop(call, None)

    async def _forward(self, request: web.Request, body: bytes, call: Call) -> web.StreamResponse:
        url = self._cluster.server + request.raw_path
        headers = {key: value for key, value in request.headers.items() if key.lower() not in _HOP_BY_HOP}
        async with self._session.request(request.method, url, headers=headers, data=body or None) as answer:
            kept = {key: value for key, value in answer.headers.items() if key.lower() not in _HOP_BY_HOP}
            if call.verb != "watch":
                return web.Response(status=answer.status, headers=kept, body=await answer.read())
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for part in answer.content.iter_any():
                await response.write(part)
            return response


def _cut(request: web.Request) -> web.Response:
    with contextlib.suppress(AttributeError):  # it has gone already
        request.transport.abort()  # type: ignore[union-attr]
    return web.Response()


def parse(request: web.Request, now: float) -> Call:
    """What a request asks for. Requests for no resource, such as discovery, have none."""
    parts = request.path.strip("/").split("/")
    rest = parts[2:] if parts[0] == "api" else parts[3:] if parts[0] == "apis" else []
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    resource, name, subresource = [*rest, "", "", ""][:3]
    verb = _VERBS.get(request.method, "get" if name or not resource else "list")
    if verb == "list" and request.query.get("watch") in ("1", "true"):
        verb = "watch"
    return Call(
        verb=verb,
        resource=f"{resource}/{subresource}" if subresource else resource,
        namespace=namespace,
        name=name,
        agent=request.headers.get("User-Agent", ""),
        token=request.headers.get("Authorization", "").removeprefix("Bearer "),
        time=now,
    )
