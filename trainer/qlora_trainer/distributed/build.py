"""Compile the backends ccl and mpi for the torch that is installed.

    python -m qlora_trainer.distributed.build [ccl] [mpi]

Needs g++ and the distributions of the extras `ccl` and `mpi`. Jobs compile
nothing: an image does this once, when it is made.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils import cpp_extension

from qlora_trainer.distributed import compiled
from qlora_trainer.distributed.libraries import BackendUnavailable, find

BACKENDS = ("ccl", "mpi")


def headers_and_libraries(backend: str) -> tuple[Path, list[Path]]:
    """The folder of a backend's headers, and what to link with. Raises BackendUnavailable."""
    if backend == "ccl":
        header = find("oneccl-cpu-devel", "oneapi/ccl.hpp", backend)
        archive = find("oneccl-cpu-devel", "ccl/cpu/lib/libccl.a", backend)
        # The archive, because the shared library needs the SYCL runtime even where there is no GPU.
        return header.parents[1], [archive, find("tcmlib", "libhwloc.so.15", backend)]
    return find("impi-devel", "include/mpi.h", backend).parent, [find("impi-rt", "libmpi.so.12", backend)]


def command(backend: str, headers: Path, libraries: Sequence[Path], output: Path) -> list[str]:
    """The compiler's command line. Pure but for torch's and Python's own places."""
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"], str(headers)]
    return [
        os.environ.get("CXX") or "g++",
        *("-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wno-deprecated-declarations"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DTORCH_EXTENSION_NAME=_{backend}",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
        *(word for include in includes for word in ("-isystem", include)),
        str(compiled.SOURCES / f"{backend}.cpp"),
        *(str(library) for library in libraries),
        *(f"-L{folder}" for folder in cpp_extension.library_paths()),
        *("-lc10", "-ltorch_cpu", "-ltorch_python", "-Wl,--exclude-libs,ALL"),
        *("-o", str(output)),
    ]


def build(backend: str, folder: Path = compiled.FOLDER) -> Path:
    """Compile a backend and record for what. Raises BackendUnavailable."""
    headers, libraries = headers_and_libraries(backend)
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / "extension.so"
            _run(command(backend, headers, libraries, output), backend)
            compiled.record(backend, folder).unlink(missing_ok=True)  # until it is true again
            output.replace(compiled.extension(backend, folder))
    except OSError as error:
        raise BackendUnavailable(f"backend {backend} cannot be compiled: {error}") from error
    compiled.record(backend, folder).write_text(json.dumps(compiled.facts(backend)) + "\n")
    return compiled.extension(backend, folder)


def _run(words: list[str], backend: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendUnavailable(f"backend {backend} cannot be compiled: {words[0]} said:\n{done.stderr}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the backends of the command line, or both. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backend", nargs="*", metavar="backend", help="ccl, mpi; both when none is named")
    asked = parser.parse_args(arguments).backend or list(BACKENDS)
    if unknown := sorted(set(asked) - set(BACKENDS)):
        parser.error(f"{', '.join(unknown)}: only {' and '.join(BACKENDS)} are compiled")
    try:
        for backend in asked:
            print(f"{backend}: {build(backend)}", flush=True)
    except BackendUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
