"""The proxy that plays a failing API server does what each of its faults says."""

import threading
from collections.abc import Iterator

import pytest

from testcluster import faulty
from testcluster.client import ApiError, Client
from testcluster.control_plane import ControlPlane
from testcluster.faulty import FaultyProxy

pytestmark = pytest.mark.cluster


@pytest.fixture
def proxy(control_plane: ControlPlane) -> Iterator[FaultyProxy]:
    """Before the session's API server."""
    with FaultyProxy(control_plane) as made:
        yield made


@pytest.fixture
def client(control_plane: ControlPlane, proxy: FaultyProxy, namespace: str) -> Iterator[Client]:
    """Of a service account that may do everything with the namespace's ConfigMaps."""
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["*"]}]
    control_plane.client.post(f"{rbac}/roles", {"metadata": {"name": "all"}, "rules": rules})
    binding = {
        "metadata": {"name": "all"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "all"},
        "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": namespace}],
    }
    control_plane.client.post(f"{rbac}/rolebindings", binding)
    made = Client(proxy.kubeconfig(control_plane.kubeconfig_for("default", namespace)))
    yield made
    made.close()


@pytest.fixture
def path(namespace: str) -> str:
    """Of the namespace's ConfigMaps."""
    return f"/api/v1/namespaces/{namespace}/configmaps"


MAP = {"metadata": {"name": "map"}, "data": {"key": "value"}}


def test_requests_pass_and_are_recorded(
    proxy: FaultyProxy, client: Client, path: str, namespace: str
) -> None:
    """Without a fault every request has the API server's answer, and is recorded in the words of RBAC."""
    client.post(path, MAP)
    assert client.get(f"{path}/map")["data"] == {"key": "value"}
    client.items(path)
    client.delete(f"{path}/map")

    seen = [(call.verb, call.resource, call.namespace, call.name) for call in proxy.calls]
    assert seen == [
        ("create", "configmaps", namespace, ""),
        ("get", "configmaps", namespace, "map"),
        ("list", "configmaps", namespace, ""),
        ("delete", "configmaps", namespace, "map"),
    ]


def test_the_second_and_third_request_are_refused(proxy: FaultyProxy, client: Client, path: str) -> None:
    """A fault passes over the first `skip` requests that match, and ends after `times`."""
    codes = []
    with proxy.fault(faulty.answer(429, "TooManyRequests"), verb="list", skip=1, times=2) as rule:
        for _ in range(4):
            try:
                client.items(path)
                codes.append(200)
            except ApiError as error:
                codes.append(error.code)
    assert codes == [200, 429, 429, 200]
    assert len(rule.hits) == 2


def test_others_pass(proxy: FaultyProxy, client: Client, path: str) -> None:
    """A fault leaves other verbs and resources alone, and everything once its block has ended."""
    with proxy.fault(faulty.answer(500), verb="create delete", resource="configmaps pods"):
        client.items(path)
        with pytest.raises(ApiError, match="500"):
            client.post(path, MAP)
    client.post(path, MAP)


@pytest.mark.parametrize(
    ("fault", "there"), [(faulty.cut, False), (faulty.lose_answer, True)], ids=["cut", "lost"]
)
def test_connection_breaks(
    fault: faulty.Fault,
    there: bool,
    proxy: FaultyProxy,
    client: Client,
    control_plane: ControlPlane,
    path: str,
) -> None:
    """A request that is cut was never carried out; one whose answer is lost was."""
    with proxy.fault(fault, verb="create", times=1), pytest.raises(ApiError) as broken:
        client.post(path, MAP)
    assert broken.value.code == 0
    names = [item["metadata"]["name"] for item in control_plane.client.items(path)]
    assert ("map" in names) == there


@pytest.mark.parametrize(
    ("fault", "there"), [(faulty.before, False), (faulty.after, True)], ids=["before", "after"]
)
def test_hook(
    fault: object, there: bool, proxy: FaultyProxy, client: Client, control_plane: ControlPlane, path: str
) -> None:
    """A hook runs before the request is carried out, or after, and sees the cluster so."""
    seen = []

    def hook() -> None:
        seen.append([item["metadata"]["name"] for item in control_plane.client.items(path)])

    with proxy.fault(fault(hook), verb="create", times=1), pytest.raises(ApiError):  # type: ignore[operator]
        client.post(path, MAP)
    assert ["map" in names for names in seen] == [there]


def watch(client: Client, path: str) -> str:
    """What a watch of two seconds tells."""
    return client.text(f"{path}?watch=1&timeoutSeconds=2")


def test_watch_streams(proxy: FaultyProxy, client: Client, control_plane: ControlPlane, path: str) -> None:
    """A watch tells what happens while it is open."""
    timer = threading.Timer(0.5, lambda: control_plane.client.post(path, MAP))
    timer.start()
    told = watch(client, path)
    timer.join()
    assert '"name":"map"' in told
    assert proxy.calls[-1].verb == "watch"


def test_watch_too_old(proxy: FaultyProxy, client: Client, path: str) -> None:
    """A watch that is gone says so as the API server does: in an event of type ERROR."""
    with proxy.fault(faulty.gone, verb="watch"):
        assert '"code": 410' in watch(client, path)


def test_watch_is_cut(proxy: FaultyProxy, client: Client, path: str) -> None:
    """A silent watch stays open until its connection is cut; then the client makes another."""
    with proxy.fault(faulty.silence, verb="watch", times=1) as rule:
        timer = threading.Timer(0.5, proxy.cut_watches)
        timer.start()
        watch(client, path)
        timer.join()
    assert len(rule.hits) == 1
    assert [call.verb for call in proxy.calls] == ["watch", "watch"]
