"""Which copy of the operator writes: what each does about the Lease, and what becomes of several in bad times."""

import asyncio
import contextlib
import random
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_operator.controller import leadership
from qlora_operator.controller.api_client import ApiError
from qlora_operator.controller.clock import Clock
from qlora_operator.controller.leadership import Leadership, Lease, Step, next_step


def lease(holder: str = "", **spec: Any) -> Lease:
    """One with this holder, for ten seconds."""
    known = {"holderIdentity": holder, "leaseDurationSeconds": 10, **spec}
    return Lease.of({"metadata": {"resourceVersion": "1"}, "spec": known})


@pytest.mark.parametrize(
    ("found", "leads", "unchanged", "step"),
    [
        pytest.param(None, False, 0, Step.TAKE, id="there is none"),
        pytest.param(None, True, 0, Step.LOST, id="it was deleted: another may have had it"),
        pytest.param(lease(), False, 0, Step.TAKE, id="given back"),
        pytest.param(lease(), True, 0, Step.LOST, id="another had it and gave it back"),
        pytest.param(lease("me"), False, 0, Step.RENEW, id="taken, and the answer got lost"),
        pytest.param(lease("me"), True, 0, Step.RENEW, id="held"),
        pytest.param(lease("me"), True, 3600, Step.RENEW, id="not renewed for long, and nobody took it"),
        pytest.param(lease("other"), True, 0, Step.LOST, id="taken by another"),
        pytest.param(lease("other"), True, 60, Step.LOST, id="taken by another who died"),
        pytest.param(lease("other"), False, 0, Step.WAIT, id="first seen"),
        pytest.param(lease("other"), False, 9.9, Step.WAIT, id="its time is not over"),
        pytest.param(lease("other"), False, 10, Step.TAKE, id="its time is over"),
        pytest.param(lease("other", leaseDurationSeconds=60), False, 59, Step.WAIT, id="it said longer"),
        pytest.param(lease("other", leaseDurationSeconds=None), False, 10, Step.TAKE, id="it said nothing"),
    ],
)
def test_what_a_copy_does_about_the_lease(
    found: Lease | None, leads: bool, unchanged: float, step: Step
) -> None:
    """Only what this copy has seen counts, for as long as the holder said."""
    assert next_step(found, "me", leads=leads, unchanged=unchanged) is step


def test_a_lease_without_a_spec_is_nobodys() -> None:
    """Anybody may have made it."""
    assert Lease.of({"metadata": {"resourceVersion": "7"}}) == Lease("", 10, "7", 0, None)


def test_the_holder_stops_writing_before_another_begins() -> None:
    """A renewal that is not answered leaves time for another, and a fenced holder time before the Lease's end."""
    assert 2 * leadership.ROUND_SECONDS + leadership.LOOK_SECONDS <= leadership.FENCE_SECONDS
    assert leadership.FENCE_SECONDS + 2 < leadership.LEASE_SECONDS
    # Killed right after a renewal, which the other sees one look later, and takes one look after its end.
    assert leadership.LEASE_SECONDS + 2 * leadership.LOOK_SECONDS + leadership.ROUND_SECONDS <= 15


class Server:
    """The API server's part: one Lease, guarded by its version. Time passes in requests, and some get lost."""

    def __init__(self, seed: int = 0, faults: float = 0.0) -> None:
        self.time, self.random, self.faults = 0.0, random.Random(seed), faults
        self.raw: dict[str, Any] | None = None
        self.version = 0
        self.clock = Clock()

    async def _answer(self) -> None:
        await asyncio.sleep(0)
        if self.random.random() < self.faults:
            self.time += self.random.choice([0.01, 2.9])
            raise ApiError(0, "NoAnswer", "lost")
        self.time += 0.01

    async def get(self, *_: Any) -> dict[str, Any]:
        """The Lease."""
        await self._answer()
        if self.raw is None:
            raise ApiError(404, "NotFound", "none")
        return self.raw

    async def create(self, _: Any, __: Any, body: dict[str, Any]) -> None:
        """Unless it is there."""
        await self._put(body, self.raw is None)

    async def replace(self, _: Any, body: dict[str, Any]) -> None:
        """Unless it has changed."""
        known = self.raw and self.raw["metadata"]["resourceVersion"]
        await self._put(body, body["metadata"]["resourceVersion"] == known)

    async def _put(self, body: dict[str, Any], fits: bool) -> None:
        late = self.random.random() < 0.5
        if not late:
            await self._answer()
        if not fits:
            raise ApiError(409, "Conflict", "changed")
        self.version += 1
        self.raw = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        if late:  # done, and the answer may get lost
            await self._answer()

    def copy(self, me: str) -> Leadership:
        """A copy of the operator."""
        client: Any = SimpleNamespace(
            get=self.get, create=self.create, replace=self.replace, clock=self.clock
        )
        return Leadership(client, "system", "operator", me, lambda: None, lambda: None, now=lambda: self.time)


def look(copy: Leadership) -> None:
    """One round, as `run` makes it."""
    with contextlib.suppress(ApiError):
        asyncio.run(copy.round())


def test_the_first_leads_and_others_wait() -> None:
    """As long as the first renews."""
    server = Server()
    first, second = server.copy("first"), server.copy("second")
    for _ in range(30):
        look(first)
        look(second)
        server.time += 2
    assert (first.leads, second.leads) == (True, False)
    assert server.raw is not None
    assert server.raw["spec"]["leaseTransitions"] == 1
    assert server.raw["spec"]["acquireTime"] < server.raw["spec"]["renewTime"]


def test_one_that_stops_gives_the_lease_back() -> None:
    """The next look of another takes it; the one that stopped writes no more."""
    server = Server()
    first, second = server.copy("first"), server.copy("second")
    look(first)
    look(second)
    assert first.may_write()
    asyncio.run(first.release())
    look(second)
    assert (first.may_write(), second.may_write()) == (False, True)


def test_one_that_never_led_takes_nothing_away_when_it_stops() -> None:
    """Nor does one that has lost the Lease."""
    server = Server()
    first, second = server.copy("first"), server.copy("second")
    look(first)
    asyncio.run(second.release())
    look(first)
    assert first.may_write()


def test_one_that_cannot_renew_writes_no_more_until_it_can() -> None:
    """An API server that does not answer anybody ends no operator; nobody else led meanwhile."""
    server = Server()
    first = server.copy("first")
    look(first)
    server.faults = 1.0
    for _ in range(20):
        look(first)
        server.time += 2
    assert not first.may_write()
    server.faults = 0.0
    look(first)
    assert first.may_write()
    assert not first.over


def test_one_that_stood_still_finds_that_it_has_lost() -> None:
    """It has not written since its fence, and never will."""
    server = Server()
    first, second = server.copy("first"), server.copy("second")
    look(first)
    look(second)
    server.time += 11
    assert not first.may_write(), "before it has asked anybody"
    look(second)
    assert second.may_write()
    look(first)
    assert first.over
    look(first)
    assert not first.may_write()


@pytest.mark.parametrize("seed", range(20))
def test_never_two_and_soon_another(seed: int) -> None:
    """Copies that stand still, die and lose answers: never do two write, and once all is quiet one does in time."""
    server = Server(seed, faults=0.3)
    copies = [server.copy(str(number)) for number in range(3)]
    chance, led = server.random, 0

    def some() -> None:
        nonlocal led
        for number, copy in enumerate(copies):
            if copy.over or chance.random() < 0.01:  # another process, with nothing of the old one
                copies[number] = server.copy(f"{number}-{chance.random()}")
            elif chance.random() < 0.8:  # else it stands still
                look(copies[number])
            assert sum(each.may_write() for each in copies) <= 1
        led += any(copy.may_write() for copy in copies)

    for _ in range(300):
        some()
        server.time += chance.choice([0.1, 1.0, 1.0, 4.0])
    assert led > 50
    server.faults, begun = 0.0, server.time
    copies[:] = [server.copy(f"last-{number}") for number in range(3)]
    while not any(copy.may_write() for copy in copies):
        for copy in copies:
            look(copy)
        server.time += leadership.LOOK_SECONDS
    assert server.time - begun <= 15
