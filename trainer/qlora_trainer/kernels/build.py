"""Compile the kernel library: a minute or two, once; a job compiles nothing.

    python -m qlora_trainer.kernels.build [--if-possible] [--if-missing]

Takes the compiler that CXX names, else g++, else clang++, else that of the package ziglang, where it is installed.
With --if-possible the lack of a compiler, or of a folder that can be written to, is told and is no failure, since plain
torch can multiply, too. With --if-missing nothing is done and said where the library is there and of these sources.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_trainer.native.libraries import ExtensionUnavailable

SOURCES = Path(__file__).parent / "csrc"
COMPILED = Path(__file__).parent / "compiled"
"""Where the library is put."""
COMMAND = "python -m qlora_trainer.kernels.build"

FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-math-errno"),
    # A product and a sum are one rounding or two as the source says, whatever the compiler thinks of it.
    *("-ffp-contract=off", "-Wall", "-Wextra"),
    # g++ 12 sees both in its own header of AVX-512.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")
TIER_FLAGS = {
    "tier_avx2": ("-mavx2", "-mfma"),
    "tier_avx512": _AVX512,
    "tier_avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "tier_amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "tier_amx_emulated": ("-mavx2", "-mfma"),
}
"""What each tier's file may use beyond the oldest x86-64, by the file's name."""


def library_file(folder: Path = COMPILED) -> Path:
    """The compiled library."""
    return folder / "libqlora_kernels.so"


def manifest_file(folder: Path = COMPILED) -> Path:
    """The file that says what the library was compiled from."""
    return folder / "manifest.json"


def sources_hash(folder: Path = SOURCES) -> str:
    """What changes with any source file."""
    content = hashlib.sha256()
    for path in sorted([*folder.glob("*.cpp"), *folder.glob("*.hpp")]):
        content.update(f"{path.name}\n".encode() + path.read_bytes())
    return content.hexdigest()[:16]


class NoCompilerError(ExtensionUnavailable):
    """There is no compiler of C++ here."""


def compiler(environ: Mapping[str, str]) -> list[str]:
    """The words that start the compiler. Raises NoCompilerError."""
    if environ.get("CXX"):
        return environ["CXX"].split()
    for name in ("g++", "clang++"):
        if shutil.which(name, path=environ.get("PATH")):
            return [name]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise NoCompilerError(
        "the kernel library cannot be compiled: no g++, clang++ or Python package ziglang is installed, and CXX "
        f"names no other compiler; install one and run `{COMMAND}`"
    )


def commands(words: Sequence[str], folder: Path, output: Path) -> list[list[str]]:
    """The command lines that compile each source file into a folder and link them. Pure.

    Args:
        words: the compiler.
        folder: of the object files.
        output: the library.
    """
    zig = any("zig" in Path(word).name for word in words)
    # The oldest x86-64, as this compiler spells it: some compilers' default is the processor that they run on.
    baseline = "-march=x86_64" if zig else "-march=x86-64"
    # Nothing of the C++ library is used; zig would compile it first, for minutes.
    linked = ("-nostdlib++",) if zig else ("-Wl,--as-needed",)
    lines, objects = [], []
    for source in sorted(SOURCES.glob("*.cpp")):
        objects.append(str(folder / f"{source.stem}.o"))
        extra = TIER_FLAGS.get(source.stem, ())
        lines.append([*words, *FLAGS, baseline, *extra, "-c", str(source), "-o", objects[-1]])
    lines.append([*words, "-shared", "-pthread", *linked, *objects, "-o", str(output)])
    return lines


def build(folder: Path = COMPILED, environ: Mapping[str, str] = os.environ) -> Path:
    """Compile the library into a folder, and record from what. Raises ExtensionUnavailable."""
    words = compiler(environ)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / library_file(folder).name
            for line in commands(words, Path(scratch), output):
                _run(line)
            version = _run([*words, "--version"])
            manifest_file(folder).unlink(missing_ok=True)  # until it is true again
            output.replace(library_file(folder))
    except OSError as error:
        raise ExtensionUnavailable(f"the kernel library cannot be compiled: {error}") from error
    sources = sources_hash()
    # What computes the numbers: the sources, the compiler and its flags.
    made_by = json.dumps([sources, version, FLAGS, TIER_FLAGS]).encode()
    manifest = {"sources": sources, "build": hashlib.sha256(made_by).hexdigest()[:12]}
    manifest_file(folder).write_text(json.dumps(manifest) + "\n")
    return library_file(folder)


def is_built(folder: Path = COMPILED) -> bool:
    """Whether the library is there, and of the sources that are installed."""
    try:
        built = json.loads(manifest_file(folder).read_text())
    except (OSError, ValueError):
        return False
    return library_file(folder).is_file() and built.get("sources") == sources_hash()


def _run(line: Sequence[str]) -> str:
    """A command's output. Raises OSError or ExtensionUnavailable, which quotes the compiler."""
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExtensionUnavailable(
            f"the kernel library cannot be compiled; {line[0]} reports:\n{done.stderr}"
        )
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qlora_trainer.kernels.build", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--if-possible", action="store_true", help="without a compiler: say so and end well")
    parser.add_argument("--if-missing", action="store_true", help="only where it is not compiled yet")
    options = parser.parse_args(arguments)
    if options.if_missing and is_built():
        return 0
    try:
        print(f"kernel library: {build()}", flush=True)
    except NoCompilerError as error:
        print(error, file=sys.stderr)
        return 0 if options.if_possible else 1
    except ExtensionUnavailable as error:
        print(error, file=sys.stderr)
        return 0 if options.if_possible and not os.access(COMPILED.parent, os.W_OK) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
