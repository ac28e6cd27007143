"""Instruction sets: which ISA tier this processor reaches, and whether the kernel lets us use AMX."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

from qlora_contract.run_config import ISA_TIERS, IsaTier
from qlora_trainer.host.kernel_files import ROOT, parse_fields

TIER_FLAGS: dict[IsaTier, frozenset[str]] = {
    "amx_bf16": frozenset({"amx_tile", "amx_bf16"}),
    "avx512_bf16": frozenset({"avx512f", "avx512_bf16"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "avx2": frozenset({"avx2", "fma"}),
}
"""Flags of /proc/cpuinfo that each tier needs. amx_bf16 also needs the kernel's permission."""

AMX_PERMISSION = "the kernel's permission to use AMX tiles"
"""What `tier_lacks` names when the flags are present and ARCH_REQ_XCOMP_PERM was refused."""

# asm/prctl.h, asm/unistd_64.h, asm/fpu/types.h of x86-64.
_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


class UnsupportedCpuError(ValueError):
    """The processor is below the lowest tier; the message names what it lacks."""


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Flags that every processor in the text of /proc/cpuinfo has."""
    flags = [frozenset(value.split()) for key, value in parse_fields(cpuinfo) if key == "flags"]
    return frozenset.intersection(*flags) if flags else frozenset()


def tier_lacks(flags: frozenset[str], tier: IsaTier, *, amx_permitted: bool) -> list[str]:
    """What is missing for a tier, as words for a message; empty when nothing is."""
    lacking = sorted(TIER_FLAGS[tier] - flags)
    if tier == "amx_bf16" and not lacking and not amx_permitted:
        return [AMX_PERMISSION]
    return lacking


def best_tier(flags: frozenset[str], *, amx_permitted: bool) -> IsaTier:
    """The best tier that nothing is missing for. Raises UnsupportedCpuError below avx2."""
    for tier in ISA_TIERS:
        if not tier_lacks(flags, tier, amx_permitted=amx_permitted):
            return tier
    lacking = ", ".join(tier_lacks(flags, ISA_TIERS[-1], amx_permitted=amx_permitted))
    raise UnsupportedCpuError(
        f"the processor lacks {lacking}: an x86-64 processor with AVX2 and FMA is needed"
    )


def request_amx() -> bool:
    """Ask the kernel to let this process use AMX tile data (Linux 5.16 and newer); returns whether it does.

    The permission holds for this process and what it forks, and ends with exec, so every rank asks for itself. Only
    for x86-64, where the system call has this number.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)) == 0


@dataclass(frozen=True)
class Isa:
    """What a probe found."""

    flags: frozenset[str]
    amx_permitted: bool

    @property
    def tier(self) -> IsaTier:
        """The best usable tier. Raises UnsupportedCpuError below avx2."""
        return best_tier(self.flags, amx_permitted=self.amx_permitted)

    def lacks(self, tier: IsaTier) -> list[str]:
        """What is missing for a tier; empty when nothing is."""
        return tier_lacks(self.flags, tier, amx_permitted=self.amx_permitted)


def probe(root: Path = ROOT) -> Isa:
    """The processor's flags, and whether this process may use AMX."""
    flags = cpu_flags((root / "proc/cpuinfo").read_text())
    return Isa(flags, amx_permitted=TIER_FLAGS["amx_bf16"] <= flags and request_amx())


def processor(root: Path = ROOT) -> str:
    """Maker, family and model, as /proc/cpuinfo has them, such as `GenuineIntel 6/143`.

    Libraries choose their code by these, and so may round otherwise on two processors of one tier.
    """
    first = dict(reversed(list(parse_fields((root / "proc/cpuinfo").read_text()))))
    vendor, family, model = (first.get(name, "unknown") for name in ("vendor_id", "cpu family", "model"))
    return f"{vendor} {family}/{model}"


def probe_isa() -> IsaTier:
    """The best tier that this process can use. Raises UnsupportedCpuError below avx2."""
    return probe().tier
