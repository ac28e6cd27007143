"""Drop what the images can never load from the environment that this runs in.

Of the CUDA libraries (4 GB) and triton (1 GB): what `import torch` does without; torch from the usual index is
linked against the rest. A build of torch for CPUs brings none of them. Of Kubernetes' blocking client: its typed
classes (37 MB), each loaded where it is named, which nobody here does.
"""

import importlib.metadata
import importlib.util
import re
import sysconfig
from importlib.metadata import Distribution
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))
FOR_GPUS = re.compile(r"(nvidia|cuda|triton)\b.*")


def mapped() -> set[Path]:
    """The files that a process maps when it imports torch."""
    import torch
    import torch.distributed  # noqa: F401

    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(line.split(maxsplit=5)[5]).resolve() for line in lines if "/" in line}


def drop_unmapped(distribution: Distribution, kept: set[Path]) -> None:
    """Remove the package's libraries that are not kept; where none is, the whole package."""
    files = [Path(str(file.locate())).resolve() for file in distribution.files or ()]
    needed = not kept.isdisjoint(files)
    for file in files:
        if file not in kept and (".so" in file.name or not needed):
            file.unlink(missing_ok=True)


def drop_for_gpus() -> None:
    """Keep of the packages for GPUs what torch cannot be imported without."""
    kept = mapped()
    for distribution in list(importlib.metadata.distributions()):
        if FOR_GPUS.fullmatch(distribution.name):
            drop_unmapped(distribution, kept)


def drop_typed_classes() -> None:
    """Remove the modules of the blocking client's models and groups of the API."""
    for folder in ("models", "api"):
        for module in (SITE / "kubernetes" / "client" / folder).glob("[a-z]*.py"):
            module.unlink()


def remove_empty_folders() -> None:
    """Remove what is left of packages."""
    for path in sorted(SITE.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


if __name__ == "__main__":
    if importlib.util.find_spec("torch"):
        drop_for_gpus()
    drop_typed_classes()
    remove_empty_folders()
