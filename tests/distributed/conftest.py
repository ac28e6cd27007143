"""Jobs run by the real launcher, with real rank processes, on a tiny model."""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from builders import run_fields
from qlora_contract import env, job_folder
from qlora_contract.progress import TerminationReport
from qlora_contract.run_config import Distributed, RunConfig
from qlora_operator.cli.processes import free_port
from qlora_trainer.data.dataset import load
from qlora_trainer.data.packing import StepSchedule
from qlora_trainer.distributed.backends import registry

POLL_SECONDS = 0.003
RANK_NAME = "qlora-rank-"
"""What a rank's process is called before its number."""
WAIT_SECONDS = 240.0
"""For anything that shall happen; far beyond what a busy machine needs."""


@dataclass
class End:
    """How a launcher ended."""

    code: int
    report: TerminationReport | None
    log: str


@dataclass
class Attempt:
    """The launchers of one attempt, one per pod."""

    job: "Job"
    launchers: list[subprocess.Popen[bytes]]
    logs: list[Path]
    reports: list[Path]
    progress_port: int

    def wait(self) -> list[End]:
        """The ends of all pods."""
        return [self.wait_for_pod(pod) for pod in range(len(self.launchers))]

    def wait_for_pod(self, pod: int) -> End:
        """How one pod ended."""
        code = self.launchers[pod].wait(WAIT_SECONDS)
        text = self.reports[pod].read_text() if self.reports[pod].exists() else ""
        report = TerminationReport.model_validate_json(text) if text else None
        return End(code, report, self.logs[pod].read_text(errors="replace"))

    def until(self, happened: Callable[[], Any]) -> None:
        """Return once `happened()` is true; fail when a launcher ends before that."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not happened():
            log = "\n".join(path.read_text(errors="replace") for path in self.logs)
            assert all(launcher.poll() is None for launcher in self.launchers), f"ended too early:\n{log}"
            assert time.monotonic() < deadline, f"waited in vain:\n{log}"
            time.sleep(POLL_SECONDS)

    def until_step(self, step: int) -> None:
        """Return once metrics.jsonl has that step's line."""
        self.until(lambda: self.job.last_step() >= step)

    def until_stage(self, stage: str, total_steps: int = 1) -> None:
        """Return once rank 0 reports to be in that stage and knows of so many steps."""

        def there() -> bool:
            progress = self.progress()
            return progress["stage"] == stage and progress["totalSteps"] >= total_steps

        self.until(there)

    def progress(self) -> dict[str, Any]:
        """Rank 0's live report; that of nothing while it does not listen."""
        try:
            url = f"http://127.0.0.1:{self.progress_port}/progress"
            with urllib.request.urlopen(url, timeout=10) as answer:
                report: dict[str, Any] = json.load(answer)
                return report
        except OSError:
            return {"stage": "", "totalSteps": 0}

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks' processes, by rank."""
        found = {}
        for launcher in self.launchers:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(launcher.pid).children():
                    # What forks the ranks is a child for a while, too.
                    if child.name().startswith(RANK_NAME):
                        found[int(child.name().removeprefix(RANK_NAME))] = child
        return found

    def kill(self) -> None:
        """End every process of the attempt that still runs."""
        for rank in self.ranks().values():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        for launcher in self.launchers:
            launcher.kill()
            launcher.wait(30)


@dataclass
class Job:
    """One job, with a workspace of its own."""

    root: Path
    """The claim of the workspace."""
    model: Path
    data: Path
    settings: dict[str, Any]
    """Fields of run.json besides the places and the layout."""
    attempt: int = 0
    extra_environ: dict[str, str] = field(default_factory=dict)
    hosts: list[list[str]] = field(default_factory=list)
    """What each pod's command begins with; empty: all run on this host."""
    program: list[str] = field(default_factory=lambda: ["-m", "qlora_trainer.launch"])
    """What a launcher's Python runs."""

    @property
    def folder(self) -> Path:
        """`jobs/<name>`."""
        return self.root / "jobs" / "tiny"

    def run_config(self, ranks: int, pods: int) -> RunConfig:
        """run.json of the next attempt."""
        layout = {
            "pods": pods,
            "ranksPerPod": ranks // pods,
            "cpusPerRank": 1,
            "memoryPerRank": 8 * 2**30,
            "pinning": "best-effort",
        }
        values = run_fields(
            version=1,
            job={"name": "tiny", "uid": "uid-1", "attempt": self.attempt},
            workspace="pvc://work",
            model={"source": "pvc://model"},
            dataset={"source": f"pvc://data/{self.data.name}", "evalFraction": 0.2},
            layout=layout,
        )
        values |= self.settings
        return RunConfig.model_validate_json(json.dumps(values))

    @contextlib.contextmanager
    def start(self, ranks: int = 1, pods: int = 1) -> Iterator[Attempt]:
        """Start an attempt; on leaving, nothing of it is left."""
        text = self.run_config(ranks, pods).to_json()
        with self.start_text(text, pods) as attempt:
            yield attempt

    @contextlib.contextmanager
    def start_text(self, text: str, pods: int = 1) -> Iterator[Attempt]:
        """As `start`, with that text as run.json."""
        here = self.root.parent / f"{self.root.name}-attempt-{self.attempt}"
        here.mkdir()
        (here / "run.json").write_text(text)
        self.attempt += 1
        attempt = Attempt(self, [], [], [], free_port())
        environ = self._environ(here / "run.json", attempt.progress_port)
        try:
            for pod in range(pods):
                attempt.logs.append(here / f"pod-{pod}.log")
                attempt.reports.append(here / f"pod-{pod}.json")
                names = {
                    env.COMPLETION_INDEX_ENV: str(pod),
                    env.TERMINATION_LOG_ENV: str(attempt.reports[pod]),
                }
                with attempt.logs[pod].open("wb") as log:
                    host = self.hosts[pod] if self.hosts else []
                    command = [*host, sys.executable, *self.program]
                    attempt.launchers.append(
                        subprocess.Popen(command, env=environ | names, stdout=log, stderr=log)
                    )
            yield attempt
        finally:
            attempt.kill()

    def _environ(self, run_json: Path, progress_port: int) -> dict[str, str]:
        # Without compiled files an import of torch takes three times as long.
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        volumes = {"work": str(self.root), "model": str(self.model), "data": str(self.data.parent)}
        return {
            **inherited,
            env.RUN_CONFIG_ENV: str(run_json),
            env.VOLUMES_ENV: json.dumps(volumes),
            env.PROGRESS_PORT_ENV: str(progress_port),
            env.PARENT_DEATH_ENV: str(os.getpid()),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            **self.extra_environ,
        }

    def run(self, ranks: int = 1) -> End:
        """One attempt in one pod, to its end."""
        with self.start(ranks) as attempt:
            return attempt.wait_for_pod(0)

    def done(self, ranks: int = 1) -> "Job":
        """This job, after an attempt that must succeed."""
        end = self.run(ranks)
        assert end.code == 0, end.log
        return self

    def copy(self, root: Path) -> "Job":
        """The same job with a copy of the workspace."""
        shutil.copytree(self.root, root)
        return Job(root, self.model, self.data, self.settings, self.attempt)

    def plan(self) -> StepSchedule:
        """Its steps, as each rank plans them."""
        run = self.run_config(1, 1)
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        data = load(run.dataset, self.data, tokenizer, run.training.max_sequence_length)
        return StepSchedule(data.train.lengths(), run.training)

    # --- what it left

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        path = self.folder / job_folder.METRICS
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def steps(self) -> list[dict[str, Any]]:
        """Its lines of training steps."""
        return [line for line in self.metrics() if "loss" in line]

    def last_step(self) -> int:
        """The newest step in metrics.jsonl; 0 before the first."""
        return max((line["step"] for line in self.metrics()), default=0)

    def losses(self) -> list[float]:
        """The loss of each step."""
        return [line["loss"] for line in self.steps()]

    def adapter(self) -> dict[str, Any]:
        """The published tensors."""
        tensors: dict[str, Any] = load_file(self.folder / job_folder.ADAPTER / job_folder.ADAPTER_WEIGHTS)
        return tensors

    def adapter_bytes(self) -> bytes:
        """The published weights, as a file."""
        return (self.folder / job_folder.ADAPTER / job_folder.ADAPTER_WEIGHTS).read_bytes()

    def report(self) -> dict[str, Any]:
        """training_report.json."""
        report: dict[str, Any] = json.loads((self.folder / job_folder.TRAINING_REPORT).read_text())
        return report

    def checkpoints(self) -> list[int]:
        """The steps of the whole checkpoints."""
        folders = sorted((self.folder / job_folder.CHECKPOINTS).glob("step-*"))
        return [int(path.name[5:]) for path in folders if job_folder.read_manifest(path) is not None]

    def leftovers(self) -> list[str]:
        """Temporary files and folders."""
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob(".*")]

    def unpublish(self) -> None:
        """As if it had died after its last checkpoint."""
        shutil.rmtree(self.folder / job_folder.ADAPTER)
        (self.folder / job_folder.TRAINING_REPORT).unlink()

    def files(self) -> dict[str, tuple[int, bytes]]:
        """Every file of the job: when it was last written, and its bytes."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return {
            str(path.relative_to(self.folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths
        }


ROUNDING = 2e-6
"""Relative, of a loss or gradient norm: fp32 sums in another order, after up to 24 steps of AdamW. Seen: 1.2e-7."""
WEIGHT_ROUNDING = 2e-5
"""Absolute, of adapter weights of up to 0.15. Seen: 4.9e-7."""

STEPS = 24
SETTINGS: dict[str, Any] = {
    "adapter": {"rank": 8, "alpha": 16.0},
    "training": {
        "maxSteps": STEPS,
        "globalBatchTokens": 500,
        "maxSequenceLength": 96,
        "learningRate": 0.003,
        "computeDtype": "fp32",
    },
    "checkpoint": {"everySteps": 5, "keep": 5},
}


@pytest.fixture(scope="session")
def tiny_data(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 64 records of the demo's training data."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = (demo_data / "train.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:64]))
    return path


MakeJob = Callable[..., Job]


@pytest.fixture(scope="session")
def make_job(
    small_model: Callable[..., Path], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> MakeJob:
    """make(data=None, model=None, root=None, **sections) -> a job that was not started yet.

    `sections` are merged into SETTINGS.
    """

    def make(
        data: Path | None = None, model: Path | None = None, root: Path | None = None, **sections: Any
    ) -> Job:
        merged = {
            name: {**SETTINGS.get(name, {}), **sections.get(name, {})} for name in {*SETTINGS, *sections}
        }
        if root is None:
            root = tmp_path_factory.mktemp("job") / "work"
            root.mkdir()
        return Job(root, model or small_model(), data or tiny_data, merged)

    return make


@pytest.fixture(scope="session")
def alone(make_job: MakeJob) -> Job:
    """The undisturbed job on one rank."""
    return make_job().done(1)


@pytest.fixture(scope="session")
def undisturbed(make_job: MakeJob) -> Callable[[int, str], Job]:
    """done(ranks, backend) -> the undisturbed job on so many ranks, run once."""

    @functools.cache
    def done(ranks: int, backend: str) -> Job:
        return make_job(distributed={"backend": backend}).done(ranks)

    return done


@pytest.fixture(scope="session")
def two(undisturbed: Callable[[int, str], Job]) -> Job:
    """The undisturbed job on two ranks."""
    return undisturbed(2, "gloo")


@pytest.fixture(scope="session")
def four(undisturbed: Callable[[int, str], Job]) -> Job:
    """The undisturbed job on four ranks."""
    return undisturbed(4, "gloo")


ALL = get_args(Distributed.model_fields["backend"].annotation)
"""Every backend that a job may name."""
LIBRARIES = tuple(name for name in ALL if name != "gloo")
"""Those that come as libraries, with wires, threads and shared memory of their own."""

BACKENDS = {
    # The numbers are what a backend adds up.
    "test_ranks_train_as_one_does": ALL,
    "test_backends_agree": LIBRARIES,  # with gloo
    # A rank is in a collective of the library when something happens to it or to its peer.
    "test_stopped_peer_is_waited_for": ALL,
    "test_stopped_peer_is_reported": ALL,
    "test_rank_0_that_dies_is_missed": ALL,
    "test_killed_job_goes_on_as_if_nothing_had_been": ALL,
    "test_partition_is_noticed_on_both_sides": ALL,
    # How ranks of several hosts find each other is torch's own business with gloo.
    "test_ranks_of_two_hosts_reach_each_other": LIBRARIES,
    "test_backend_that_is_not_compiled_is_refused": LIBRARIES,
}
"""The tests that run once for each of several backends, and why.

All others run once, with gloo: what they see is decided before the ranks meet (bad input, the Hub and S3), by one rank
alone (checkpoints, the fence, a full disk), or by numbers that all ranks have already (divergence, no improvement).
test_job_goes_on_with_fewer_ranks ends ranks of mpi and then of ccl by SIGTERM, which therefore needs no test by each;
and a rank 0 that stands still is to a library what any rank is.
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` runs for those that BACKENDS has for it."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS[metafunc.function.__name__], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """A backend of the test's, which can be used here."""
    name: str = request.param
    registry.prepare(name)
    return name


def _assert_same_training(job: Job, reference: Job) -> None:
    ours, theirs = job.steps(), reference.steps()
    for key in ("step", "epoch", "tokens", "supervised_tokens", "learning_rate"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]
    for key in ("loss", "grad_norm"):
        expected = pytest.approx([line[key] for line in theirs], rel=ROUNDING)
        assert [line[key] for line in ours] == expected
    tensors = job.adapter()
    for name, tensor in reference.adapter().items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=WEIGHT_ROUNDING)


@pytest.fixture(scope="session")
def assert_same_training() -> Callable[[Job, Job], None]:
    """Both jobs took the same steps: counts are equal, numbers up to rounding."""
    return _assert_same_training


def _assert_same_bits(job: Job, reference: Job) -> None:
    for key in ("step", "epoch", "tokens", "supervised_tokens", "learning_rate", "loss", "grad_norm"):
        assert [line[key] for line in job.steps()] == [line[key] for line in reference.steps()]
    assert job.adapter_bytes() == reference.adapter_bytes()
    assert job.report()["eval_loss"] == reference.report()["eval_loss"]


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[[Job, Job], None]:
    """Both jobs took the same steps, each once, to the same bits."""
    return _assert_same_bits
