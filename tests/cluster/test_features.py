"""Labels of CPU features are those that Node Feature Discovery gives."""

from pathlib import Path

import pytest

from testcluster import features

LABEL = "feature.node.kubernetes.io/cpu-cpuid."


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"sse4_2"}, []),
        ({"avx2", "fma"}, ["AVX2"]),
        ({"avx2", "avx512f"}, ["AVX2", "AVX512F"]),
        ({"avx512f", "avx512_bf16"}, ["AVX512BF16", "AVX512F"]),
        ({"amx_tile", "amx_bf16", "amx_int8"}, ["AMXBF16", "AMXINT8", "AMXTILE"]),
    ],
    ids=["old", "avx2", "avx512", "bf16", "amx"],
)
def test_labels(flags: set[str], names: list[str]) -> None:
    """Each flag that training can use has a label, and what the CPU lacks has none."""
    assert features.labels(flags) == {LABEL + name: "true" for name in names}


def test_this_machine_is_labelled_by_its_cpus() -> None:
    """The label of AVX2 is there exactly when /proc/cpuinfo has the flag."""
    has = " avx2 " in Path("/proc/cpuinfo").read_text().replace("\n", " ")

    assert (f"{LABEL}AVX2" in features.of_this_machine()) == has
