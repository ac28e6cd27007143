"""The Hub and S3 on this machine, each behind a wire that misbehaves on demand, and transfers that use them."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

from qlora_contract.progress import TerminationReport
from qlora_contract.run_config import RunConfig
from testcluster.faulty_http import FaultyHttp
from testcluster.hub import HubServer

BUCKET = "team"
SECRET_KEY = "planted-secret-key-7a2b"
HUB_TOKEN = "hf_planted_token_91c4"
POLL_SECONDS = 0.01


@dataclass
class Remotes:
    """Both servers, a bucket, and how to reach them."""

    hub: HubServer
    hub_wire: FaultyHttp
    s3: Any
    """boto3's client, past the wire."""
    s3_wire: FaultyHttp
    cdn_wire: FaultyHttp
    """What LFS objects of the Hub come by."""

    @property
    def environ(self) -> dict[str, str]:
        """What an administrator sets, and nothing of this machine's user."""
        return {
            "HF_ENDPOINT": self.hub_wire.url,
            "HF_HOME": "/nonexistent",
            "AWS_ENDPOINT_URL_S3": self.s3_wire.url,
            "AWS_REGION": "eu-central-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_CONFIG_FILE": "/nonexistent",
        }

    def clear(self) -> None:
        """Take everything away, faults too."""
        self.hub.repositories.clear()
        self.hub.objects.clear()
        for wire in (self.hub_wire, self.s3_wire, self.cdn_wire):
            wire.heal()
            wire.passed.clear()
        for key in self.list_keys():
            self.s3.delete_object(Bucket=BUCKET, Key=key)

    def put(self, key: str, data: bytes, **more: Any) -> None:
        """Put an object into the bucket."""
        self.s3.put_object(Bucket=BUCKET, Key=key, Body=data, **more)

    def list_keys(self) -> list[str]:
        """Of the bucket's objects, in the order of time."""
        there = self.s3.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return [each["Key"] for each in sorted(there, key=lambda each: each["LastModified"])]


@contextlib.contextmanager
def remotes(host: str = "127.0.0.1", cdn_host: str | None = None) -> Iterator[Remotes]:
    """Both servers, while the context lasts; their wires listen at this address, and LFS objects come from the other
    one, if there is one."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    try:
        _, port = moto.get_host_and_port()
        with (
            HubServer() as hub,
            FaultyHttp(hub.port, host=host) as hub_wire,
            FaultyHttp(port, host=host) as s3_wire,
            FaultyHttp(hub.port, host=cdn_host or host) as cdn_wire,
        ):
            if cdn_host:
                hub.cdn = cdn_wire.url
            hub.tokens[HUB_TOKEN] = "write"
            s3 = boto3.client(
                "s3",
                endpoint_url=f"http://127.0.0.1:{port}",
                region_name="us-east-1",
                aws_access_key_id="a",
                aws_secret_access_key="b",
            )
            s3.create_bucket(Bucket=BUCKET)
            made = Remotes(hub, hub_wire, s3, s3_wire, cdn_wire if cdn_host else hub_wire)
            yield made
            made.clear()
            s3.close()
    finally:
        moto.stop()


@dataclass
class End:
    """How a transfer ended."""

    code: int
    report: TerminationReport
    log: str


@dataclass
class Transfers:
    """Transfers of jobs that share a workspace: each is a process, as it is in a pod."""

    folder: Path
    environ: dict[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    count: int = 0

    @property
    def workspace(self) -> Path:
        """The jobs' workspace."""
        return self.folder / "claim" / "work"

    @property
    def sources(self) -> Path:
        """What was fetched into it."""
        return self.workspace / "sources"

    def job(self, name: str = "j") -> Path:
        """A job's folder."""
        return self.workspace / "jobs" / name

    def credentials(self, role: str, **keys: str) -> None:
        """Mount a Secret."""
        folder = self.folder / "credentials" / role
        folder.mkdir(parents=True, exist_ok=True)
        for key, value in keys.items():
            (folder / key).write_text(value)

    def config(self, stage: str = "fetch", name: str = "j", **more: Any) -> RunConfig:
        """run.json of a job; sources are on a claim unless they are given."""
        self.count += 1
        fields: dict[str, Any] = {
            "stage": stage,
            "job": {"name": name, "uid": "u", "attempt": self.count},
            "workspace": "pvc://claim/work",
            "model": {"source": "pvc://claim/model"},
            "dataset": {"source": "pvc://claim/data.jsonl"},
            "training": {"maxSteps": 1},
            "layout": {"memoryPerRank": 1},
            "isa": "avx2",
            "distributed": {"rendezvousTimeoutSeconds": 30},
        }
        return RunConfig.model_validate(fields | more)

    def environment(self, config: RunConfig) -> dict[str, str]:
        """Of the process that a transfer is."""
        (self.folder / "claim").mkdir(exist_ok=True)
        path = self.folder / f"run-{config.job.attempt}.json"
        path.write_text(config.to_json())
        return {
            **self.environ,
            "PATH": os.environ["PATH"],
            "QLORA_RUN_CONFIG": str(path),
            "QLORA_VOLUMES": json.dumps({"claim": str(self.folder / "claim")}),
            "QLORA_CREDENTIALS": str(self.folder / "credentials"),
            "QLORA_TERMINATION_LOG": str(path.with_suffix(".end")),
            "QLORA_PROGRESS_PORT": "0",
        }

    def start(
        self, stage: str = "fetch", *, extra: dict[str, str] | None = None, **more: Any
    ) -> subprocess.Popen[bytes]:
        """Start a transfer; its log goes to a file."""
        config = self.config(stage, **more)
        environ = self.environment(config) | (extra or {})
        with self._log(config.job.attempt).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "qlora_trainer.transfer"], env=environ, stdout=log, stderr=log
            )
        self.started.append(process)
        return process

    def _log(self, attempt: int) -> Path:
        return self.folder / f"log-{attempt}"

    def wait(self, process: subprocess.Popen[bytes]) -> End:
        """How a transfer ends."""
        code = process.wait(120)
        attempt = self.started.index(process) + 1
        report = TerminationReport.model_validate_json((self.folder / f"run-{attempt}.end").read_bytes())
        return End(code, report, self._log(attempt).read_text())

    def run(self, stage: str = "fetch", **more: Any) -> End:
        """A transfer from its start to its end."""
        return self.wait(self.start(stage, **more))

    def close(self) -> None:
        """End what still runs."""
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()


def until(happened: Callable[[], Any]) -> None:
    """Return once it happened; the test's own time-out ends a wait in vain."""
    while not happened():
        time.sleep(POLL_SECONDS)


def part_bytes(sources: Path) -> int:
    """Bytes of what has arrived and is not whole yet."""
    sizes = []
    for path in sources.rglob("parts/*"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sum(sizes)
