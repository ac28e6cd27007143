"""Counters of energy, as Linux shows them."""

from pathlib import Path

import pytest

from qlora_trainer.host.energy import EnergyMeter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with two packages, one of which tells of its cores and its memory, too, and the whole platform."""
    for zone, name in {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys",
    }.items():
        folder = tmp_path / "sys/class/powercap" / zone
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text("1000000000\n")
        count(tmp_path, zone, 900_000_000)
    return tmp_path


def count(root: Path, zone: str, microjoules: int) -> None:
    """Set a counter."""
    (root / "sys/class/powercap" / zone / "energy_uj").write_text(f"{microjoules}\n")


def test_packages_and_memory_are_added_up(root: Path) -> None:
    """Cores are part of their package, and the platform is both."""
    meter = EnergyMeter(root)
    for zone in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl:1", "intel-rapl:2"):
        count(root, zone, 910_000_000)
    meter.sample()

    assert meter.joules == 30.0


def test_a_counter_that_runs_over_goes_on(root: Path) -> None:
    """Between two samples it may do so once."""
    meter = EnergyMeter(root)
    count(root, "intel-rapl:0", 990_000_000)
    meter.sample()
    count(root, "intel-rapl:0", 10_000_000)
    meter.sample()

    assert meter.joules == 110.0


def test_without_counters_nothing_is_known(tmp_path: Path) -> None:
    """As in most virtual machines."""
    meter = EnergyMeter(tmp_path)
    meter.sample()

    assert meter.joules is None


def test_a_part_is_not_the_whole(root: Path) -> None:
    """A counter that cannot be read, or not any more, makes the energy unknown."""
    (root / "sys/class/powercap/intel-rapl:1/energy_uj").write_text("?")
    assert EnergyMeter(root).joules is None

    count(root, "intel-rapl:1", 1)
    meter = EnergyMeter(root)
    assert meter.joules == 0.0
    (root / "sys/class/powercap/intel-rapl:1/energy_uj").unlink()
    meter.sample()
    assert meter.joules is None
