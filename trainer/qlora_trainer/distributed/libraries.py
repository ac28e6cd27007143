"""Shared libraries that PyPI's distributions bring, found by the distribution that has them."""

import ctypes
from importlib import metadata
from pathlib import Path


class BackendUnavailable(RuntimeError):  # noqa: N818 - named for what it is to the user
    """A backend cannot be used here; the text says what to install or to run."""


def find(distribution: str, name: str, backend: str) -> Path:
    """The file of that name, or whose path ends so, in an installed distribution.

    Raises BackendUnavailable, which says what to install.
    """
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if f"/{file.as_posix()}".endswith(f"/{name}") and (path := Path(str(file.locate()))).exists():
            return path.resolve()
    raise BackendUnavailable(
        f"backend {backend} needs {name} of {distribution}, which is not installed: "
        f"pip install 'qlora-operator[{backend}]'"
    )


def preload(path: Path) -> None:
    """Load a library, so that others which need one of its name get this one."""
    ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
