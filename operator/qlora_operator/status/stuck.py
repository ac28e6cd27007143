"""Pods that are in the way of the next attempt, and why they do not go."""

from collections.abc import Sequence
from datetime import timedelta

from qlora_operator.api.names import Reason
from qlora_operator.status.draft import Draft
from qlora_operator.status.observation import Pod, Said

OVERDUE = timedelta(seconds=30)
"""How long after the end of its grace period a pod that is still there counts as stuck."""


def remaining(draft: Draft, pods: Sequence[Pod]) -> Said:
    """Why these pods, which should be gone, are not."""
    lost = next((pod for pod in pods if pod.node in draft.seen.lost_nodes), None)
    if stuck := lost or next((pod for pod in pods if pod.node and _overdue(draft, pod)), None):
        trouble = "does not answer" if lost else "does not end it"
        return Said(
            Reason.NODE_LOST,
            f"pod {stuck.name} may still run on node {stuck.node}, which {trouble}: the job goes on when the "
            "node is back, is deleted, or has the taint node.kubernetes.io/out-of-service",
        )
    names = ", ".join(pod.name for pod in pods[:3]) + (", ..." if len(pods) > 3 else "")
    return Said(Reason.PODS_REMAIN, f"waits for {len(pods)} pod(s) of an earlier attempt to end: {names}")


def _overdue(draft: Draft, pod: Pod) -> bool:
    return pod.deleting_since is not None and draft.now > pod.deleting_since + OVERDUE
