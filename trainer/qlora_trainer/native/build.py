"""Compile the extensions in C++ for the torch that is installed.

    python -m qlora_trainer.native.build [NAME ...]

Needs g++ (or what CXX names) and the distributions that the extensions link with. Jobs compile nothing: an image does
this once, when it is made.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

from qlora_trainer.native.extension import COMPILED, Extension, all_extensions
from qlora_trainer.native.libraries import ExtensionUnavailable


def command(extension: Extension, output: Path) -> list[str]:
    """The compiler's command line. Raises ExtensionUnavailable when a header or library is not installed."""
    # An include folder is what stands before the name that an #include gives.
    headers = [
        extension.find(distribution, name).parents[name.count("/")]
        for distribution, name in extension.headers
    ]
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"], *headers]
    return [
        os.environ.get("CXX") or "g++",
        *("-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wno-deprecated-declarations"),
        *extension.flags,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DTORCH_EXTENSION_NAME=_{extension.name}",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
        *(word for include in includes for word in ("-isystem", str(include))),
        str(extension.source),
        *(str(extension.find(distribution, name)) for distribution, name in extension.libraries),
        *(f"-L{folder}" for folder in cpp_extension.library_paths()),
        *("-lc10", "-ltorch_cpu", "-ltorch_python", "-Wl,--exclude-libs,ALL"),
        *("-o", str(output)),
    ]


def build(extension: Extension, folder: Path = COMPILED) -> Path:
    """Compile an extension into a folder, and record for what. Raises ExtensionUnavailable."""
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / "extension.so"
            words = command(extension, output)
            compiler = subprocess.run(words, capture_output=True, text=True, check=False)
            if compiler.returncode:
                raise ExtensionUnavailable(
                    f"{extension.title} cannot be compiled; {words[0]} reports:\n{compiler.stderr}"
                )
            extension.manifest(folder).unlink(missing_ok=True)  # until it is true again
            output.replace(extension.file(folder))
    except OSError as error:
        raise ExtensionUnavailable(f"{extension.title} cannot be compiled: {error}") from error
    extension.manifest(folder).write_text(json.dumps(extension.build_info()) + "\n")
    return extension.file(folder)


def main(arguments: Sequence[str] | None = None, extensions: Mapping[str, Extension] | None = None) -> int:
    """Compile the extensions that the command line names, or all. Returns the exit code."""
    known = all_extensions() if extensions is None else extensions
    parser = argparse.ArgumentParser(
        prog="python -m qlora_trainer.native.build", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "name", nargs="*", help=f"any of {', '.join(known)}; without a name, all are compiled"
    )
    names = parser.parse_args(arguments).name or list(known)
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"{', '.join(unknown)}: only {' and '.join(known)} are compiled")
    with ThreadPoolExecutor() as at_once:
        builds = [at_once.submit(build, known[name]) for name in names]
    failed = False
    for name, done in zip(names, builds, strict=True):
        try:
            print(f"{name}: {done.result()}", flush=True)
        except ExtensionUnavailable as error:
            failed = True
            print(error, file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
