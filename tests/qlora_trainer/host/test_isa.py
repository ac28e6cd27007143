"""The ISA probe."""

from pathlib import Path

import pytest

from qlora_contract.run_config import IsaTier
from qlora_trainer.host import isa

AVX2 = "fpu sse2 fma avx avx2"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl"
SKYLAKE = f"{AVX512} avx512cd"
COOPER_LAKE = f"{AVX512} avx512_vnni avx512_bf16"
SAPPHIRE_RAPIDS = f"{COOPER_LAKE} amx_bf16 amx_tile amx_int8"


def cpuinfo(*flags: str) -> str:
    """The text of /proc/cpuinfo with one processor per set of flags."""
    return "\n".join(f"processor\t: {n}\nmodel name\t: X\nflags\t\t: {f}\n" for n, f in enumerate(flags))


@pytest.mark.parametrize(
    ("flags", "permitted", "tier"),
    [
        pytest.param(SAPPHIRE_RAPIDS, True, "amx_bf16", id="amx"),
        pytest.param(SAPPHIRE_RAPIDS, False, "avx512_bf16", id="amx that the kernel refuses"),
        pytest.param(f"{AVX512} amx_tile amx_int8", True, "avx512", id="amx without bf16"),
        pytest.param(COOPER_LAKE, False, "avx512_bf16", id="avx512 with bf16"),
        pytest.param(SKYLAKE, False, "avx512", id="avx512"),
        pytest.param(f"{AVX2} avx512f avx512cd", False, "avx2", id="avx512 without bw, dq and vl"),
        pytest.param(AVX2, False, "avx2", id="avx2"),
    ],
)
def test_the_best_tier_that_nothing_is_missing_for(flags: str, permitted: bool, tier: str) -> None:
    """A processor gets the best tier whose flags and permission it has."""
    assert isa.best_tier(isa.cpu_flags(cpuinfo(flags)), amx_permitted=permitted) == tier


@pytest.mark.parametrize(
    ("text", "names"),
    [
        pytest.param(cpuinfo("sse2 avx avx2"), "lacks fma:", id="avx2 without fma"),
        pytest.param("processor : 0\nFeatures : fp asimd sve\n", "lacks avx2, fma:", id="not x86"),
    ],
)
def test_below_avx2_is_refused(text: str, names: str) -> None:
    """A processor below AVX2 is refused with what it lacks."""
    with pytest.raises(isa.UnsupportedCpuError, match=names):
        isa.best_tier(isa.cpu_flags(text), amx_permitted=False)


def test_a_flag_counts_only_if_every_processor_has_it() -> None:
    """On a machine with mixed cores only the common flags count."""
    assert isa.cpu_flags(cpuinfo("avx2 fma avx512f", "avx2 fma")) == {"avx2", "fma"}


def test_what_a_tier_lacks_is_named() -> None:
    """Missing flags are named, and the refused permission only when the flags are there."""
    flags = isa.cpu_flags(cpuinfo(SAPPHIRE_RAPIDS))

    assert isa.tier_lacks(flags, "amx_bf16", amx_permitted=False) == [isa.AMX_PERMISSION]
    assert isa.tier_lacks(flags - {"amx_tile"}, "amx_bf16", amx_permitted=False) == ["amx_tile"]
    assert isa.tier_lacks(flags, "amx_bf16", amx_permitted=True) == []


def test_the_probe_agrees_with_this_processor() -> None:
    """The probe of the real machine finds a tier whose flags /proc/cpuinfo shows."""
    found = isa.probe()
    tier: IsaTier = isa.probe_isa()

    assert tier == found.tier
    assert isa.TIER_FLAGS[tier] <= isa.cpu_flags(Path("/proc/cpuinfo").read_text())
    assert found.lacks(tier) == []


def test_the_processor_is_named_by_maker_family_and_model(tmp_path: Path) -> None:
    """As the first one's lines have them; what is not there is unknown."""
    (tmp_path / "proc").mkdir()
    info = tmp_path / "proc/cpuinfo"
    lines = [
        "vendor_id\t: GenuineIntel",
        "cpu family\t: 6",
        "model\t\t: 143",
        "model name\t: Xeon",
        "flags\t: fma",
    ]
    info.write_text("\n".join([*lines, "", *lines]) + "\n")
    assert isa.processor(tmp_path) == "GenuineIntel 6/143"

    info.write_text("flags\t: fma\n")
    assert isa.processor(tmp_path) == "unknown unknown/unknown"
