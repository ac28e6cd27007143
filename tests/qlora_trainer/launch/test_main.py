"""The launcher, run for real with small programs in the place of the ranks."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_contract.env import (
    COMPLETION_INDEX_ENV,
    CPUS_ENV,
    PARENT_DEATH_ENV,
    RUN_CONFIG_ENV,
    TERMINATION_LOG_ENV,
)
from qlora_contract.exit_codes import ExitCode
from qlora_contract.progress import TerminationReport
from qlora_contract.run_config import RunConfig
from qlora_contract.supervision import Limits
from qlora_trainer.errors import TrainerError
from qlora_trainer.host.isa import Isa
from qlora_trainer.launch import supervisor
from qlora_trainer.launch.__main__ import IsaBelowTier, check_isa, launch
from qlora_trainer.launch.cpu_layout import CpuAssignment
from qlora_trainer.launch.environment import rank_environment
from qlora_trainer.launch.exit_report import rank_exit, summarize

pytestmark = pytest.mark.process

STAMP = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")
SAY = textwrap.dedent("""
    import os, signal, sys, time
    from qlora_contract.progress import TerminationReport
    from qlora_trainer.telemetry.termination import write_rank_report
    local = int(os.environ["LOCAL_RANK"])

    def report(code, cause, **more):
        write_rank_report(TerminationReport(exit_code=code, reason="X", cause=cause, rank=local, **more))

    def ready(name="ready"):
        open(f"{name}-{local}", "w").write(str(os.getpid()))
""")
"""What the fake ranks share; they run in the test's folder."""


class Machine:
    """A folder with run.json, a rank program, and launchers started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []
        self.within: list[str] = []
        """What a launcher's command line begins with."""

    def start(self, program: str, run: RunConfig | str, **environ: str) -> subprocess.Popen[bytes]:
        """Start a launcher whose ranks run `program`."""
        text = run if isinstance(run, str) else run.to_json()
        (self.folder / "run.json").write_text(text)
        (self.folder / "rank.py").write_text(SAY + textwrap.dedent(program))
        command = f"[{sys.executable!r}, 'rank.py']"
        process = subprocess.Popen(
            [
                *self.within,
                sys.executable,
                "-c",
                f"import os; from qlora_trainer.launch.__main__ import main; os._exit(main({command}))",
            ],
            cwd=self.folder,
            env=os.environ
            | {RUN_CONFIG_ENV: "run.json", TERMINATION_LOG_ENV: "termination-log", "TMPDIR": str(self.folder)}
            | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.started.append(process)
        return process

    def run(self, program: str, run: RunConfig | str, **environ: str) -> tuple[int, bytes, bytes]:
        """Launch and wait: (exit code, stdout, stderr)."""
        process = self.start(program, run, **environ)
        out, err = process.communicate(timeout=60)
        return process.returncode, unstamped(out), unstamped(err)

    def report(self) -> TerminationReport:
        """The termination message."""
        return TerminationReport.model_validate_json((self.folder / "termination-log").read_bytes())

    def pids(self, count: int, name: str = "ready") -> list[int]:
        """Process ids of `count` ranks, once each has said that it is ready."""
        paths = [self.folder / f"{name}-{local}" for local in range(count)]
        wait_for(lambda: all(path.exists() and path.read_text() for path in paths))
        return [int(path.read_text()) for path in paths]


def unstamped(output: bytes) -> bytes:
    """Output without the time that each line must begin with."""
    lines = output.splitlines(keepends=True)
    assert all(STAMP.match(line) for line in lines), output
    return b"".join(STAMP.sub(b"", line) for line in lines)


def wait_for(happened: Callable[[], bool]) -> None:
    """Return once it happened; the test's own time-out ends a wait in vain."""
    while not happened():
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A Machine that leaves nothing running."""
    made = Machine(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


# --- before the ranks


@pytest.mark.parametrize(
    ("isa", "flags", "lacks"),
    [
        pytest.param("avx2", {"avx2", "fma"}, None, id="met"),
        pytest.param("avx512", {"avx2", "fma", "avx512f", "avx512dq"}, "avx512bw, avx512vl", id="flags"),
        pytest.param("amx_bf16", {"amx_tile", "amx_bf16"}, "the kernel's permission", id="permission"),
    ],
)
def test_a_processor_below_the_tier(
    a_run: Callable[..., RunConfig], isa: str, flags: set[str], lacks: str | None
) -> None:
    """A node below the attempt's tier is named with what it lacks, with the code for elsewhere."""
    found = Isa(frozenset(flags), amx_permitted=False)
    if lacks is None:
        check_isa(a_run(isa=isa), found)
        return
    with pytest.raises(IsaBelowTier, match=f"below ISA tier {isa}: it lacks {lacks}") as caught:
        check_isa(a_run(isa=isa), found)

    assert caught.value.exit_code == ExitCode.ISA_BELOW_TIER


def test_too_few_cpus_end_the_launch(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """Under strict pinning nothing is started, and the message says what to change."""
    layout = {"pinning": "strict", "cpusPerRank": 1024}
    code, _, err = machine.run("ready()", a_run(layout=layout))

    assert code == ExitCode.INVALID_CONFIGURATION
    assert "need 2048 CPUs, but only" in machine.report().cause
    assert machine.report().cause.encode() in err
    assert not (machine.folder / "ready-0").exists()


def test_another_version_ends_the_launch_without_torch(machine: Machine) -> None:
    """The refusal reaches the termination message, and torch is never imported for it."""
    # A module of this name in the working folder would be found first, and would end the launcher.
    (machine.folder / "torch.py").write_text("raise SystemExit(99)")
    code, _, _ = machine.run("", '{"version": 7, "whatever": []}')

    assert code == ExitCode.INVALID_CONFIGURATION
    assert "version 7 and this trainer reads versions 1 and 2" in machine.report().cause
    assert machine.report().reason == "INVALID_CONFIGURATION"


def test_what_nobody_foresaw_reaches_the_termination_message(
    a_run: Callable[..., RunConfig], machine: Machine
) -> None:
    """Descriptors run out here. Who waits for the pod reads no log."""
    machine.within = ["sh", "-c", 'ulimit -n 8; exec "$0" "$@"']
    code, _, _ = machine.run("ready()", a_run())

    assert code == ExitCode.UNEXPECTED == machine.report().exit_code
    assert "Too many open files" in machine.report().cause


# --- with ranks


def test_standard_descriptors_may_be_closed(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """Nothing else gets their numbers, and a rank's report arrives."""
    machine.within = ["sh", "-c", 'exec "$0" "$@" 0<&- 1>&- 2>&-']
    code, _, _ = machine.run("os.write(2, b'lost'); report(0, 'done')", a_run())

    assert (code, machine.report().cause) == (0, "done")


def test_an_environment_may_be_large(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """As Kubernetes makes it in a namespace of many services, and the request to the fork server for many ranks."""
    program = "report(0, os.environ['LARGE'][-3:]) if local == 0 else None"
    code, _, _ = machine.run(program, a_run(), LARGE="x" * 100_000 + "end")

    assert (code, machine.report().cause) == (0, "end")


def test_nohup_is_heeded(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """The end of the terminal does not stop a launcher that was started to outlive it."""
    machine.within = ["nohup"]
    process = machine.start(OBEDIENT, a_run())
    machine.pids(2)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    asked = (machine.folder / "asked-0").exists()
    process.terminate()
    process.communicate(timeout=60)

    assert (asked, process.returncode) == (False, ExitCode.TERMINATED)


def test_a_launcher_that_is_killed_leaves_nothing_for_long(
    a_run: Callable[..., RunConfig], machine: Machine
) -> None:
    """The next one removes its folder, and none of a launcher that runs."""

    def folders() -> set[Path]:
        return set(machine.folder.glob("qlora-scratch-launch-*"))

    living = machine.start(OBEDIENT, a_run())
    machine.pids(2)
    theirs = folders()
    killed = machine.start(OBEDIENT.replace("ready()", "ready('again')"), a_run())
    machine.pids(2, "again")
    killed.kill()
    killed.communicate()
    left = folders()
    machine.run("report(0, 'done')", a_run())
    kept = folders()
    living.terminate()
    living.communicate(timeout=60)

    assert (len(theirs), len(left), kept, folders()) == (1, 2, theirs, set())


def test_output_is_passed_on_line_by_line(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """Lines carry their rank, go to the stream they came from, and keep bytes that are not UTF-8."""
    program = r"""
        os.write(1, b"hello\nbad \xff byte\n")
        os.write(2, b"trouble\n")
        os.write(1, b"no newline at the end")
    """
    code, out, err = machine.run(program, a_run())
    lines = out.splitlines()

    assert code == 0
    for rank in (b"[rank 0] ", b"[rank 1] "):
        own = [line for line in lines if line.startswith(rank)]
        assert own == [rank + b"hello", rank + b"bad \xff byte", rank + b"no newline at the end"]
        assert rank + b"trouble" in err.splitlines()
    assert len(lines) == 6


def test_an_endless_line_does_not_fill_the_memory(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """A line beyond the limit is passed on in parts, all of it."""
    code, out, _ = machine.run("os.write(1, b'x' * 200_000)", a_run(ranks=1))

    assert code == 0
    assert len(out.splitlines()) == 4
    assert out.count(b"x") == 200_000


def test_a_rank_gets_its_cpus_before_it_starts(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """The affinity of a rank is its slice, and its threads are as many."""
    first = sorted(os.sched_getaffinity(0))[0]
    program = "print(sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'], os.environ['RANK'])"
    code, out, _ = machine.run(program, a_run(ranks=1), **{CPUS_ENV: str(first)})

    assert code == 0
    assert out == f"[rank 0] [{first}] 1 0\n".encode()


def test_done_when_every_rank_is(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """With all ranks done the pod's message is the first rank's report."""
    program = "report(0, 'adapter published', eval_loss=1.25) if local == 0 else None"
    code, _, err = machine.run(program, a_run())

    assert code == 0
    assert (machine.report().cause, machine.report().eval_loss) == ("adapter published", 1.25)
    assert err.splitlines()[-1] == b"launcher: exits with code 0 (DONE): adapter published"


def test_the_cause_wins_over_its_consequences(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """A rank that lost its peer ends first; the pod still tells what the peer died of."""
    program = """
        if local == 0:
            report(40, "lost rank 1")
            sys.exit(40)
        time.sleep(0.3)
        report(11, "record 3 has no messages")
        sys.exit(11)
    """
    code, _, _ = machine.run(program, a_run())

    assert code == ExitCode.INVALID_DATA
    assert (machine.report().cause, machine.report().rank) == ("record 3 has no messages", 1)


def test_of_equal_causes_the_first_in_time_wins(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """When ranks die one after the other with codes of one kind, the first one is the cause."""
    program = """
        ready()
        if local == 0:
            while os.path.exists(f"/proc/{open('ready-1').read()}") if os.path.exists("ready-1") else True:
                time.sleep(0.02)
        report((30, 1)[local], ("rank 1 is gone", "the port is taken")[local])
        sys.exit((30, 1)[local])
    """
    code, _, _ = machine.run(program, a_run())

    assert (code, machine.report().cause) == (ExitCode.UNEXPECTED, "the port is taken")


def test_an_unexpected_exception_is_named(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """Without a report the last line of stderr is the cause."""
    code, _, _ = machine.run("raise KeyError('lm_head')", a_run(ranks=1))

    assert code == ExitCode.UNEXPECTED
    assert machine.report().cause == "rank 0 exited with code 1: KeyError: 'lm_head'"


def test_a_rank_that_is_killed_gives_137(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """SIGKILL from outside is told as such, with the rank."""
    code, _, _ = machine.run("os.kill(os.getpid(), signal.SIGKILL) if local else sys.exit(40)", a_run())

    assert code == 137
    assert (machine.report().reason, machine.report().rank) == ("Signal", 1)


def test_a_rank_that_cannot_be_started_is_reported(a_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A missing program ends the launch with the system's reason."""
    (tmp_path / "run.json").write_text(a_run().to_json())
    with pytest.raises(TrainerError, match=r"could not be started: .*No such file"):
        launch(["/nowhere/python"], {RUN_CONFIG_ENV: str(tmp_path / "run.json")}, supervisor.Stop())


OBEDIENT = """
    def obey(*_):
        with open(f"asked-{local}", "a") as f:
            f.write("x")
        time.sleep(0.4)
        report(50, "saved step 5")
        os._exit(50)
    signal.signal(signal.SIGTERM, obey)
    signal.signal(signal.SIGINT, obey)
    ready()
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_sigterm_is_passed_on_once(
    a_run: Callable[..., RunConfig], machine: Machine, number: signal.Signals
) -> None:
    """Every rank is told once, however often the launcher is, and the pod ends as they do."""
    process = machine.start(OBEDIENT, a_run())
    machine.pids(2)
    process.send_signal(number)
    markers = [machine.folder / f"asked-{local}" for local in range(2)]
    wait_for(lambda: all(path.exists() for path in markers))
    process.send_signal(number)
    process.communicate(timeout=60)

    assert process.returncode == ExitCode.TERMINATED
    assert [path.read_text() for path in markers] == ["x", "x"]
    assert machine.report().cause == "saved step 5"


@pytest.mark.parametrize("how", ["signal.signal(signal.SIGTERM, signal.SIG_IGN)", "stop_me()"])
def test_the_grace_period_is_enforced(a_run: Callable[..., RunConfig], machine: Machine, how: str) -> None:
    """Ranks that ignore SIGTERM, or are stopped, are killed when the grace period is nearly over."""
    program = f"""
        def stop_me():
            ready()
            os.kill(os.getpid(), signal.SIGSTOP)
        {how}
        ready()
        time.sleep(600)
    """
    process = machine.start(program, a_run(terminationGracePeriodSeconds=1))
    pids = machine.pids(2)
    process.terminate()
    process.communicate(timeout=60)

    assert process.returncode == 137
    assert "terminationGracePeriodSeconds: 1" in machine.report().cause
    assert not any(is_alive(pid) for pid in pids)


def test_ranks_die_with_their_launcher(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """Even when the launcher is killed outright, no rank goes on."""
    process = machine.start(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(600)", a_run()
    )
    pids = machine.pids(2)
    assert all(is_alive(pid) for pid in pids)
    process.kill()

    wait_for(lambda: not any(is_alive(pid) for pid in pids))


def test_a_launcher_stops_when_the_one_who_started_it_dies(
    a_run: Callable[..., RunConfig], machine: Machine
) -> None:
    """With QLORA_PARENT_DEATH, the death of the starter is SIGTERM to the launcher."""
    machine.start(OBEDIENT, a_run()).kill()  # writes the files
    starter = textwrap.dedent(f"""
        import os, subprocess, sys, time
        os.environ[{PARENT_DEATH_ENV!r}] = str(os.getpid())
        code = "from qlora_trainer.launch.__main__ import main; import sys; main([sys.executable, 'rank.py'])"
        subprocess.Popen([sys.executable, "-c", code])
        time.sleep(60)
    """)
    environ = os.environ | {RUN_CONFIG_ENV: "run.json", TERMINATION_LOG_ENV: "termination-log"}
    process = subprocess.Popen(
        [sys.executable, "-c", starter], cwd=machine.folder, env=environ, stderr=subprocess.DEVNULL
    )
    machine.started.append(process)
    machine.pids(2)
    process.kill()

    log = machine.folder / "termination-log"
    wait_for(lambda: log.exists() and bool(log.read_text()))
    assert json.loads(log.read_text())["exitCode"] == ExitCode.TERMINATED


@pytest.mark.parametrize(
    ("answer", "code"), [pytest.param("None", -9, id="ignores"), pytest.param("os._exit(50)", 50, id="obeys")]
)
def test_nobody_outlives_a_dead_peer_for_ever(
    a_run: Callable[..., RunConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str], answer: str, code: int
) -> None:
    """A rank that does not notice its peer's death is told, then killed, and its end is not the cause."""
    program = SAY + textwrap.dedent(f"""
        signal.signal(signal.SIGTERM, lambda *_: (ready("asked"), {answer}))
        ready()
        while local == 1 or not os.path.exists("ready-1"):
            time.sleep(0.05)
        sys.exit(31)
    """)
    (tmp_path / "rank.py").write_text(f"import os; os.chdir({str(tmp_path)!r})\n{program}")
    run, assignments = a_run(), [CpuAssignment(tuple(os.sched_getaffinity(0)), 1)] * 2
    environments = [
        rank_environment(run, [2], 0, local, assignment, os.environ)
        for local, assignment in enumerate(assignments)
    ]
    ranks = supervisor.start_ranks(
        [sys.executable, str(tmp_path / "rank.py")], environments, assignments, tmp_path
    )
    exited = supervisor.watch(ranks, Limits(grace=60, peer_loss=0.3, kill_delay=1), supervisor.Stop())
    exits = [rank_exit(rank) for rank in exited]

    assert (tmp_path / "asked-1").exists()
    assert [(end.code, end.killed_by_launcher) for end in exits] == [(31, False), (code, True)]
    assert summarize(exits, run, oom=False, limit=None).exit_code == ExitCode.STALLED
    assert "a rank has died" in capfd.readouterr().err


def test_a_rank_that_keeps_the_interpreters_lock_is_found_from_outside(
    a_run: Callable[..., RunConfig], machine: Machine
) -> None:
    """No thread of it runs, so that neither its watch nor its signal handlers do. The log has the place."""
    program = """
        import ctypes
        from qlora_trainer.telemetry.stall_watch import watch

        def hang_here():
            ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)

        watch(0.4, lambda: 0, lambda: True, print)  # content with all
        time.sleep(0.1)
        hang_here()
    """
    code, _, err = machine.run(program, a_run(layout={"ranksPerPod": 1}, progressDeadlineSeconds=2))

    assert code == ExitCode.STALLED
    assert machine.report().reason == "STALLED"
    assert machine.report().cause.startswith("nothing ran in rank 0 for 2 s, not even its own watch")
    assert b"in hang_here" in err


def test_a_rank_that_is_stopped_or_gives_no_sign_is_not_found(
    a_run: Callable[..., RunConfig], machine: Machine
) -> None:
    """A debugger and SIGSTOP end, and a program that has no watch is none of ours to judge."""
    program = """
        from qlora_trainer.telemetry.stall_watch import watch
        if local == 0:
            watch(0.4, lambda: 0, lambda: True, print)
        ready()
        while not os.path.exists("go on"):
            time.sleep(0.05)
    """
    launcher = machine.start(program, a_run(progressDeadlineSeconds=1))
    stopped, _ = machine.pids(2)
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(3)
    os.kill(stopped, signal.SIGCONT)
    (machine.folder / "go on").touch()

    assert launcher.wait(timeout=60) == ExitCode.DONE


# --- one rank per cluster: the launchers agree on the world

AUTO = textwrap.dedent("""
    import os, sys
    from qlora_trainer.host import numa
    from qlora_trainer.launch import __main__ as launch, pod_layout

    # Each CPU stands for a NUMA node, so that a launcher with two of them has two ranks.
    real = numa.read_machine()
    apart = tuple(numa.Core((cpu,), 0, cpu) for core in real.cores for cpu in core.cpus)
    pod_layout.read_machine = lambda root=None: numa.Machine(apart)
    os._exit(launch.main([sys.executable, "rank.py"]))
""")
"""A launcher on a machine of small NUMA nodes."""

SAY_PLACE = """
names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'NODE_RANK', 'QLORA_RANKS')
print(*(os.environ[name] for name in names), flush=True)
"""


def auto_launchers(
    machine: Machine, run: RunConfig, program: str, cpus: list[str], uids: list[str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """A launcher for each list of CPUs, with pod indices from 0 and ranksPerPod auto; `uids` are the jobs that they
    belong to."""
    run = run.model_copy(update={"layout": run.layout.model_copy(update={"ranks_per_pod": "auto"})})
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    started = []
    for index, named in enumerate(cpus):
        folder = machine.folder / f"pod-{index}"
        folder.mkdir()
        job = run.job.model_copy(update={"uid": uids[index] if uids else run.job.uid})
        (folder / "run.json").write_text(run.model_copy(update={"job": job}).to_json())
        (folder / "rank.py").write_text(SAY + textwrap.dedent(program))
        environ = {RUN_CONFIG_ENV: "run.json", TERMINATION_LOG_ENV: "log", COMPLETION_INDEX_ENV: str(index)}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), CPUS_ENV: named}
        process = subprocess.Popen(
            [sys.executable, "-c", AUTO],
            cwd=folder,
            env={**os.environ, **environ, **address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        machine.started.append(process)
        started.append(process)
    return started


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_pods_of_unequal_size_make_one_world(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """Two ranks in pod 0, one each in pods 1 and 2: ranks count over the pods, and all know the same world."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    run = a_run(layout={"pods": 3})
    launchers = auto_launchers(machine, run, SAY_PLACE, [f"{first},{second}", str(first), str(second)])
    ends = [launcher.communicate(timeout=60) for launcher in launchers]

    assert [launcher.returncode for launcher in launchers] == [0, 0, 0]
    assert sorted(line for out, _ in ends for line in unstamped(out).splitlines()) == [
        b"[rank 0] 0 4 0 0 2,1,1",
        b"[rank 1] 1 4 1 0 2,1,1",
        b"[rank 2] 2 4 0 1 2,1,1",
        b"[rank 3] 3 4 0 2 2,1,1",
    ]
    assert f"launcher: local rank 1: 1 thread(s) on CPUs {second}".encode() in ends[0][1]


def test_a_pod_that_never_comes_ends_the_launch(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """After rendezvousTimeoutSeconds every launcher ends with the code for it, and the sentence names the pod."""
    run = a_run(layout={"pods": 3}, distributed={"rendezvousTimeoutSeconds": 5})
    cpu = str(min(os.sched_getaffinity(0)))
    launchers = auto_launchers(machine, run, SAY_PLACE, [cpu, cpu])
    ends = [launcher.communicate(timeout=60) for launcher in launchers]

    assert [launcher.returncode for launcher in launchers] == [ExitCode.RENDEZVOUS_FAILED] * 2
    assert [b"2 of 3 pods reached" in err and b"pod(s) 2 did not" in err for _, err in ends] == [True, True]
    assert [out for out, _ in ends] == [b"", b""]


def test_a_pod_of_another_job_ends_alone(a_run: Callable[..., RunConfig], machine: Machine) -> None:
    """It is told whose launcher it met; the other one waits on for its own pods, until it is told to stop."""
    cpu = str(min(os.sched_getaffinity(0)))
    launchers = auto_launchers(machine, a_run(layout={"pods": 2}), SAY_PLACE, [cpu, cpu], ["u", "other"])
    _, err = launchers[1].communicate(timeout=60)
    launchers[0].terminate()
    launchers[0].communicate(timeout=60)

    assert launchers[1].returncode == ExitCode.RENDEZVOUS_FAILED
    assert b"pod 1 is of job uid 'other', attempt 1, 2 pods, but 127.0.0.1:" in err
    assert launchers[0].returncode == ExitCode.TERMINATED
