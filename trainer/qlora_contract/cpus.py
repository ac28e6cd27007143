"""CPU lists as the kernel writes them, and how launchers on one machine share its CPUs."""

from collections.abc import Iterable, Sequence


class CpuListError(ValueError):
    """A text that is not a CPU list."""


def format_cpu_list(cpus: Iterable[int]) -> str:
    """[0, 1, 2, 3, 8] -> `0-3,8`; no CPUs -> the empty string."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def parse_cpu_list(text: str) -> list[int]:
    """`0-3,8` -> [0, 1, 2, 3, 8], sorted, without duplicates. Raises CpuListError, also for an empty list."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        numbers = [first, last] if dash else [first]
        if not all(number.isascii() and number.isdigit() for number in numbers):
            raise CpuListError(f"{text!r} is not a CPU list such as 0-3,8")
        cpus.update(range(int(first), int(last or first) + 1))
    if not cpus:
        raise CpuListError(f"{text!r} does not name a CPU; a CPU list looks like 0-3,8")
    return sorted(cpus)


def partition(cpus: Sequence[int], parts: int, size: int) -> list[list[int]]:
    """Slices of a machine's CPUs, one for each launcher, in the order given.

    Args:
        cpus: what there is.
        parts: how many slices.
        size: CPUs that each slice should have.

    Returns:
        Disjoint slices of `size` CPUs; smaller ones of even size where there are too few; and single CPUs that several
        slices share where there are fewer CPUs than slices.
    """
    available = len(cpus)
    if available < parts:
        return [[cpus[part % available]] for part in range(parts)]
    if available < parts * size:
        return [
            list(cpus[part * available // parts : (part + 1) * available // parts]) for part in range(parts)
        ]
    return [list(cpus[part * size : (part + 1) * size]) for part in range(parts)]
