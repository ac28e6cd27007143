"""What the end of an attempt costs, and what it teaches."""

from qlora_operator.api.names import Reason
from qlora_operator.api.status import NODES_SHOWN, Placement, Restarts
from qlora_operator.api.v1alpha1 import QLoRAJobSpec
from qlora_operator.status import progress_status
from qlora_operator.status.checks import AttemptEnd, Budget
from qlora_operator.status.failure import below_tier
from qlora_operator.status.observation import ReasonMessage
from qlora_operator.status.view import JobView


def charge(
    spec: QLoRAJobSpec, restarts: Restarts, end: AttemptEnd, *, progressed: bool
) -> Restarts | ReasonMessage:
    """The restarts with the one that this end costs; or why the job fails, when its budget is used up.

    Args:
        spec: has the limits.
        restarts: so far.
        end: the attempt's.
        progressed: it has made a new checkpoint, so the cluster does let the job get on.
    """
    charged: dict[str, int | None]
    if end.budget == Budget.USER:
        used, limit, field = restarts.user, spec.backoff_limit, "backoffLimit"
        charged, reason = {"user": used + 1}, Reason.BACKOFF_LIMIT_EXCEEDED
    else:
        forgiven = restarts.infrastructure if progressed else restarts.forgiven or 0
        used, limit = restarts.infrastructure - forgiven, spec.infrastructure_backoff_limit
        field, reason = "infrastructureBackoffLimit", Reason.INFRASTRUCTURE_BACKOFF_LIMIT_EXCEEDED
        charged = {"infrastructure": restarts.infrastructure + 1, "forgiven": forgiven or None}
    if used < limit:
        return restarts.model_copy(update=charged)
    exhausted = f"all {limit} restarts of {field} are used up" if limit else f"{field} is 0"
    return ReasonMessage(reason, f"{end.message}; {exhausted}")


def placement_after(view: JobView, end: AttemptEnd) -> Placement:
    """What the attempt leaves to the next ones: nodes to avoid, and the data type of the first step. Read.PODS."""
    before = view.placement
    found = below_tier(view.pods) if end.reason == Reason.ISA_BELOW_TIER else []
    avoid = list(dict.fromkeys([*found, *before.avoid]))[:NODES_SHOWN]
    dtype = before.dtype or progress_status.dtype(view.pods)
    return before.model_copy(update={"avoid": avoid, "dtype": dtype})
