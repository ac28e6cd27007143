"""How long ranks may go on. With real processes: test_main.py; the decision: qlora_contract/test_supervision.py."""

from collections.abc import Callable

import pytest

from qlora_contract.run_config import RunConfig
from qlora_trainer.launch.supervisor import limits_of


@pytest.mark.parametrize(("period", "grace"), [(300, 295), (10, 5), (4, 2), (1, 0.5)])
def test_the_grace_is_shorter_than_the_pods(
    a_run: Callable[..., RunConfig], period: int, grace: float
) -> None:
    """The launcher keeps part of the period for its own end, at most half of it."""
    assert limits_of(a_run(terminationGracePeriodSeconds=period)).grace == grace


def test_peers_have_longer_than_they_need(a_run: Callable[..., RunConfig]) -> None:
    """Ranks get the collateral wait, and more, before they are terminated.

    Who has ended is not waited for by timeoutSeconds: that is for hosts that are gone, and a rank that stands still was
    waited for already.
    """
    run = a_run(distributed={"timeoutSeconds": 3600})

    assert 5 + 20 < limits_of(run).peer_loss < 60
