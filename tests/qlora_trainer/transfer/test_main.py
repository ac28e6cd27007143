"""A transfer as a process: its reports, its end by any means, and its silence about secrets."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.exit_codes import ExitCode
from qlora_contract.progress import ProgressReport
from qlora_contract.run_config import ResolvedRevisions
from qlora_operator.cli.processes import free_port
from testcluster.faulty_http import answer, cut, spoil, stall
from testcluster.hub import SIGNATURE
from testcluster.remote import BUCKET, HUB_TOKEN, SECRET_KEY, Remotes, Transfers, part_bytes, remotes, until

pytestmark = pytest.mark.process

WEIGHTS = os.urandom(3_000_000)
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
DATA = b'{"prompt": "a", "completion": "b"}\n' * 30_000
MODEL = {"model": {"source": "hf://org/name"}}
DATASET = {"dataset": {"source": f"s3://{BUCKET}/sets/train.jsonl"}}
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEY", "AWS_SECRET_ACCESS_KEY": SECRET_KEY}


@pytest.fixture(scope="module")
def servers() -> Iterator[Remotes]:
    """Both servers."""
    with remotes() as made:
        yield made


@pytest.fixture
def sound(servers: Remotes) -> Remotes:
    """Both servers with a model and a dataset, and wires that are sound."""
    servers.clear()
    servers.hub.commit("org/name", {"config.json": b"{}", "model.safetensors": WEIGHTS})
    servers.put("sets/train.jsonl", DATA)
    return servers


@pytest.fixture
def transfers(tmp_path: Path, sound: Remotes) -> Iterator[Transfers]:
    """Transfers of jobs that share a workspace, with credentials."""
    made = Transfers(tmp_path, sound.environ)
    made.credentials("model", token=HUB_TOKEN)
    made.credentials("dataset", **KEYS)
    yield made
    made.close()


def test_it_reports_what_it_fetched(transfers: Transfers, sound: Remotes) -> None:
    """In the termination message, with the code of the contract."""
    end = transfers.run(**MODEL, **DATASET)
    commit = sound.hub.repositories["models", "org/name"].branches["main"]

    assert (end.code, end.report.reason) == (0, "DONE")
    assert end.report.fetched is not None
    assert end.report.fetched.model == commit
    assert end.report.cause == f"fetched model at {commit}, dataset at {end.report.fetched.dataset}"


def test_nothing_to_fetch_is_done(transfers: Transfers) -> None:
    """A job whose sources are on claims."""
    end = transfers.run()

    assert (end.code, end.report.fetched) == (0, ResolvedRevisions())


def test_progress_is_served(transfers: Transfers, sound: Remotes) -> None:
    """Stage and bytes, of this very attempt, while it lasts."""
    held = threading.Event()
    sound.hub_wire.fault(stall(1_000_000, held), path="/cdn/")
    process = transfers.start(extra={"QLORA_PROGRESS_PORT": str(port := free_port())}, **MODEL)
    until(lambda: (progress(port) or ProgressReport.model_construct(bytes_done=0)).bytes_done == 1_000_002)
    report = progress(port)
    held.set()

    assert report is not None
    assert (report.stage, report.bytes_total, report.job_uid, report.attempt) == (
        "Fetching",
        3_000_002,
        "u",
        1,
    )
    assert transfers.wait(process).code == 0


def test_why_it_waits_is_served(transfers: Transfers, sound: Remotes) -> None:
    """While a server refuses, its answer and the next try are in the report; once it serves, they are not."""
    sound.hub_wire.fault(answer(503), path="/cdn/", times=2)
    held = threading.Event()
    process = transfers.start(extra={"QLORA_PROGRESS_PORT": str(port := free_port())}, **MODEL)
    waiting: list[str] = []

    def told() -> bool:
        report = progress(port)
        if report is not None and report.waiting is not None:
            waiting.append(report.waiting)
        return bool(waiting)

    until(told)
    held.set()

    assert "503" in waiting[0]
    assert "retrying in 1 s" in waiting[0]
    assert transfers.wait(process).code == 0


def progress(port: int) -> ProgressReport | None:
    """The live report; None while there is none."""
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=10) as body,
    ):
        return ProgressReport.model_validate_json(body.read())
    return None


def start_and_hold(
    transfers: Transfers, sound: Remotes, **more: Any
) -> tuple[subprocess.Popen[bytes], threading.Event]:
    """A fetch that has got a million bytes of the model, and gets no more until the event."""
    held = threading.Event()
    sound.hub_wire.fault(stall(1_000_000, held), path="/cdn/")
    process = transfers.start(**MODEL, **more)
    until(lambda: part_bytes(transfers.sources) >= 900_000)
    return process, held


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_at_once_when_asked(transfers: Transfers, sound: Remotes, number: int) -> None:
    """With its own code; what has arrived is not fetched again."""
    process, held = start_and_hold(transfers, sound)
    process.send_signal(number)
    end = transfers.wait(process)
    held.set()
    assert (end.code, end.report.reason) == (ExitCode.TERMINATED, "TERMINATED")
    assert end.report.cause == "asked to stop; what has arrived is kept"

    sound.hub_wire.passed.clear()
    assert transfers.run(**MODEL).code == 0
    assert sound.hub_wire.sent("/cdn/") <= len(WEIGHTS) - 900_000


def test_a_fetch_from_s3_stops_at_once_when_asked(transfers: Transfers, sound: Remotes) -> None:
    """However long S3 says nothing; what has arrived is not fetched again."""
    held = threading.Event()
    sound.s3_wire.fault(stall(800_000, held), path="/sets/train.jsonl")
    process = transfers.start(**DATASET)
    until(lambda: part_bytes(transfers.sources) >= 700_000)
    process.send_signal(signal.SIGTERM)
    end = transfers.wait(process)
    held.set()
    assert (end.code, end.report.reason) == (ExitCode.TERMINATED, "TERMINATED")

    sound.s3_wire.passed.clear()
    assert transfers.run(**DATASET).code == 0
    assert sound.s3_wire.sent("/sets/train.jsonl") <= len(DATA) - 700_000


def test_a_killed_fetch_is_gone_on_from(transfers: Transfers, sound: Remotes) -> None:
    """SIGKILL in the middle of a file: the next attempt waits for nobody for ever, and asks for the rest alone."""
    process, held = start_and_hold(transfers, sound)
    there = part_bytes(transfers.sources)
    process.kill()
    process.wait()
    held.set()
    assert not list(transfers.sources.rglob("model.safetensors"))

    sound.hub_wire.passed.clear()
    assert transfers.run(**MODEL).code == 0
    assert sound.hub_wire.sent("/cdn/") == len(WEIGHTS) - there
    assert next(transfers.sources.rglob("model.safetensors")).read_bytes() == WEIGHTS


@pytest.mark.soak
def test_kills_at_any_moment(transfers: Transfers, sound: Remotes) -> None:
    """Whenever it is killed, what lies under a name is whole, and some attempt ends well."""
    for number in range(20):
        process = transfers.start(**MODEL)
        time.sleep(0.8 + number * 0.02)
        process.kill()
        process.wait()
        for path in transfers.sources.rglob("model.safetensors"):
            assert path.read_bytes() == WEIGHTS
    assert transfers.run(**MODEL).code == 0


def test_two_at_once_download_once(transfers: Transfers, sound: Remotes) -> None:
    """Two jobs of one workspace, two pods."""
    first, held = start_and_hold(transfers, sound, name="first")
    asked = len([each for each in sound.hub_wire.passed if "/tree/" in each.path])
    second = transfers.start(**MODEL, name="second")
    until(lambda: len([each for each in sound.hub_wire.passed if "/tree/" in each.path]) > asked)
    held.set()

    assert [transfers.wait(process).code for process in (first, second)] == [0, 0]
    assert sound.hub_wire.sent("/cdn/") == len(WEIGHTS)


def test_it_dies_with_its_parent(transfers: Transfers, sound: Remotes) -> None:
    """When `qlora run` is killed, nothing is fetched behind the user's back."""
    held = threading.Event()
    sound.hub_wire.fault(stall(1_000_000, held), path="/cdn/")
    config = transfers.config(**MODEL)
    environ = transfers.environment(config)
    program = (
        "import os, subprocess, sys; os.environ['QLORA_PARENT_DEATH'] = str(os.getpid());"
        "subprocess.run([sys.executable, '-m', 'qlora_trainer.transfer'])"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], env=environ, stderr=subprocess.DEVNULL)
    until(lambda: part_bytes(transfers.sources) >= 900_000)
    parent.kill()
    parent.wait()
    end = Path(environ["QLORA_TERMINATION_LOG"])
    until(lambda: end.exists() and end.read_bytes())
    held.set()

    assert json.loads(end.read_text())["exitCode"] == ExitCode.TERMINATED


MISUSES = {
    "train": ({"stage": "train"}, ExitCode.INVALID_CONFIGURATION, "run.json has stage 'train'"),
    "no-adapter": (
        {"stage": "publish", "output": {"destination": "s3://team/x"}},
        ExitCode.INVALID_CONFIGURATION,
        "is not a complete adapter",
    ),
    "claim": (
        {"workspace": "pvc://other/work", **MODEL},
        ExitCode.INVALID_CONFIGURATION,
        "claim 'other' has no directory here",
    ),
    "missing": ({"model": {"source": "hf://org/none"}}, ExitCode.TRANSFER_REFUSED, "hf://org/none: HTTP 404"),
}


@pytest.mark.parametrize(("fields", "code", "said"), MISUSES.values(), ids=MISUSES)
def test_what_cannot_be_done_is_told(
    transfers: Transfers, fields: dict[str, Any], code: int, said: str
) -> None:
    """With a permanent code and one sentence, in the termination message and as the log's last line."""
    end = transfers.run(**fields)

    assert end.code == code
    assert said in end.report.cause
    said_last = f"transfer: exits with code {code} ({end.report.reason}): {end.report.cause}"
    assert re.fullmatch(rf"{TIME} {re.escape(said_last)}", end.log.splitlines()[-1])


def test_a_malformed_run_json_is_told(transfers: Transfers) -> None:
    """As the launcher tells it."""
    environ = transfers.environment(transfers.config())
    Path(environ["QLORA_RUN_CONFIG"]).write_text('{"version": 1}')
    done = subprocess.run(
        [sys.executable, "-m", "qlora_trainer.transfer"], env=environ, check=False, capture_output=True
    )

    assert done.returncode == ExitCode.INVALID_CONFIGURATION
    assert b"is malformed at" in done.stderr


def test_a_workspace_that_cannot_be_written_to_is_told(transfers: Transfers) -> None:
    """With the path."""
    transfers.workspace.parent.mkdir()
    transfers.workspace.write_text("a file")
    end = transfers.run(**MODEL)

    assert end.code == ExitCode.UNEXPECTED
    assert str(transfers.workspace) in end.report.cause


FAULTS = {
    "sound": None,
    "401": answer(401),
    "403": answer(403, SECRET_KEY.encode()),
    "404": answer(404, X_Error_Message=HUB_TOKEN),
    "429": answer(429, HUB_TOKEN.encode()),
    "500": answer(500, SECRET_KEY.encode()),
    "no-json": answer(200, HUB_TOKEN.encode()),
    "redirect": answer(302, Location=f"http://localhost:1/?token={HUB_TOKEN}&{SIGNATURE}"),
    "cut": cut(10),
    "spoilt": spoil(),
}


@pytest.mark.parametrize("name", FAULTS)
def test_secrets_are_never_told(transfers: Transfers, sound: Remotes, name: str) -> None:
    """Neither in a log, nor in a report, nor in a file of the workspace, whatever fails, and in whatever way."""
    fault = FAULTS[name]
    transfers.environ |= {
        "HTTP_PROXY": f"http://me:{SECRET_KEY}@127.0.0.1:1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    limit = {"distributed": {"rendezvousTimeoutSeconds": 5}}
    sound.hub_wire.fault(
        answer(503, HUB_TOKEN.encode(), Retry_After="0"), path="/tree/"
    )  # told by its client
    if fault is not None:
        for path in ("/revision/", "/resolve/", "/cdn/"):
            sound.hub_wire.fault(fault, path=path, times=-1)
        sound.s3_wire.fault(fault, times=-1)
    processes = [
        transfers.start(**source, **limit, name=name) for name, source in (("m", MODEL), ("d", DATASET))
    ]
    ends = [transfers.wait(process) for process in processes]

    told = "".join(end.log + end.report.model_dump_json() for end in ends)
    told += "".join(path.read_text(errors="replace") for path in transfers.workspace.rglob("*.json"))
    assert [end.code == 0 for end in ends] == [fault is None] * 2
    for secret in (HUB_TOKEN, SECRET_KEY, KEYS["AWS_ACCESS_KEY_ID"], SIGNATURE):
        assert secret not in told


def test_secrets_are_not_among_the_arguments(transfers: Transfers, sound: Remotes) -> None:
    """Anybody on a machine may read those of all processes."""
    process, held = start_and_hold(transfers, sound)
    shown = (
        Path(f"/proc/{process.pid}/cmdline").read_bytes() + Path(f"/proc/{process.pid}/environ").read_bytes()
    )
    held.set()
    transfers.wait(process)

    assert HUB_TOKEN.encode() not in shown
    assert SECRET_KEY.encode() not in shown


def test_torch_is_not_needed() -> None:
    """A transfer runs in a small pod."""
    program = (
        "import sys, qlora_trainer.transfer.__main__;"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"
