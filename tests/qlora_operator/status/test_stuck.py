"""Pods in the way of the next attempt."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from qlora_operator.api.names import Reason
from qlora_operator.api.types import QLoRAJob
from qlora_operator.status.draft import Draft
from qlora_operator.status.observation import Observation, Pod
from qlora_operator.status.stuck import OVERDUE, remaining

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
MOMENT = timedelta(seconds=1)
GOES = Pod("p", "u", 0, 0, "Running", node="n", deleting_since=NOW - OVERDUE)
RUNS = replace(GOES, deleting_since=None)
OVERTIME = replace(GOES, name="late", deleting_since=NOW - OVERDUE - MOMENT)
LOST = replace(RUNS, name="q", node="lost")
HINT = "the job goes on when the node is back, is deleted, or has the taint node.kubernetes.io/out-of-service"


@pytest.mark.parametrize(
    ("pods", "reason", "message"),
    [
        ([GOES], Reason.PODS_REMAIN, "waits for 1 pod(s) of an earlier attempt to end: p"),
        ([RUNS] * 4, Reason.PODS_REMAIN, "waits for 4 pod(s) of an earlier attempt to end: p, p, p, ..."),
        (
            [GOES, OVERTIME],
            Reason.NODE_LOST,
            f"pod late may still run on node n, which does not end it: {HINT}",
        ),
        (
            [OVERTIME, LOST],
            Reason.NODE_LOST,
            f"pod q may still run on node lost, which does not answer: {HINT}",
        ),
        (
            [replace(OVERTIME, node=None)],
            Reason.PODS_REMAIN,
            "waits for 1 pod(s) of an earlier attempt to end: late",
        ),
    ],
    ids=["in-time", "many", "overdue", "lost", "nowhere"],
)
def test_remaining(a_job: Callable[..., QLoRAJob], pods: list[Pod], reason: Reason, message: str) -> None:
    """A pod that its node does not end, or whose node is silent, holds the job under that node's name."""
    draft = Draft(a_job(), Observation(lost_nodes=frozenset({"lost"})), NOW)
    said = remaining(draft, pods)
    assert (said.reason, said.message) == (reason, message)
