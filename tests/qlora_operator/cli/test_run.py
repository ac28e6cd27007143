"""`qlora run` with real launchers; only the ranks are stand-ins."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_operator.cli.cpu_locks import FOLDER_ENV, CpuLocks, lock_file

pytestmark = pytest.mark.process

DRIVER = """
import json, sys
from pathlib import Path
from rich.console import Console
from qlora_operator.cli import run
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.errors import CommandError
rank = [sys.executable, sys.argv[2]]
launcher = f"import os; from qlora_trainer.launch.__main__ import main; os._exit(main({rank!r}))"
try:
    code = run.run(
        QLoRAJob.model_validate(json.loads(sys.argv[1])),
        {"team": Path.cwd()},
        Console(highlight=False),
        verbose="--verbose" in sys.argv,
        launcher=(sys.executable, "-c", launcher),
    )
except CommandError as error:
    print(error, file=sys.stderr)
    code = error.code
sys.exit(code)
"""

RANK = """
import hashlib, http.server, json, os, signal, sys, threading, time
from pathlib import Path
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
run = json.loads(Path(os.environ["QLORA_RUN_CONFIG"]).read_text())
folder = Path(os.environ["QLORA_RUN_CONFIG"]).parent
def end(code, cause):
    report = {"exitCode": code, "reason": "R", "cause": cause, "rank": rank, "step": 7, "checkpointStep": 7}
    Path(os.environ["QLORA_REPORT"]).write_text(json.dumps(report))
    sys.exit(code)
def publish():
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    files = {"adapter_model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    (folder / "adapter/manifest.json").write_text(json.dumps({"files": files}))
    (folder / "training_report.json").write_text(json.dumps({
        "eval_loss": 1.5, "base_eval_loss": 1.9, "base_eval_loss_quantized": 2.0, "steps": 7, "tokens": 7000,
        "seconds": 70.0, "tokens_per_second": 100.0, "world_size": size, "peak_memory_bytes": 2**30}))
def identify():
    from qlora_contract.job_folder import identity_text
    from qlora_contract.run_config import RunConfig
    (folder / "identity.json").write_text(identity_text(RunConfig.model_validate_json(json.dumps(run))))
def serve(**fields):
    report = {"version": 1, "jobUid": run["job"]["uid"], "attempt": run["job"]["attempt"], "stage": "Training",
              "step": 3, "totalSteps": 7, "epoch": 0.5, "updatedTime": "2026-01-01T00:00:00Z", **fields}
    asked = threading.Event()
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(report).encode()); asked.set()
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["QLORA_PROGRESS_PORT"])), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return asked
def ready():
    Path(f"ready-{rank}.tmp").write_text(str(os.getpid())); os.rename(f"ready-{rank}.tmp", f"ready-{rank}")
"""


class Machine:
    """A folder that is the job's volume, and `qlora run`s started in it."""

    def __init__(self, folder: Path, document: Callable[..., dict[str, Any]]) -> None:
        self.folder = folder
        self.job = folder / "work/jobs/small"
        self.document = document
        self.started: list[subprocess.Popen[str]] = []

    def start(
        self, program: str, *options: str, pods: int = 1, stdout: int = subprocess.PIPE, **spec: Any
    ) -> subprocess.Popen[str]:
        """Start a job whose ranks run `program`. `stdout`: a descriptor to print to."""
        (self.folder / "rank.py").write_text(RANK + textwrap.dedent(program))
        document = json.dumps(self.document(topology={"pods": pods}, **spec))
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, document, str(self.folder / "rank.py"), *options],
            cwd=self.folder,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, program: str, *options: str, **more: Any) -> tuple[int, str, str]:
        """Run a job to its end: (exit code, stdout, stderr)."""
        process = self.start(program, *options, **more)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def pids(self, count: int) -> list[int]:
        """Process ids of so many ranks, once each has said that it is ready."""
        paths = [self.folder / f"ready-{rank}" for rank in range(count)]
        wait_for(lambda: all(path.exists() for path in paths))
        return [int(path.read_text()) for path in paths]


def wait_for(happened: Callable[[], Any]) -> None:
    """Return once it happened; the test's own time-out ends a wait in vain."""
    while not happened():
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def machine(tmp_path: Path, job_document: Callable[..., dict[str, Any]]) -> Iterator[Machine]:
    """A machine of the test's own; launchers and ranks die with what was started on it."""
    made = Machine(tmp_path, job_document)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def test_a_job_is_trained_and_its_result_told(machine: Machine) -> None:
    """Progress, where the adapter is, what it improved; and the exit code is 0."""
    code, out, err = machine.run(
        """
        if rank == 0:
            serve(loss=1.83, tokensPerSecond=412.4, etaSeconds=75.0, data="training: 9 records").wait()
            publish()
        """,
        pods=2,
        suspend=True,
        backoffLimit=1,
        training={"epochs": 1, "maxSteps": None},
    )

    assert (code, err) == (0, "")
    assert "spec.suspend, spec.backoffLimit" in out
    assert out.count("7 step(s) are too few to learn much; `qlora plan` says what makes more of them\n") == 1
    assert out.count("training: 9 records\n") == 1
    assert re.search(r"^\S+Z small: Importing  elapsed 0s$", out, re.MULTILINE)
    assert re.search(
        r"^\S+Z small: Training  step 3/7  loss 1.8300  412 tok/s  ETA 1m 15s  elapsed \d+s$", out, re.M
    )
    assert f"adapter    {machine.job}/adapter\n" in out
    assert (
        "eval loss  1.5000, base model 1.9000 unquantized and 2.0000 quantized: 25.0 % below the quantized base\n"
        in out
    )


def test_a_job_that_is_done_is_not_trained_again(machine: Machine) -> None:
    """Without starting a rank, the result is told."""
    machine.run("identify()\npublish()")
    code, out, _ = machine.run("end(1, 'was started')")

    assert code == 0
    assert "small is already finished" in out
    assert "eval loss  1.5000" in out


EXPORTS = """
if run.get("stage", "train") == "train":
    if rank == 0:
        publish()
    end(0, "trained")
print("exports with", size)
for form in ("merged", "gguf-q8_0"):
    made = folder / "exports" / form
    made.mkdir(parents=True)
    (made / "model").write_bytes(b"weights")
    files = {"model": hashlib.sha256(b"weights").hexdigest()}
    (made / "manifest.json").write_text(json.dumps({"files": files, "adapter_sha256": "None"}))
    (made / "export_report.json").write_text("{}")
end(0, "exported")
"""


def test_other_formats_are_made_after_training_by_one_rank(machine: Machine) -> None:
    """As on a cluster; a job that has them is finished."""
    output = {"formats": ["merged", "gguf"]}

    code, out, err = machine.run(
        f"if rank == 0:\n    identify()\n{EXPORTS}", "--verbose", pods=2, output=output
    )
    again, second, _ = machine.run("sys.exit(1)", output=output, pods=2)

    assert (code, again, err) == (0, 0, "")
    assert out.count("exports with 1") == 1
    assert f"exported   {machine.job / 'exports' / 'merged'}" in out
    assert "is already finished" in second


HELD = """
from qlora_operator.cli.cpu_locks import in_use_now
busy, promised = in_use_now(range(os.cpu_count()))
print("CPUs held:", len(busy), "by", *promised)
"""


def test_what_only_exports_holds_the_cpus_of_one_rank(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are left to other jobs: nothing trains."""
    monkeypatch.setenv(FOLDER_ENV, str(machine.folder))

    code, trained, err = machine.run(
        f"if rank == 0:\n    identify()\n    publish()\n{HELD}", "--verbose", pods=2
    )
    again, exported, _ = machine.run(
        HELD + EXPORTS, "--verbose", pods=2, output={"formats": ["merged", "gguf"]}
    )

    assert (code, again, err) == (0, 0, "")
    assert "CPUs held: 2 by job small (process " in trained
    assert "CPUs held: 1 by job small (process " in exported


def test_memory_that_another_job_may_take_is_not_promised_twice(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two jobs that are started at once the second is refused: the first has not taken its memory yet."""
    monkeypatch.setenv(FOLDER_ENV, str(machine.folder))
    locks = CpuLocks(lock_file())
    locks.promise_memory(1 << 50, "job other (process 4194305)")
    try:
        code, _, err = machine.run("end(1, 'was started')")
    finally:
        locks.close()

    assert code == 10
    assert (
        "0 bytes of this machine's memory are free; job other (process 4194305) may take 1024 TiB more" in err
    )


def test_a_folder_of_another_job_is_refused(machine: Machine) -> None:
    """Nothing is started over another spec's results."""
    machine.job.mkdir(parents=True)
    (machine.job / "identity.json").write_text('{"hash": "0", "fields": {"training": {"seed": 5}}}')
    code, _, err = machine.run("end(1, 'was started')")

    assert code == 10
    assert "holds the results of another spec" in err


def test_the_cause_is_one_sentence(machine: Machine) -> None:
    """A rank's own sentence, the code it stands for, and where the log is."""
    code, _, err = machine.run(
        "end(11, 'data.jsonl: line 3: is not JSON') if rank else end(40, 'rank 1 left')", pods=2
    )

    assert code == 11
    assert err == (
        "invalid data: data.jsonl: line 3: is not JSON\n"
        f"Full log: {machine.job}/logs/attempt-0/launcher-1.log\n"
    )


def test_a_terminal_shows_what_is_done_and_keeps_what_was(machine: Machine) -> None:
    """One picture that is drawn over and over, with the time so far; the step and the result stay, the picture goes."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = machine.start(
        """
        serve(loss=1.83, learningRate=2e-4, tokensPerSecond=412.4, etaSeconds=75.0).wait()
        time.sleep(0.5)
        publish()
        """,
        stdout=theirs,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that all has been read
        while data := os.read(ours, 65536):
            shown += data
    os.close(ours)
    lines = [
        line.strip()
        for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", shown.decode()).splitlines()
        if line.strip()
    ]

    assert process.wait(120) == 0
    assert "small" in lines
    assert {"Importing", "Training", "step 3/7"} <= set(lines)
    assert any(
        re.fullmatch(r"\d+s  Training  step 3/7  loss 1.8300  lr 2.00e-04  412 tok/s  ETA 1m 15s", line)
        for line in lines
    )
    assert any(line.endswith("elapsed 0s") for line in lines)
    assert lines[-1].startswith("memory")


def test_a_failure_that_may_pass_says_how_to_go_on(machine: Machine) -> None:
    """What is not permanent can be resumed by the same command, as another attempt."""
    _, _, err = machine.run("end(31, 'no step for 1800 s')")
    assert "stalled: no step for 1800 s" in err
    assert "Run the same command again to continue from the last checkpoint." in err

    _, _, err = machine.run("end(31, 'again')")
    assert "/logs/attempt-1/" in err
    attempts = json.loads((machine.job / "run.json").read_text())["job"]["attempt"]
    assert attempts == 1


def test_verbose_passes_the_ranks_output_on(machine: Machine) -> None:
    """Every line of every rank appears, with its prefix, and without what a terminal would obey."""
    _, out, _ = machine.run(
        "print(f'hello from {rank} \\x1b[2J')\nif rank == 0: publish()", "--verbose", pods=2
    )

    assert {line.partition(" ")[2] for line in out.splitlines() if "hello" in line} == {
        "[rank 0] hello from 0 \N{REPLACEMENT CHARACTER}[2J",
        "[rank 1] hello from 1 \N{REPLACEMENT CHARACTER}[2J",
    }


STOPPABLE = """
signal.signal(signal.SIGTERM, lambda *_: end(50, "asked to stop; a checkpoint holds all up to step 7"))
signal.signal(signal.SIGINT, lambda *_: end(1, "the terminal's signal came through"))
ready()
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("number", "expected"),
    [pytest.param(signal.SIGINT, 130, id="Ctrl-C"), pytest.param(signal.SIGTERM, 143, id="SIGTERM")],
)
def test_a_stopped_job_saves_and_says_how_to_go_on(machine: Machine, number: int, expected: int) -> None:
    """Every rank is asked once and leaves after a checkpoint."""
    process = machine.start(STOPPABLE, pods=2)
    pids = machine.pids(2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (expected, "")
    assert "stopping after a checkpoint ..." in out
    assert re.search("a checkpoint holds all up to step 7; run the same command again to continue", out)
    assert all(gone(pid) for pid in pids)


def test_a_second_ctrl_c_ends_at_once(machine: Machine) -> None:
    """Ranks that take their time are killed."""
    process = machine.start("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready()\ntime.sleep(600)")
    pids = machine.pids(1)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    wait_for(lambda: "stopping" in str(process.stdout and process.stdout.readline()))
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "stopped immediately; run the same command again" in out
    wait_for(lambda: all(gone(pid) for pid in pids))


def test_a_failure_while_stopping_is_not_hidden(machine: Machine) -> None:
    """When the checkpoint cannot be written, that is what the user hears."""
    process = machine.start(
        "signal.signal(15, lambda *_: end(14, 'no space left'))\nready()\ntime.sleep(600)"
    )
    machine.pids(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 14
    assert "storage full: no space left" in err


def test_one_job_is_run_once_at_a_time(machine: Machine) -> None:
    """A second `qlora run` of the same job is refused and disturbs nothing."""
    process = machine.start(STOPPABLE)
    machine.pids(1)
    second = machine.start("end(1, 'was started')")
    _, err = second.communicate(timeout=60)

    assert second.returncode == 1
    assert f"is in use by `qlora run` (process {process.pid})" in err
    assert process.poll() is None


def test_nobody_outlives_a_killed_run(machine: Machine) -> None:
    """When `qlora run` itself is killed, its ranks save and end, and keep the job locked until then."""
    process = machine.start(STOPPABLE)
    pids = machine.pids(1)
    process.kill()
    wait_for(lambda: all(gone(pid) for pid in pids))

    report = machine.job / "termination-0.json"
    wait_for(lambda: report.exists() and report.read_text())
    assert json.loads(report.read_text())["exitCode"] == 50


def test_a_killed_launcher_ends_the_job(machine: Machine) -> None:
    """Its ranks die with it, and the other launcher's ranks tell of a lost peer; the signal is the cause."""
    process = machine.start(
        """
        ready()
        time.sleep(600) if rank else None
        while os.path.exists(f"/proc/{int(Path('ready-1').read_text())}/cwd") if Path("ready-1").exists() else True:
            time.sleep(0.05)
        end(40, "rank 1 is gone")
        """,
        pods=2,
    )
    pids = machine.pids(2)
    launcher = int(re.search(r"PPid:\t(\d+)", Path(f"/proc/{pids[1]}/status").read_text())[1])  # type: ignore[index]
    os.kill(launcher, signal.SIGKILL)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 137
    assert "launcher 1 was killed by SIGKILL" in err


def test_too_few_cpus_start_nothing(machine: Machine) -> None:
    """Under strict pinning the machine must have what the job asks for."""
    document = machine.document
    machine.document = lambda **spec: document(
        **{**spec, "topology": {"pinning": "strict", "cpusPerRank": 1000, **spec["topology"]}}
    )
    code, _, err = machine.run("end(1, 'was started')")

    assert code == 10
    assert "need 1000 CPUs, " in err
    assert not machine.job.exists()


def test_two_jobs_never_take_the_same_cpus(machine: Machine) -> None:
    """A second job is refused while another has all CPUs, told who that is, and runs as soon as it is gone."""
    document, every = machine.document, len(os.sched_getaffinity(0))
    machine.document = lambda **spec: document(
        **{**spec, "topology": {"cpusPerRank": every, "pinning": "strict", **spec["topology"]}}
    )
    process = machine.start(STOPPABLE)
    machine.pids(1)
    of_first = machine.document
    machine.document = lambda **spec: {**of_first(**spec), "metadata": {"name": "other"}}
    code, _, err = machine.run("publish()")

    assert code == 10
    assert f"are in use by job small (process {process.pid})" in err
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert machine.run("publish()")[0] == 0


def test_memory_that_is_not_there_starts_nothing(machine: Machine) -> None:
    """What `qlora plan` calls a problem, `qlora run` refuses."""
    document = machine.document
    machine.document = lambda **spec: document(
        **{**spec, "topology": {"memoryPerRank": "64Ti", **spec["topology"]}}
    )
    code, _, err = machine.run("end(1, 'was started')")

    assert code == 10
    assert "memoryPerRank 64Ti may use" in err
    assert not machine.job.exists()


def test_a_job_keeps_to_the_cpus_of_taskset(machine: Machine) -> None:
    """Where `qlora run` is bound to some CPUs, its ranks get those and no others."""
    document = machine.document
    machine.document = lambda **spec: {
        **document(**spec),
        "spec": {**document(**spec)["spec"], "topology": {"memoryPerRank": "1Gi"}},
    }
    last = max(os.sched_getaffinity(0))
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {last})  # inherited, as from taskset
    try:
        process = machine.start("print(f'on {sorted(os.sched_getaffinity(0))}')\npublish()", "--verbose")
    finally:
        os.sched_setaffinity(0, mine)
    out, _ = process.communicate(timeout=60)

    assert f"on [{last}]" in out
