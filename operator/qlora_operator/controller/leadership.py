"""Which of several copies of the operator writes: the holder of a Lease (coordination.k8s.io).

A copy that is stopped gives the Lease back, and another has it a second later. One that dies or hangs keeps it for
LEASE_SECONDS after its last renewal. One that cannot renew it stops writing after FENCE_SECONDS, long before another
may begin. That is no proof: a request may be under way for longer. Proof is the status, which every attempt is in
before its children are made, and which is saved only over the version that was read.

No clock of another machine counts: a copy that waits measures how long it has seen the Lease unchanged.
"""

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from qlora_operator.controller.api_client import LEASES, ApiClient, ApiError

log = logging.getLogger(__name__)

LEASE_SECONDS = 10
"""How long the Lease stays that of a holder who does not renew it."""
FENCE_SECONDS = 7.0
"""How long after it began to renew the Lease, the last time that it could, its holder may write."""
RENEW_SECONDS = 2.0
"""Between two renewals."""
LOOK_SECONDS = 1.0
"""Between two looks of a copy that waits."""
ROUND_SECONDS = 3.0
"""How long a look or a renewal may take: after a request that is not answered, there is time for another."""


class Step(enum.Enum):
    """What to do about the Lease."""

    WAIT = enum.auto()
    TAKE = enum.auto()
    RENEW = enum.auto()
    LOST = enum.auto()


@dataclass(frozen=True, slots=True)
class Lease:
    """What the API server says of it."""

    holder: str
    """Empty: it was given back."""
    seconds: float
    """After how long without a change it may be taken from its holder."""
    version: str
    """The resourceVersion."""
    transitions: int
    """How often it has changed hands."""
    acquired: str | None
    """Since when its holder has it."""

    @classmethod
    def of(cls, raw: dict[str, Any]) -> "Lease":
        """That of an API object, in which every field may be missing."""
        spec = raw.get("spec") or {}
        return cls(
            spec.get("holderIdentity") or "",
            spec.get("leaseDurationSeconds") or LEASE_SECONDS,
            raw["metadata"]["resourceVersion"],
            spec.get("leaseTransitions") or 0,
            spec.get("acquireTime"),
        )


def next_step(lease: Lease | None, me: str, *, leads: bool, unchanged: float) -> Step:
    """What a copy of the operator has to do.

    Args:
        lease: None: there is none.
        me: this copy, as a holder.
        leads: this copy is the leader, as far as it knows.
        unchanged: seconds since this copy first saw the Lease as it is.
    """
    if lease is not None and lease.holder == me:
        return Step.RENEW
    if leads:
        # Whoever has it now, or had it in between, knows nothing of this copy.
        return Step.LOST
    if lease is None or not lease.holder or unchanged >= lease.seconds:
        return Step.TAKE
    return Step.WAIT


def uptime() -> float:
    """Seconds that go on while the machine is suspended, as those of other machines do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass
class Leadership:
    """One copy's part in who leads. Once lost it does not come back: what this copy knows is of before."""

    client: ApiClient
    """For the Lease alone: others' requests, which may hang, must not hold up a renewal."""
    namespace: str
    name: str
    me: str
    """Unlike any other copy, also one of the same pod."""
    acquired: Callable[[], None]
    """Called when this copy becomes the leader."""
    lost: Callable[[], None]
    """Called when another has become it instead."""
    now: Callable[[], float] = uptime
    leads: bool = False
    over: bool = False
    """It was lost, or given back."""
    _renewed: float = field(default=float("-inf"), init=False)
    _seen: tuple[str, float] = field(default=("", 0.0), init=False)
    """The version of the Lease that was seen last, and since when."""

    def may_write(self) -> bool:
        """Whether no other copy can have begun to write."""
        return self.leads and not self.over and self.now() - self._renewed < FENCE_SECONDS

    async def run(self) -> None:
        """Wait for the Lease, then keep it, until it is lost."""
        while not self.over:
            try:
                async with asyncio.timeout(ROUND_SECONDS):
                    await self.round()
            except (ApiError, TimeoutError) as error:
                log.warning("the Lease %s/%s: %s", self.namespace, self.name, error or "no answer in time")
            except Exception:
                log.exception("the Lease %s/%s", self.namespace, self.name)
            await asyncio.sleep(RENEW_SECONDS if self.leads else LOOK_SECONDS)

    async def round(self) -> None:
        """Look at the Lease once, and do what is to be done."""
        begun = self.now()
        lease = await self._read()
        if lease is not None and lease.version != self._seen[0]:
            self._seen = lease.version, begun
        step = next_step(lease, self.me, leads=self.leads, unchanged=begun - self._seen[1])
        if step is Step.LOST:
            self.over = True
            log.critical("another operator leads: %s", lease.holder if lease else "the Lease was deleted")
            self.lost()
        elif step is not Step.WAIT and await self._write(lease, self.me, LEASE_SECONDS):
            self._renewed = begun
            if not self.leads:
                self.leads = True
                log.info("leads from now on, as %s", self.me)
                self.acquired()

    async def release(self) -> None:
        """Give the Lease back, so that another copy need not wait. Nothing may be written afterwards."""
        held, self.over = self.leads and not self.over, True
        if held:
            with contextlib.suppress(ApiError, TimeoutError):
                async with asyncio.timeout(ROUND_SECONDS):
                    lease = await self._read()
                    # Again if the last renewal, which nobody waits for any more, comes between the two.
                    while lease is not None and lease.holder == self.me:
                        if await self._write(lease, "", 1):
                            break
                        lease = await self._read()

    async def _read(self) -> Lease | None:
        try:
            return Lease.of(await self.client.get(LEASES, self.namespace, self.name))
        except ApiError as error:
            if error.code != 404:
                raise
            return None

    async def _write(self, lease: Lease | None, holder: str, seconds: int) -> bool:
        """Whether the Lease was as it had been read, and now has this holder."""
        time_now = _micro_time(self.client.clock.now())
        passes = lease is None or lease.holder != holder
        body: dict[str, Any] = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"namespace": self.namespace, "name": self.name},
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": seconds,
                "acquireTime": time_now if passes or lease is None else lease.acquired or time_now,
                "renewTime": time_now,
                "leaseTransitions": (lease.transitions if lease else 0) + (passes and bool(holder)),
            },
        }
        try:
            if lease is None:
                await self.client.create(LEASES, self.namespace, body)
            else:
                body["metadata"]["resourceVersion"] = lease.version
                await self.client.replace(LEASES, body)
        except ApiError as error:
            if error.code != 409:
                raise
            return False
        return True


def _micro_time(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
