"""How much energy the processors of this machine take, by their own counters (RAPL)."""

from pathlib import Path

from qlora_trainer.host.kernel_files import ROOT, read_int, read_text


class EnergyMeter:
    """Adds up what the counters of packages and memory advance by.

    They run over within minutes to hours, so `sample` must be called more often than that. All work on the machine
    counts: there is no meter for a process.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._zones = _zones(root / "sys" / "class" / "powercap")
        self._last = {zone: counter for zone in self._zones if (counter := _counter(zone)) is not None}
        self._microjoules = 0

    @property
    def joules(self) -> float | None:
        """Since the meter was made; None where a counter cannot be read, as in most virtual machines and without the
        right to."""
        if not self._zones or len(self._last) < len(self._zones):
            return None
        return self._microjoules / 1e6

    def sample(self) -> None:
        """Read the counters."""
        for zone, before in list(self._last.items()):
            now = _counter(zone)
            if now is None:
                del self._last[zone]
                continue
            over = 0 if now >= before else (read_int(zone / "max_energy_range_uj") or 0)
            self._microjoules += now - before + over
            self._last[zone] = now


def _counter(zone: Path) -> int | None:
    """Microjoules."""
    return read_int(zone / "energy_uj")


def _zones(folder: Path) -> list[Path]:
    """The zones of processor packages, and of memory within them. Cores are a part of their package, and the zone of
    the whole platform would count both again."""
    return [
        zone
        for zone in sorted(folder.glob("intel-rapl:*"))
        if (read_text(zone / "name") or "").startswith(("package-", "dram"))
    ]
