"""The whole way on one machine: `qlora fetch`, `qlora plan` and `qlora run` of a job whose model is on the Hub, whose
data is on S3, and whose adapter goes to S3."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import PeftConfig

from builders import job_manifest
from qlora_trainer import smoke_model
from testcluster.faulty_http import stall
from testcluster.remote import BUCKET, SECRET_KEY, Remotes, remotes, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remotes]:
    """Both servers, with a tiny model and its data."""
    folder = tmp_path_factory.mktemp("tiny")
    smoke_model.write(folder)
    with remotes() as made:
        made.hub.commit_folder("team/tiny", folder / "model")
        made.put("sets/data.jsonl", (folder / "data.jsonl").read_bytes())
        yield made


class Machine:
    """A machine with a folder for the claim `team`."""

    def __init__(self, folder: Path, servers: Remotes, name: str) -> None:
        self.folder = folder
        self.servers = servers
        self.job = folder / "work/jobs" / name
        self.file = folder / "job.json"
        document = job_manifest(
            name,
            model={"source": "hf://team/tiny", "credentialsSecret": "hub"},
            dataset={"source": f"s3://{BUCKET}/sets/data.jsonl"},
            training={"maxSteps": 3, "globalBatchTokens": 512, "maxSequenceLength": 128},
            evaluation={"requireImprovement": False},
            topology={"memoryPerRank": "2Gi", "pinning": "best-effort"},
            output={"destination": f"s3://{BUCKET}/adapters/{name}"},
        )
        self.file.write_text(json.dumps(document))

    def start(self, command: str, *options: str) -> subprocess.Popen[str]:
        """Start a command of qlora's on the job."""
        arguments = ["--volume", f"team={self.folder}", str(self.file)]
        keys = {"AWS_ACCESS_KEY_ID": "planted-key", "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        return subprocess.Popen(
            [sys.executable, "-m", "qlora_operator.cli", command, *options, *arguments],
            env={**os.environ, **self.servers.environ, **keys},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, command: str, *options: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of a command on the job."""
        process = self.start(command, *options)
        out, err = process.communicate(timeout=200)
        return process.returncode, out, err


@pytest.fixture
def machine(tmp_path: Path, servers: Remotes) -> Machine:
    """A machine of the test's own, whose wires are sound."""
    servers.hub_wire.heal()
    servers.s3_wire.heal()
    return Machine(tmp_path, servers, "way")


def test_from_the_hub_and_s3_to_s3(machine: Machine) -> None:
    """What is remote is fetched, trained on and named by the adapter, which goes to its destination; once. Another job
    goes on from it there."""
    code, out, err = machine.run("run")
    assert (code, err) == (0, "")
    commit = machine.servers.hub.repositories["models", "team/tiny"].branches["main"]
    assert f"fetched model at {commit}, dataset at " in out
    assert "published  s3://team/adapters/way\n" in out
    assert "ignored, because only the operator acts on it: spec.model.credentialsSecret\n" in out

    config = PeftConfig.from_pretrained(str(machine.job / "adapter"))
    assert (config.base_model_name_or_path, config.revision) == ("team/tiny", commit)
    provenance = json.loads((machine.job / "training_report.json").read_text())["provenance"]
    assert (provenance["base_model"], provenance["model_revision"]) == ("team/tiny", commit)
    assert len(provenance["dataset_revision"]) == 64
    card = (machine.job / "adapter/README.md").read_text()
    assert f"`team/tiny` at {commit}" in card
    for path in (machine.job / "adapter").iterdir():
        copy = machine.servers.s3.get_object(Bucket=BUCKET, Key=f"adapters/way/{path.name}")["Body"].read()
        assert copy == path.read_bytes()

    code, out, _ = machine.run("run")
    assert code == 0
    assert "way is already finished" in out
    assert "published  s3://team/adapters/way\n" in out

    document = json.loads(machine.file.read_text())
    document["metadata"]["name"] = "further"
    document["spec"]["adapter"] = {"initialAdapter": f"s3://{BUCKET}/adapters/way"}
    del document["spec"]["output"]
    machine.file.write_text(json.dumps(document))
    code, out, err = machine.run("run")
    assert (code, err) == (0, "")
    assert "adapter.initialAdapter at " in out
    further = machine.job.parent / "further"
    provenance = json.loads((further / "training_report.json").read_text())["provenance"]
    first = (machine.job / "adapter/adapter_model.safetensors").read_bytes()
    assert provenance["initial_adapter"] == f"s3://{BUCKET}/adapters/way"
    assert len(provenance["initial_adapter_revision"]) == 64
    assert provenance["initial_adapter_sha256"] == hashlib.sha256(first).hexdigest()


def test_a_plan_needs_a_fetch(machine: Machine) -> None:
    """`qlora plan` says how to get what it looks at, and `qlora fetch` gets it."""
    code, _, err = machine.run("plan")
    assert code == 10
    assert "hf://team/tiny is not in the workspace yet; fetch it with `qlora fetch` and the same file" in err

    code, out, err = machine.run("fetch")
    assert (code, err) == (0, "")
    assert f"everything that way needs is in {machine.folder}/work\n" in out

    code, out, err = machine.run("plan", "-o", "json")
    assert (code, err) == (0, "")
    assert json.loads(out)["details"]["training"]["records"] > 100


def test_ctrl_c_while_fetching(machine: Machine) -> None:
    """It stops at once, keeps what has arrived, and the next run goes on from there."""
    held = threading.Event()
    machine.servers.hub_wire.fault(stall(100_000, held), path="/cdn/")
    process = machine.start("run")
    until(lambda: any(path.stat().st_size >= 65_536 for path in machine.folder.rglob("parts/*")))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    held.set()
    assert (process.returncode, err) == (130, "")
    assert (
        "stopped: asked to stop; what has arrived is kept; run the same command again to continue from there"
        in out
    )

    code, _, err = machine.run("fetch")
    assert (code, err) == (0, "")
    weights = next(machine.folder.rglob("model.safetensors"))
    assert machine.servers.hub.objects[hashlib.sha256(weights.read_bytes()).hexdigest()]


def test_a_refusal_is_one_sentence(machine: Machine) -> None:
    """A model that is not there ends the run, with the code that tells so, before anything is trained."""
    machine.file.write_text(machine.file.read_text().replace("team/tiny", "team/huge"))
    code, _, err = machine.run("run")

    assert code == 17
    assert err.startswith(
        "error: transfer refused: hf://team/huge: HTTP 401: team/huge does not exist, or is private"
    )
    assert "run the same command again" not in err
