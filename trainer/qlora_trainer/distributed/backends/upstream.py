"""Intel's archived binding of oneCCL to torch: recognized, and never imported.

It ended with torch 2.8. A binding works only with the minor version of torch that it was compiled for; with another,
its import ends in "undefined symbol", or worse.
"""

from importlib import metadata

DISTRIBUTIONS = ("oneccl_bind_pt", "oneccl-bind-pt", "oneccl-bindings-for-pytorch")


def refusal(torch_version: str) -> str | None:
    """The sentence that says why an installed binding is not used; None without a binding. Imports nothing of it."""
    for name in DISTRIBUTIONS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        made_for = ".".join(version.partition("+")[0].split(".")[:2])
        return (
            f"oneccl_bindings_for_pytorch {version} is installed, but it was made for torch {made_for} and torch "
            f"{torch_version} is installed: its import would fail with an undefined symbol"
        )
    return None
