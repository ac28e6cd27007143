"""Labels that Node Feature Discovery would give this machine."""

from pathlib import Path

PREFIX = "feature.node.kubernetes.io/"
_NAMES = {
    "amx_tile": "AMXTILE",
    "amx_bf16": "AMXBF16",
    "amx_int8": "AMXINT8",
    "avx512f": "AVX512F",
    "avx512_bf16": "AVX512BF16",
    "avx512_vnni": "AVX512VNNI",
    "avx2": "AVX2",
}
"""Flags of /proc/cpuinfo, and how the labels name them."""


def labels(flags: set[str]) -> dict[str, str]:
    """The labels of a CPU with these flags; what is missing has no label."""
    return {f"{PREFIX}cpu-cpuid.{name}": "true" for flag, name in _NAMES.items() if flag in flags}


def of_this_machine() -> dict[str, str]:
    """The labels of this machine's CPUs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return labels(set(next(line for line in lines if line.startswith("flags")).partition(":")[2].split()))
