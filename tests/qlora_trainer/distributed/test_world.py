"""The environment that the launcher sets."""

import pytest

from qlora_trainer.distributed.world import World
from qlora_trainer.errors import ConfigurationError

pytestmark = pytest.mark.process

FULL = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a-0.svc", "MASTER_PORT": "29501"}


def test_all_variables_are_read() -> None:
    """A rank knows its place from the launcher's variables."""
    more = {"NODE_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert World.from_environ(FULL | more) == World(3, 4, 1, "a-0.svc", 29501, pod=1, local_size=2)


def test_an_empty_environment_is_a_world_of_one() -> None:
    """Without a launcher the process is alone."""
    world = World.from_environ({})

    assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        pytest.param({"RANK": "4"}, "RANK is '4'; it must be a whole number from 0 to 3", id="rank-too-high"),
        pytest.param({"RANK": "-1"}, "RANK is '-1'", id="negative"),
        pytest.param({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'", id="no-number"),
        pytest.param({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE is '5'", id="more-than-all"),
        pytest.param({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'", id="no-port"),
        pytest.param({"MASTER_ADDR": ""}, "RANK and MASTER_ADDR must be set", id="no-address"),
        pytest.param({"RANK": ""}, "RANK and MASTER_ADDR must be set", id="no-rank"),
    ],
)
def test_bad_variables_are_named(changes: dict[str, str], names: str) -> None:
    """A variable that cannot be meant is refused by its name."""
    with pytest.raises(ConfigurationError, match=names):
        World.from_environ(FULL | changes)
