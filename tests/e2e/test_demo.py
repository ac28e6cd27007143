"""The demo's job on two real nodes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from testcluster.cluster import Cluster

pytestmark = [pytest.mark.nodes, pytest.mark.model, pytest.mark.timeout(1200)]

SAMPLE = Path(__file__).parents[2] / "manifests" / "samples" / "demo.yaml"


@pytest.fixture
def phases() -> Iterator[list[str]]:
    """The phases that the job was seen in, printed when the test has ended."""
    seen: list[str] = []
    yield seen
    print("phases:", " -> ".join(seen))


def test_the_demo_succeeds(
    operator: Cluster,
    node_namespace: str,
    volume: Path,
    demo_model: Path,
    demo_data: Path,
    attach: Any,
    phases: list[str],
) -> None:
    """`kubectl apply` of the demo: a rank on each node with a core of its own, an adapter that is better than the
    base and that stock peft loads, and columns that say so."""
    shutil.copytree(demo_model, volume / "model")
    shutil.copytree(demo_data, volume / "data")
    job = attach("demo", volume)
    operator.kubectl("-n", node_namespace, "apply", "-f", str(SAMPLE))

    def ended(status: dict[str, Any]) -> bool:
        if status.get("phase") and status["phase"] not in phases[-1:]:
            phases.append(status["phase"])
            print(operator.kubectl("-n", node_namespace, "get", "qlj"))
        return status.get("phase") == "Succeeded"

    status = job.until(ended, 900)
    operator.kubectl("-n", node_namespace, "wait", "--for=condition=Finished", "qlj/demo", "--timeout=5s")

    assert [phase for phase in phases if phase in ("Starting", "Running", "Succeeded")] == [
        "Starting",
        "Running",
        "Succeeded",
    ]
    assert status["placement"]["nodes"] == ["node-a", "node-b"]
    assert status["placement"]["worldSize"] == 2
    cpus = [rank["cpus"] for rank in status["ranks"]]
    assert len(set(cpus)) == 2, "each rank has a core of its own"
    assert all(cpu.isdigit() for cpu in cpus)
    assert status["adapter"]["evalLoss"] < status["adapter"]["baseEvalLoss"]
    assert status["restarts"] == {"user": 0, "infrastructure": 0}
    row = operator.kubectl("-n", node_namespace, "get", "qlj", "demo", "--no-headers").split()
    total = yaml.safe_load(SAMPLE.read_text())["spec"]["training"]["maxSteps"]
    assert row[:2] == ["demo", "Succeeded"]
    assert f"{total}/{total}" in row
    answers(demo_model, volume / "work" / "jobs" / "demo" / "adapter", status)


def answers(model: Path, adapter: Path, status: dict[str, Any]) -> None:
    """Stock peft loads the adapter, and it changes what the model says."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    tokens = torch.arange(20)[None]
    before = base(tokens).logits.detach().clone()
    tuned = PeftModel.from_pretrained(base, adapter)
    assert not torch.equal(before, tuned(tokens).logits)
    manifest = json.loads((adapter / "manifest.json").read_text())
    assert status["adapter"]["sha256"] in json.dumps(manifest)
