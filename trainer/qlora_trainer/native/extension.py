"""What a compiled extension is made of, where it is, and whether it fits the torch that is installed."""

import hashlib
import importlib.machinery
import importlib.util
import json
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qlora_trainer.native.libraries import ExtensionUnavailable, find_file

PACKAGE = Path(__file__).parents[1]
COMPILED = Path(__file__).parent / "compiled"
"""Where `python -m qlora_trainer.native.build` puts the extensions."""
COMMAND = "python -m qlora_trainer.native.build"

File = tuple[str, str]
"""A distribution, and the end of the path of one of its files."""


@dataclass(frozen=True)
class Extension:
    """An extension, as `csrc/NAME.toml` describes it. Beside that lie NAME.cpp and the headers (*.hpp) it includes."""

    name: str
    title: str
    """What sentences call it, such as `backend ccl`."""
    folder: Path
    """Of its sources."""
    extra: str = ""
    """The extra of qlora-operator that installs what is found below."""
    headers: tuple[File, ...] = ()
    """Headers of other libraries, each as an #include names it."""
    libraries: tuple[File, ...] = ()
    """What to link with."""
    flags: tuple[str, ...] = ()
    """Further words for the compiler."""

    @classmethod
    def read(cls, path: Path) -> "Extension":
        """The extension that a file describes. Raises OSError, ValueError, KeyError or TypeError."""
        fields: dict[str, Any] = tomllib.loads(path.read_text())
        for kind in ("headers", "libraries"):
            fields[kind] = tuple((file["distribution"], file["file"]) for file in fields.get(kind, ()))
        fields["flags"] = tuple(fields.get("flags", ()))
        return cls(name=path.stem, folder=path.parent, **fields)

    def find(self, distribution: str, name: str) -> Path:
        """A file that this extension needs. Raises ExtensionUnavailable, which says what to install."""
        path = find_file(distribution, name)
        if path is None:
            raise ExtensionUnavailable(
                f"{self.title} needs {name} of {distribution}, which is not installed: "
                f"pip install 'qlora-operator[{self.extra}]'"
            )
        return path

    @property
    def source(self) -> Path:
        """The file that is compiled."""
        return self.folder / f"{self.name}.cpp"

    def file(self, folder: Path = COMPILED) -> Path:
        """The compiled extension."""
        return folder / f"_{self.name}{importlib.machinery.EXTENSION_SUFFIXES[0]}"

    def manifest(self, folder: Path = COMPILED) -> Path:
        """The file that says what the extension was compiled for."""
        return folder / f"{self.name}.json"

    def build_info(self) -> dict[str, str]:
        """What the extension depends on: a difference in any of these makes a new build necessary."""
        paths = [*sorted(self.folder.glob("*.hpp")), self.source, self.folder / f"{self.name}.toml"]
        sources = b"".join(path.name.encode() + path.read_bytes() for path in paths)
        return {
            "torch": torch.__version__,
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "sources": hashlib.sha256(sources).hexdigest()[:16],
        }

    def incompatibility(self, built: dict[str, Any] | None, now: dict[str, str]) -> str | None:
        """The sentence that says why a compiled extension cannot be loaded, or None. Pure.

        `built` is its manifest, None without one; `now` is `build_info()`.
        """
        remedy = f"run `{COMMAND} {self.name}`"
        if built is None:
            return f"{self.title} is not compiled: {remedy}"
        for name in ("torch", "python"):
            if built.get(name) != now[name]:
                return (
                    f"{self.title} was compiled for {name} {built.get(name)}, but {name} {now[name]} "
                    f"is installed: {remedy}"
                )
        if built.get("sources") != now["sources"]:
            return f"{self.title} was compiled from other sources than those installed: {remedy}"
        return None

    def load(self, folder: Path = COMPILED) -> ModuleType:
        """The extension as a module. The shared libraries that it needs must be loaded already.

        Raises ExtensionUnavailable, before anything is imported when the extension does not fit.
        """
        path, manifest = self.file(folder), self.manifest(folder)
        built = json.loads(manifest.read_text()) if manifest.exists() and path.exists() else None
        if reason := self.incompatibility(built, self.build_info()):
            raise ExtensionUnavailable(reason)
        spec = importlib.util.spec_from_file_location(f"_{self.name}", path)
        assert spec is not None
        assert spec.loader is not None
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            raise ExtensionUnavailable(f"{self.title} cannot be loaded from {path}: {error}") from None
        return module


def all_extensions(package: Path = PACKAGE) -> dict[str, Extension]:
    """Every extension of the package, by its name."""
    return {path.stem: Extension.read(path) for path in sorted(package.rglob("csrc/*.toml"))}
