"""Questions to a job's model, and its answers: the asking side of qlora_contract.chat.

The model is in a process of its own: one of this machine (`local_model`), or in a pod.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from qlora_contract import entry_points
from qlora_contract.base import ContractModel
from qlora_contract.chat import Answer, ChatEvent, ChatReady, ChatRequest, OpenRequest
from qlora_contract.plan import PlanError
from qlora_contract.run_config import RunConfig
from qlora_contract.scratch import scratch_folder
from qlora_operator.cli.outcome import error_message
from qlora_operator.cli.processes import OFFLINE, ProcessError, environment
from qlora_operator.errors import CommandError

ASSISTANT = (sys.executable, "-m", entry_points.CHAT)
STOP_SECONDS = 10.0
"""For a process whose input has ended, before it is killed."""

OnText = Callable[[int, str], None]
"""Takes (index of the question, the next characters of its answer)."""


class Exchange:
    """A conversation with the process that has the model.

    Whoever uses it sees to it that the process ends: after a KeyboardInterrupt a request may be half answered.
    """

    def __init__(
        self, send: Callable[[str], None], lines: Iterator[str], why_gone: Callable[[], str]
    ) -> None:
        """Prepare an exchange.

        Args:
            send: writes a line to the process's input; raises OSError when it is gone.
            lines: of its output; they end with it.
            why_gone: what is known of its end, in words.
        """
        self._send, self._lines, self._why_gone = send, lines, why_gone

    def open(self, *, base_only: bool) -> ChatReady:
        """Have the model loaded.

        Raises:
            CommandError: it cannot be, with the exit code that training would have.
        """
        self._tell(OpenRequest(base_only=base_only))
        event = self._next()
        if event.ready is None:
            raise _refusal(event.error)
        return event.ready

    def ask(self, request: ChatRequest, on_text: OnText = lambda _number, _text: None) -> list[Answer]:
        """Ask, and wait for the answers.

        Raises:
            RefusedError: the questions cannot be asked; others can.
            CommandError: the process is gone.
        """
        self._tell(request)
        while True:
            event = self._next()
            if event.piece is not None:
                on_text(event.piece.question, event.piece.text)
            elif event.answers is not None:
                return event.answers
            else:
                raise _refusal(event.error)

    def _tell(self, message: ContractModel) -> None:
        try:
            self._send(message.model_dump_json(by_alias=True, exclude_none=True) + "\n")
        except OSError as error:
            raise CommandError(self._why_gone()) from error

    def _next(self) -> ChatEvent:
        for line in self._lines:
            try:
                return ChatEvent.model_validate_json(line)
            except ValidationError:
                continue  # of a shell or a runtime around the program
        raise CommandError(self._why_gone())


class RefusedError(CommandError):
    """A request was not answered; another one may be."""


def _refusal(error: PlanError | None) -> RefusedError:
    if error is None:
        return RefusedError("the trainer gave an answer that this release does not understand")
    return RefusedError(error_message(error.code, error.cause), error.code)


@contextmanager
def local_model(
    run: RunConfig, volumes: Mapping[str, Path], command: Sequence[str] = ASSISTANT
) -> Iterator[Exchange]:
    """An exchange with a process of this machine, which ends with the block.

    Args:
        run: the job.
        volumes: claim -> directory.
        command: the process's command line, but for run.json.

    Raises:
        ProcessError: it could not be started.
    """
    with scratch_folder("chat") as folder:
        path, log = folder / "run.json", folder / "log"
        path.write_text(run.to_json())
        try:
            with log.open("wb") as output:
                # In a session of its own, so that the terminal sends Ctrl-C to us alone.
                process = subprocess.Popen(
                    [*command, str(path)],
                    env=environment(volumes) | OFFLINE,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    text=True,
                    encoding="utf-8",
                    start_new_session=True,
                )
        except OSError as error:
            raise ProcessError(f"{command[0]} could not be started: {error.strerror}") from error
        assert process.stdin is not None
        assert process.stdout is not None
        stdin = process.stdin

        def send(line: str) -> None:
            stdin.write(line)
            stdin.flush()

        def why_gone() -> str:
            code = process.wait()
            said = log.read_text(errors="replace").strip().splitlines()
            return f"the trainer's process ended with code {code}: {said[-1] if said else 'it wrote nothing'}"

        try:
            yield Exchange(send, iter(process.stdout), why_gone)
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process that ends with its input, and does so slowly while it loads or answers."""
    try:
        if process.stdin is not None:
            process.stdin.close()
    except OSError:
        pass
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def local_run(job: str, find: Callable[[], RunConfig]) -> RunConfig:
    """The RunConfig of a job folder, or of what `find` reads from a job file.

    Raises:
        CommandError: the folder is no job's.
    """
    folder = Path(job)
    if not folder.is_dir():
        return find()
    path = folder / "run.json"
    try:
        return RunConfig.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise CommandError(
            f"{folder} has no run.json, which `qlora run` leaves there: give the job's file instead", 2
        ) from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be read; give the job's file instead", 2) from error


def workspace_root(folder: Path, run: RunConfig) -> tuple[str, Path] | None:
    """The claim of a job's workspace and the directory that stands for it, by the place of the job's folder.

    None: the folder is not where the workspace would have it.
    """
    claim, _, rest = run.workspace.removeprefix("pvc://").partition("/")
    within = [part for part in f"{rest}/jobs/{run.job.name}".split("/") if part]
    absolute = Path(os.path.abspath(folder))  # noqa: PTH100 - symbolic links are kept, as for --volume
    if list(absolute.parts[-len(within) :]) != within:
        return None
    return claim, Path(*absolute.parts[: -len(within)])
