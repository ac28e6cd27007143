"""Files that installed distributions bring: shared libraries, archives, headers."""

import ctypes
from importlib import metadata
from pathlib import Path


class ExtensionUnavailable(RuntimeError):  # noqa: N818 - named for what it is to the user
    """A compiled extension cannot be used here; the text says what to install or to run."""


def find_file(distribution: str, name: str) -> Path | None:
    """The file of an installed distribution that has this name, or whose path ends so; None when there is none."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if f"/{file.as_posix()}".endswith(f"/{name}") and (path := Path(str(file.locate()))).exists():
            return path.resolve()
    return None


def preload(path: Path) -> None:
    """Load a shared library, so that others that ask for one of its name get this one. Raises OSError."""
    ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
