"""What a job costs: CPUs times the time that they were its own, over all attempts, and what follows from that."""

import re
from collections.abc import Sequence

from pydantic import ConfigDict, Field

from qlora_contract.base import ContractModel

_PRICE = re.compile(r"(?P<amount>[0-9]{1,9}([.][0-9]{1,9})?)( (?P<currency>[^\s\x00-\x1f\x7f]{1,8}))?")
JOULES_PER_KWH = 3.6e6


class Price(ContractModel):
    """What one CPU costs for one hour."""

    amount: float = Field(ge=0, lt=1e9)
    currency: str = ""

    def __str__(self) -> str:
        amount = f"{self.amount:.9f}".rstrip("0").rstrip(".")
        return f"{amount} {self.currency}".strip()


def parse_price(text: str) -> Price:
    """The price of a CPU's hour: `0.04` or `0.04 EUR`. Raises ValueError."""
    match = _PRICE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is not a price: it must be an amount and, if you like, a currency: 0.04 EUR"
        )
    return Price(amount=float(match["amount"]), currency=match["currency"] or "")


class AttemptRecord(ContractModel):
    """One attempt at a job, as its rank 0 kept it in attempts.json. What a newer release adds is passed over."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    job_uid: str
    attempt: int
    began: str
    """RFC 3339, UTC."""
    seconds: float
    """From then on to the last time that the record was written."""
    cpus: int
    """Of all ranks."""
    queue_seconds: float | None = None
    """From the request for its pods to the first rank; None where nobody told when that was."""
    first_step: int | None = None
    """Steps that were completed when it began to make its own; None when it did not get there."""
    step: int | None = None
    """Steps completed at its end."""
    lost_steps: int = 0
    """Steps that the attempts before it had made since their last checkpoint, and that it made again."""
    lost_seconds: float = 0.0
    """Which those had taken."""
    energy_joules: float | None = None
    """Of the processors of its nodes, other work on them included; None where they do not tell."""
    ended: str | None = None
    """How it ended, in a sentence; None while it runs, and of one that was killed."""

    @property
    def core_hours(self) -> float:
        """CPUs times hours."""
        return self.cpus * self.seconds / 3600


class Cost(ContractModel):
    """What a job has cost so far."""

    attempts: int
    seconds: float
    """Of all attempts, without the time between them."""
    core_hours: float
    queue_seconds: float | None
    """None: not known of any attempt."""
    lost_steps: int
    lost_core_hours: float
    energy_kwh: float | None
    """None: not known of every attempt."""
    price_per_core_hour: float | None
    currency: str
    money: float | None
    """None: without a price."""


def cost_of(records: Sequence[AttemptRecord], price: Price | None) -> Cost:
    """The sum over all attempts. A part of the energy is no energy: it is None if any attempt's is not known."""
    core_hours = sum(record.core_hours for record in records)
    queued = [record.queue_seconds for record in records if record.queue_seconds is not None]
    energy = [record.energy_joules for record in records if record.energy_joules is not None]
    return Cost(
        attempts=len(records),
        seconds=sum(record.seconds for record in records),
        core_hours=core_hours,
        queue_seconds=sum(queued) if queued else None,
        lost_steps=sum(record.lost_steps for record in records),
        lost_core_hours=sum(record.cpus * record.lost_seconds / 3600 for record in records),
        energy_kwh=sum(energy) / JOULES_PER_KWH if records and len(energy) == len(records) else None,
        price_per_core_hour=None if price is None else price.amount,
        currency="" if price is None else price.currency,
        money=None if price is None else core_hours * price.amount,
    )
