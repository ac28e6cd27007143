"""The compiled backends: where they are, and whether they fit the torch that is installed."""

import hashlib
import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qlora_trainer.distributed.libraries import BackendUnavailable

SOURCES = Path(__file__).parent / "csrc"
FOLDER = Path(__file__).parent / "compiled"
"""Where `python -m qlora_trainer.distributed.build` puts the extensions."""
COMMAND = "python -m qlora_trainer.distributed.build"


def extension(backend: str, folder: Path = FOLDER) -> Path:
    """The file of a backend's extension."""
    return folder / f"_{backend}{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def record(backend: str, folder: Path = FOLDER) -> Path:
    """The file that says what the extension was compiled for."""
    return folder / f"{backend}.json"


def facts(backend: str) -> dict[str, str]:
    """What an extension depends on: a difference in any of these needs a new one."""
    python = ".".join(str(part) for part in sys.version_info[:2])
    return {"torch": torch.__version__, "python": python, "sources": _digest(backend)}


def _digest(backend: str) -> str:
    paths = [*sorted(SOURCES.glob("*.hpp")), SOURCES / f"{backend}.cpp"]
    contents = [path.name.encode() + path.read_bytes() for path in paths]
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16]


def why_not(backend: str, built: dict[str, Any] | None, now: dict[str, str]) -> str | None:
    """The sentence that says why an extension cannot be loaded, or None. Pure.

    `built` is its record, None without one; `now` is `facts(backend)`.
    """
    if built is None:
        return f"backend {backend} is not compiled: run `{COMMAND} {backend}`"
    for name in ("torch", "python"):
        if built.get(name) != now[name]:
            return (
                f"backend {backend} was compiled for {name} {built.get(name)}, but {name} {now[name]} "
                f"is installed: run `{COMMAND} {backend}`"
            )
    if built.get("sources") != now["sources"]:
        return f"backend {backend} was compiled from other sources than are here: run `{COMMAND} {backend}`"
    return None


def load(backend: str, folder: Path = FOLDER) -> ModuleType:
    """The extension of a backend. Its libraries must be loaded already.

    Raises BackendUnavailable before anything is imported when it does not fit.
    """
    path, written = extension(backend, folder), record(backend, folder)
    built = json.loads(written.read_text()) if written.exists() and path.exists() else None
    if reason := why_not(backend, built, facts(backend)):
        raise BackendUnavailable(reason)
    spec = importlib.util.spec_from_file_location(f"_{backend}", path)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BackendUnavailable(f"backend {backend} cannot be loaded from {path}: {error}") from None
    return module
