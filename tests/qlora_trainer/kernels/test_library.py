"""Which tier of the kernel library runs, and when it is refused."""

import json
from pathlib import Path

import pytest

from qlora_trainer.errors import ConfigurationError
from qlora_trainer.host.isa import TIER_FLAGS, Isa
from qlora_trainer.kernels import library
from qlora_trainer.kernels.build import COMMAND, library_file, manifest_file, sources_hash
from qlora_trainer.kernels.library import TIERS, choose, find, incompatibility

NOT_COMPILED = f"the kernel library is not compiled: run `{COMMAND}`"


def isa(*tiers: str, permitted: bool = False) -> Isa:
    """A processor with the flags of these ISA tiers."""
    return Isa(frozenset().union(*(TIER_FLAGS[tier] for tier in tiers)), amx_permitted=permitted)


ZEN4 = isa("avx2", "avx512", "avx512_bf16")
SAPPHIRE_RAPIDS = isa(*TIER_FLAGS, permitted=True)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (isa("avx2"), "avx2"),
        (isa("avx2", "avx512"), "avx512"),
        (ZEN4, "avx512_bf16"),
        (SAPPHIRE_RAPIDS, "amx_bf16"),
        (isa(*TIER_FLAGS, permitted=False), "avx512_bf16"),
        (isa("avx2", "avx512_bf16"), "avx2"),
        (isa(), "reference"),
    ],
    ids=["avx2", "avx512", "bf16", "amx", "amx-refused", "hypervisor-hides-avx512bw", "old"],
)
def test_the_best_tier_that_the_processor_has(processor: Isa, expected: str) -> None:
    """Every instruction set that a tier's code uses must be there; the emulated tier is never chosen."""
    assert choose(None, processor, None)[0] == expected
    assert choose("", processor, None)[0] == expected


@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_can_be_forced(tier: str) -> None:
    """Each that the processor has, not only its best."""
    assert choose(tier, SAPPHIRE_RAPIDS, None)[0] == tier


def test_without_the_library_the_reference_runs_and_says_why() -> None:
    """The reason is the sentence with the command that compiles it."""
    assert choose(None, ZEN4, NOT_COMPILED) == ("reference", f"plain torch: {NOT_COMPILED}")
    assert choose("reference", ZEN4, NOT_COMPILED)[0] == "reference"


@pytest.mark.parametrize(
    ("forced", "processor", "unavailable", "message"),
    [
        ("avx1024", ZEN4, None, "QLORA_KERNELS is 'avx1024'; it must be one of reference, avx2, avx512,"),
        ("avx2", ZEN4, NOT_COMPILED, "QLORA_KERNELS is avx2, but the kernel library is not compiled: run"),
        ("amx_bf16", ZEN4, None, "QLORA_KERNELS is amx_bf16, but the processor lacks amx_bf16, amx_tile"),
        ("avx512", isa("avx2"), None, "but the processor lacks avx512bw, avx512dq, avx512f, avx512vl"),
    ],
    ids=["unknown", "not-compiled", "no-amx", "no-avx512"],
)
def test_what_cannot_be_forced_is_refused(
    forced: str, processor: Isa, unavailable: str | None, message: str
) -> None:
    """Who forces a tier gets that tier or an error, never another."""
    with pytest.raises(ConfigurationError) as caught:
        choose(forced, processor, unavailable)

    assert message in str(caught.value)


def test_a_library_of_other_sources_is_refused() -> None:
    """Its manifest says what it was compiled from."""
    assert incompatibility({"sources": "a"}, "a") is None
    assert incompatibility({"sources": "b"}, "a") == (
        f"the kernel library was compiled from other sources than those installed: run `{COMMAND}`"
    )
    assert incompatibility(None, "a") == NOT_COMPILED


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, NOT_COMPILED),
        ({"sources": "other", "build": "b"}, "compiled from other sources"),
        ({"sources": sources_hash(), "build": "b"}, "cannot be loaded"),
    ],
    ids=["missing", "stale", "broken"],
)
def test_an_unusable_library_is_told_in_one_line(
    manifest: dict[str, str] | None, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Missing, stale or broken: the reference runs, and the log says what to do."""
    library_file(tmp_path).write_text("no library")
    if manifest:
        manifest_file(tmp_path).write_text(json.dumps(manifest))
    with caplog.at_level("INFO"):
        assert find(tmp_path, {}) is None

    (line,) = caplog.messages
    assert line.startswith("kernels: reference (plain torch: the kernel library ")
    assert message in line
    assert f"run `{COMMAND}`" in line


def test_the_choice_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """However often it is asked for."""
    monkeypatch.setenv(library.KERNELS_ENV, "reference")
    library.loaded.cache_clear()
    with caplog.at_level("INFO"):
        assert [library.loaded() for _ in range(3)] == [None] * 3
    library.loaded.cache_clear()

    assert caplog.messages == ["kernels: reference (plain torch, by QLORA_KERNELS)"]
