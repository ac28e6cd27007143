"""Intel's archived binding of oneCCL to torch: used where it fits, named where it does not.

It ended with torch 2.8 and works with the very torch minor version that it was
compiled for; with another its import ends in "undefined symbol", or worse.
"""

import importlib
from importlib import metadata

DISTRIBUTIONS = ("oneccl_bind_pt", "oneccl-bind-pt", "oneccl-bindings-for-pytorch")
MODULE = "oneccl_bindings_for_pytorch"


def installed_version() -> str | None:
    """The version of the installed binding, or None. Nothing of it is imported."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def mismatch(binding: str, torch: str) -> str | None:
    """The sentence that names both versions when a binding was made for another torch; None when it fits. Pure."""
    ours, theirs = _minor(torch), _minor(binding)
    if ours == theirs:
        return None
    return (
        f"{MODULE} {binding} is installed, but it was made for torch {theirs} and torch {torch} is installed: "
        "its import would fail with an undefined symbol"
    )


def _minor(version: str) -> str:
    return ".".join(version.partition("+")[0].split(".")[:2])


def load() -> None:
    """Import the binding, which registers `ccl`."""
    importlib.import_module(MODULE)
