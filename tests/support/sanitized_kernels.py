"""The kernel library's tests with the library compiled under a sanitizer of the compiler (g++).

    python tests/support/sanitized_kernels.py {address,undefined | thread} [PYTEST ARGUMENT ...]

Compiles it anew (minutes), then runs the tests in a process that has the sanitizer's library loaded first. As a plugin
of pytest, which that process loads it as, it makes the loader find that library.
"""

import os
import subprocess
import sys
from pathlib import Path

from qlora_trainer.kernels import build

FOLDER_ENV = "QLORA_TEST_KERNELS"
REPOSITORY = Path(__file__).parents[2]
RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
TESTS = [
    "tests/qlora_trainer/kernels/csrc",
    "tests/qlora_trainer/quantization/kernels",
    "tests/qlora_trainer/modeling/test_layers.py",
    "tests/qlora_trainer/modeling/test_attention.py",
    "tests/qlora_trainer/modeling/test_loss.py",
    "tests/qlora_trainer/modeling/test_lora_linear.py",
]
OPTIONS = {
    # Python and torch keep what they allocate; a fork of threads is what some tests are about.
    "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "die_after_fork=0:suppressions={folder}/suppressions:log_path={folder}/report",
}
SUPPRESSIONS = "race:libtorch\nrace:libgomp\nrace:libc10\nrace:ld-linux\n"
"""torch's own threads are not seen to wait for each other: OpenMP is not compiled with the sanitizer. Nor is glibc."""

if FOLDER_ENV in os.environ:
    build.COMPILED = Path(os.environ[FOLDER_ENV])


def compile_library(kinds: str, folder: Path) -> None:
    """Compile the library with -fsanitize=kinds; -O1, since -O3 takes eight minutes."""
    build.FLAGS = (
        *("-O1" if flag == "-O3" else flag for flag in build.FLAGS),
        *("-g1", "-fno-omit-frame-pointer", f"-fsanitize={kinds}", "-fno-sanitize-recover=all"),
    )
    commands = build.commands
    # The linker wants the sanitizer named, too.
    build.commands = lambda *given: [[line[0], f"-fsanitize={kinds}", *line[1:]] for line in commands(*given)]
    build.build(folder)
    (folder / "suppressions").write_text(SUPPRESSIONS)


def main() -> int:
    """Compile and test. Returns pytest's exit code."""
    kinds, arguments = sys.argv[1], sys.argv[2:]
    folder = REPOSITORY / ".cache" / "sanitized" / kinds
    compile_library(kinds, folder)
    files = [RUNTIMES[kind] for kind in kinds.split(",")]
    runtimes = [
        subprocess.check_output(["g++", f"-print-file-name={file}"], text=True).strip() for file in files
    ]
    options = {name: value.format(folder=folder) for name, value in OPTIONS.items()}
    environ = {**options, **os.environ, FOLDER_ENV: str(folder), "LD_PRELOAD": " ".join(runtimes)}
    environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "sanitized_kernels", "-n", "0", "-q", *TESTS, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
