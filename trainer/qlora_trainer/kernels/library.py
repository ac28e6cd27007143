"""Loading the kernel library, and which of its tiers runs in this process.

The best tier that the processor and the kernel of the operating system allow, or what QLORA_KERNELS names; never what
was measured to be faster, since a resume is bit-exact only with the same. Where the library is not compiled, plain
torch runs, called `reference`.
"""

import ctypes
import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_contract.run_config import IsaTier
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.host.isa import Isa, probe
from qlora_trainer.kernels.build import COMMAND, COMPILED, library_file, manifest_file, sources_hash
from qlora_trainer.native.libraries import ExtensionUnavailable

log = logging.getLogger(__name__)

KERNELS_ENV = "QLORA_KERNELS"
"""Forces a tier, or `reference`. For tests and comparisons: the processor must have what the tier needs."""
REFERENCE = "reference"
TIERS: dict[str, tuple[IsaTier, ...]] = {
    "avx2": ("avx2",),
    "avx512": ("avx512", "avx2"),
    "avx512_bf16": ("avx512_bf16", "avx512", "avx2"),
    "amx_bf16": ("amx_bf16", "avx512_bf16", "avx512", "avx2"),
    "amx_emulated": ("avx2",),
}
"""The library's tiers in the order of its table, from the slowest to the fastest, each with the ISA tiers that its
code uses. amx_emulated is the code of amx_bf16 with the tile unit in plain C++: for tests, chosen only when forced."""
EMULATED = "amx_emulated"


@dataclass(frozen=True)
class Library:
    """The loaded library, and the tier that runs."""

    tier: str
    """Of TIERS."""
    build: str
    """Names sources, compiler and flags that it was made from: the same build and tier give the same bits."""
    handle: ctypes.CDLL

    @property
    def name(self) -> str:
        """What a checkpoint records, such as `avx512/0123456789ab`."""
        return f"{self.tier}/{self.build}"

    def function(self, name: str, *argtypes: Any) -> Callable[..., None]:
        """A function of the library: f(threads, *arguments), of this tier.

        Args:
            name: without its prefix `qlora_`.
            argtypes: ctypes' types of the arguments after tier and threads.

        Returns:
            A function that raises MemoryError when there is no memory for its scratch.
        """
        compiled = self.handle[f"qlora_{name}"]
        compiled.argtypes = [ctypes.c_int, ctypes.c_int, *argtypes]
        compiled.restype = ctypes.c_int
        number = list(TIERS).index(self.tier)

        def call(threads: int, *arguments: Any) -> None:
            status = compiled(number, threads, *arguments)
            if status == 2:
                raise MemoryError(f"{name}: not enough memory for the kernel's scratch")
            assert status == 0, f"{name}: status {status}"

        return call


def incompatibility(built: dict[str, Any] | None, sources: str) -> str | None:
    """The sentence that says why a compiled library is not used, or None. Pure.

    `built` is its manifest, None without one; `sources` is `sources_hash()`.
    """
    if built is None:
        return f"the kernel library is not compiled: run `{COMMAND}`"
    if built.get("sources") != sources:
        return f"the kernel library was compiled from other sources than those installed: run `{COMMAND}`"
    return None


def lacks(isa: Isa, tier: str) -> list[str]:
    """What the processor is missing for a tier of the library, as words for a message. Pure."""
    return sorted({word for needed in TIERS[tier] for word in isa.lacks(needed)})


def choose(forced: str | None, isa: Isa, unavailable: str | None) -> tuple[str, str]:
    """The tier to run, or `reference`, and why. Pure.

    Args:
        forced: the value of QLORA_KERNELS, None or empty without.
        isa: of the processor.
        unavailable: why the library cannot be used, or None.

    Raises:
        ConfigurationError: what is forced does not exist or cannot run here.
    """
    if forced == REFERENCE:
        return REFERENCE, f"plain torch, by {KERNELS_ENV}"
    if forced:
        if forced not in TIERS:
            raise ConfigurationError(
                f"{KERNELS_ENV} is {forced!r}; it must be one of {', '.join([REFERENCE, *TIERS])}"
            )
        if unavailable:
            raise ConfigurationError(f"{KERNELS_ENV} is {forced}, but {unavailable}")
        if lacking := lacks(isa, forced):
            raise ConfigurationError(
                f"{KERNELS_ENV} is {forced}, but the processor lacks {', '.join(lacking)}"
            )
        return forced, f"by {KERNELS_ENV}"
    if unavailable:
        return REFERENCE, f"plain torch: {unavailable}"
    usable = [tier for tier in TIERS if tier != EMULATED and not lacks(isa, tier)]
    if not usable:
        return REFERENCE, f"plain torch: the processor lacks {', '.join(lacks(isa, next(iter(TIERS))))}"
    return usable[-1], "the best that the processor has"


def open_library(folder: Path = COMPILED) -> tuple[ctypes.CDLL, str]:
    """The library and its build. Raises ExtensionUnavailable, before it is loaded when it is not of these sources."""
    path, manifest = library_file(folder), manifest_file(folder)
    built = json.loads(manifest.read_text()) if manifest.exists() and path.exists() else None
    if reason := incompatibility(built, sources_hash()):
        raise ExtensionUnavailable(reason)
    assert built is not None
    try:
        return ctypes.CDLL(str(path)), built["build"]
    except OSError as error:
        raise ExtensionUnavailable(f"the kernel library cannot be loaded: {error}; run `{COMMAND}`") from None


def find(folder: Path = COMPILED, environ: Mapping[str, str] = os.environ) -> Library | None:
    """The library with the tier that runs in this process, None where that is the reference. Logs which, and why.

    Raises:
        ConfigurationError: QLORA_KERNELS names what cannot run here.
    """
    unavailable, opened = None, None
    try:
        opened = open_library(folder)
    except ExtensionUnavailable as error:
        unavailable = str(error)
    tier, reason = choose(environ.get(KERNELS_ENV), probe(), unavailable)
    log.info("kernels: %s (%s)", tier, reason)
    if tier == REFERENCE:
        return None
    assert opened is not None
    return Library(tier, opened[1], opened[0])


@functools.cache
def loaded() -> Library | None:
    """`find()`, once in a process and what it forks."""
    return find()
