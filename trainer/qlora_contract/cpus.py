"""CPUs as lists, and how launchers on one machine share them."""

from collections.abc import Iterable, Sequence


def format_cpu_list(cpus: Iterable[int]) -> str:
    """[0, 1, 2, 3, 8] -> `0-3,8`, as the kernel writes it."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def slices(cpus: Sequence[int], parts: int, each: int) -> list[list[int]]:
    """`parts` disjoint slices of `each` CPUs, in the order given; of fewer, shared evenly, where there are too
    few, and the same ones in turns where there are not even as many as parts."""
    there = len(cpus)
    if there < parts:
        return [[cpus[part % there]] for part in range(parts)]
    if there < parts * each:
        return [list(cpus[part * there // parts : (part + 1) * there // parts]) for part in range(parts)]
    return [list(cpus[part * each : (part + 1) * each]) for part in range(parts)]
