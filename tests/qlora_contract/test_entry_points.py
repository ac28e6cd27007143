"""The modules that processes are started with."""

import importlib.util

import pytest

from qlora_contract import entry_points


@pytest.mark.parametrize(
    "module",
    [
        entry_points.LAUNCH,
        entry_points.RANK,
        entry_points.FORK_SERVER,
        entry_points.TRANSFER,
        entry_points.PLAN,
        entry_points.REPORT,
    ],
)
def test_every_entry_point_can_be_started(module: str) -> None:
    """`python -m` finds a module, or a package with a __main__."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    if spec.submodule_search_locations is not None:
        assert importlib.util.find_spec(f"{module}.__main__") is not None


def test_the_modules_that_images_of_other_releases_are_started_with_stay() -> None:
    """An old operator starts a new image, and a new operator an old one."""
    assert entry_points.LAUNCH == "qlora_trainer.launch"
    assert entry_points.TRANSFER == "qlora_trainer.transfer"
