"""Questions to the trainer, which alone can read models and data. It answers from a process of its own."""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from qlora_contract import entry_points
from qlora_contract.plan import PlanResponse
from qlora_contract.units import format_duration
from qlora_operator.cli.processes import OFFLINE, ProcessError, environment

PLANNER = (sys.executable, "-m", entry_points.PLAN)
SILENT_SECONDS = 15.0
"""After which, again and again, it is said that an answer is still awaited: large data take minutes."""
COMPILING_SECONDS = 3.0
"""Longer than it takes to see that nothing is to be compiled."""
KERNELS = (sys.executable, "-m", entry_points.KERNELS)
TRAINER_PACKAGES = (
    "boto3",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "numpy",
    "safetensors",
    "torch",
    "transformers",
)
"""What the extra `trainer` installs and a job needs; looked for, never imported here."""


def require_trainer() -> None:
    """Raise ProcessError, saying what to install, unless all of the trainer's packages are installed."""
    missing = [name for name in TRAINER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ProcessError(
            f"the trainer's packages are not installed (missing: {', '.join(missing)}); "
            "run pip install 'qlora-operator[trainer]'"
        )


def compile_kernels(tell: Callable[[str], None], command: Sequence[str] = KERNELS) -> None:
    """See to it that the kernel library is compiled, once for an installation, where there is a compiler.

    Args:
        tell: takes what there is to say: that it takes a while, where it was put, or why plain torch will do its work.
            Mostly nothing.
        command: the compiling program's command line.
    """
    with subprocess.Popen(
        [*command, "--if-missing", "--if-possible"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            process.wait(COMPILING_SECONDS)
        except subprocess.TimeoutExpired:
            tell("compiling the kernels, once for this installation: a minute or two")
        said, _ = process.communicate()
    if said.strip():
        tell(said.strip())


def query_trainer(
    *arguments: str,
    volumes: Mapping[str, Path] | None = None,
    command: Sequence[str] = PLANNER,
    offline: bool = True,
) -> PlanResponse:
    """What `python -m qlora_trainer.plan ARGUMENT...` answers.

    Args:
        arguments: see qlora_trainer.plan; none: what this machine has.
        volumes: claim -> directory.
        command: the planner's command line.
        offline: whether no library may ask the network.

    Raises:
        ProcessError: it could not be started, or did not answer.
    """
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            [*command, *arguments],
            env=environment(volumes or {}) | (OFFLINE if offline else {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise ProcessError(f"{command[0]} could not be started: {error.strerror}") from error
    with process:
        try:
            while True:
                try:
                    stdout, stderr = process.communicate(timeout=SILENT_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    so_far = format_duration(time.monotonic() - began)
                    print(
                        f"still reading the model and the data, for {so_far} so far",
                        file=sys.stderr,
                        flush=True,
                    )
        except BaseException:
            process.kill()
            raise
    lines = stdout.strip().split("\n")  # not splitlines: texts of the data may hold other ends of lines
    try:
        return PlanResponse.model_validate_json(lines[-1])
    except ValidationError:
        errors = stderr.strip().splitlines() or ["it wrote nothing to stderr"]
        raise ProcessError(
            f"`{' '.join(command[1:])}` exited with code {process.returncode} without an answer: {errors[-1]}"
        ) from None
