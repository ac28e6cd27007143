"""What the operator asks of a real API server, and how it takes a refusal."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_operator.controller import api_client
from qlora_operator.controller.api_client import EVENTS, SERVICES, ApiClient, ApiError
from qlora_operator.controller.clock import Clock
from testcluster.cluster import Cluster as Server

pytestmark = pytest.mark.cluster


class Requests:
    """Remembers the requests it is told of."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int | None]] = []

    def api_request(self, verb: str, resource: str, code: int | None, seconds: float) -> None:
        """One request."""
        assert seconds >= 0
        self.seen.append((verb, resource, code))


def service(name: str, namespace: str) -> dict[str, Any]:
    """A headless Service."""
    return {"metadata": {"name": name, "namespace": namespace}, "spec": {"clusterIP": "None"}}


@pytest.fixture
def asked() -> Requests:
    """The requests of the test."""
    return Requests()


@pytest.fixture
def talk(api_cluster: Server, asked: Requests, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """talk(function) -> what the coroutine function makes of a Cluster."""
    monkeypatch.setenv("KUBECONFIG", str(api_cluster.kubeconfig))

    def run(function: Callable[[ApiClient], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            async with ApiClient(asked) as reached:
                return await function(reached)

        return asyncio.run(main())

    return run


def refusal(talk: Callable[..., Any], function: Callable[[ApiClient], Awaitable[Any]]) -> ApiError:
    """The error with which the API server refuses."""
    with pytest.raises(ApiError) as caught:
        talk(function)
    return caught.value


def test_warnings_are_read_of_one_object_and_not_without_end(
    talk: Callable[..., Any], namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A namespace full of Events, about other objects or about this one, costs no more than a few."""
    monkeypatch.setattr(api_client, "MAX_EVENTS", 3)

    def event(number: int, uid: str, kind: str = "Warning") -> dict[str, Any]:
        about = {"kind": "Pod", "namespace": namespace, "name": "p", "uid": uid}
        metadata = {"name": f"e{number}", "namespace": namespace}
        return {"metadata": metadata, "involvedObject": about, "type": kind, "reason": f"R{number}"}

    async def work(reached: ApiClient) -> list[list[str]]:
        for number in range(5):
            await reached.create(EVENTS, namespace, event(number, "mine" if number % 2 else "theirs"))
        await reached.create(EVENTS, namespace, event(5, "mine", "Normal"))
        for number in range(6, 11):
            await reached.create(EVENTS, namespace, event(number, "many"))
        found = [await reached.warning_events(namespace, uid) for uid in ("mine", "many", "none")]
        return [[raw["reason"] for raw in each] for each in found]

    mine, many, none = talk(work)

    assert (mine, len(many), none) == (["R1", "R3"], 3, [])


def test_lists_come_page_by_page(
    talk: Callable[..., Any], namespace: str, monkeypatch: pytest.MonkeyPatch, asked: Requests
) -> None:
    """More objects than a page holds are all seen, each once."""
    monkeypatch.setattr(api_client, "PAGE", 2)

    async def work(reached: ApiClient) -> list[str]:
        for number in range(5):
            await reached.create(SERVICES, namespace, service(f"s{number}", namespace))
        return [raw["metadata"]["name"] async for raw in reached.list_all(SERVICES, namespace)]

    assert sorted(talk(work)) == ["s0", "s1", "s2", "s3", "s4"]
    assert asked.seen.count(("get", "services", 200)) == 3


def test_refusals_say_why(talk: Callable[..., Any], namespace: str) -> None:
    """The API server's code and word for it come through, and its sentence."""
    body = service("twice", namespace)
    talk(lambda reached: reached.create(SERVICES, namespace, body))

    again = refusal(talk, lambda reached: reached.create(SERVICES, namespace, body))
    missing = refusal(talk, lambda reached: reached.get(SERVICES, namespace, "none"))

    assert (again.code, again.reason) == (409, "AlreadyExists")
    assert (missing.code, missing.reason) == (404, "NotFound")
    assert '"none" not found' in str(missing)


def test_only_the_very_object_is_deleted(talk: Callable[..., Any], namespace: str) -> None:
    """One of the same name with another uid is left alone; one that is gone is no error, and the answer says so."""

    async def work(reached: ApiClient) -> Any:
        made = await reached.create(SERVICES, namespace, service("kept", namespace))
        uid = made["metadata"]["uid"]
        there = [await reached.delete(SERVICES, namespace, "kept", "another-uid")]
        kept = await reached.get(SERVICES, namespace, "kept")
        there += [await reached.delete(SERVICES, namespace, name, uid) for name in ("kept", "never-there")]
        return uid == kept["metadata"]["uid"], there

    assert talk(work) == (True, [False, True, False])


def test_every_answer_tells_the_servers_time(talk: Callable[..., Any], namespace: str) -> None:
    """A refusal, too; this machine's clock may be wrong by days."""

    async def work(reached: ApiClient) -> Any:
        reached.clock = Clock(wall=lambda: datetime(2026, 1, 31, tzinfo=UTC))
        with contextlib.suppress(ApiError):
            await reached.get(SERVICES, namespace, "none")
        return abs(reached.clock.now() - datetime.now(UTC))

    assert talk(work) < timedelta(seconds=5)


def test_a_replaced_token_is_read_again(
    api_cluster: Server,
    crd: None,
    talk: Callable[..., Any],
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: Requests,
) -> None:
    """A refused token makes the operator read its kubeconfig anew, once."""
    api_cluster.kubectl("-n", namespace, "create", "serviceaccount", "reader")
    right = api_cluster.kubeconfig_for("reader", namespace)
    content = yaml.safe_load(right.read_text())
    content["users"][0]["user"]["token"] = "of-yesterday"
    mine = tmp_path / "kubeconfig"
    mine.write_text(yaml.safe_dump(content))
    monkeypatch.setenv("KUBECONFIG", str(mine))

    async def work(reached: ApiClient) -> int:
        mine.write_text(right.read_text())
        try:
            await reached.get(SERVICES, namespace, "none")
        except ApiError as error:
            return error.code
        return 200

    assert talk(work) == 403, "known, and without permissions"
    assert asked.seen == [("get", "services", 403)]


def test_no_answer_is_an_error_of_its_own(
    api_cluster: Server,
    talk: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: Requests,
) -> None:
    """A server that is not there gives code 0, and is counted without a code."""
    content = yaml.safe_load(Path(api_cluster.kubeconfig).read_text())
    content["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    gone = tmp_path / "kubeconfig"
    gone.write_text(yaml.safe_dump(content))
    monkeypatch.setenv("KUBECONFIG", str(gone))

    assert refusal(talk, lambda reached: reached.pods("team", "u")).code == 0
    assert asked.seen == [("get", "pods", None)]


@pytest.mark.parametrize(
    ("versions", "back"),
    [
        ([[5], [5], [9]], False),
        ([[5], [4]], True),
        ([[5, 5], [9, 9], [8]], True),
    ],
    ids=["time goes on", "a restored copy", "and of more than one page"],
)
def test_data_that_go_back_in_time_are_noticed(
    monkeypatch: pytest.MonkeyPatch, asked: Requests, versions: list[list[int]], *, back: bool
) -> None:
    """A list is never older than the one before, unless the API server was restored from a copy. Later pages of a list
    are of the version of its first."""

    async def work() -> bool:
        reached = ApiClient(asked)
        for pages in versions:
            answers = [
                {"items": [], "metadata": {"resourceVersion": str(version), "continue": "x" * (left > 0)}}
                for left, version in zip(reversed(range(len(pages))), pages, strict=True)
            ]

            async def answer(*_: Any, answers: list[Any] = answers, **__: Any) -> Any:
                return answers.pop(0)

            monkeypatch.setattr(reached, "_request", answer)
            assert [raw async for raw in reached.list_all(SERVICES, None)] == []
        return reached.went_back.is_set()

    assert asyncio.run(work()) == back
