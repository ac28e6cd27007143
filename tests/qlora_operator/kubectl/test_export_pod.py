"""The pod of `kubectl qlora export`, against the pods of the job's ranks."""

from typing import Any

import pytest

from builders import a_job
from qlora_contract.export import forms_of
from qlora_contract.paths import VOLUMES_ROOT
from qlora_contract.run_config import Output, RunConfig
from qlora_operator.api import names
from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.desired.pod import pod_template
from qlora_operator.errors import CommandError
from qlora_operator.kubectl.export_pod import export_pod
from qlora_operator.settings import Settings

ADAPTER = {"uri": "pvc://team/work/jobs/docs/adapter", "evalLoss": 1.0, "baseEvalLoss": 2.0}
FINISHED = [
    {
        "type": "Finished", "status": "True", "reason": "Succeeded", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
]  # fmt: skip
DONE: dict[str, Any] = {
    "phase": "Succeeded",
    "adapter": ADAPTER,
    "conditions": FINISHED,
    "attempts": [{"attempt": 2, "stage": "train"}, {"attempt": 3, "stage": "publish"}],
}
WANTED = Output(formats=["merged", "gguf"], gguf_types=["q4_k_m"])


def made(status: dict[str, Any] = DONE) -> tuple[QLoRAJob, dict[str, Any]]:
    """A job of two pods with two ranks each, and the template of their newest attempt."""
    job = a_job(
        "docs",
        metadata={"uid": "u-1"},
        model={"source": "pvc://models/m"},
        topology={"pods": 2, "cpusPerRank": 3, "ranksPerPod": 2},
        status=status,
    )
    run = to_run_config(job, uid="u-1", attempt=2, isa="avx512")
    return job, pod_template(
        job, run, "registry.example/trainer:2", Settings.model_validate({"trainerImage": "t:1"})
    )


def test_it_is_an_attempt_of_one_rank_that_exports() -> None:
    """The run.json of the ranks, but for what the pod is to do; after the last attempt, whose fence it takes over."""
    job, template = made()
    before = RunConfig.model_validate_json(template["metadata"]["annotations"][names.RUN_CONFIG_ANNOTATION])
    pod = export_pod(job, template, WANTED)
    run = RunConfig.model_validate_json(pod["metadata"]["annotations"][names.RUN_CONFIG_ANNOTATION])

    assert (run.stage, run.job.uid, run.job.attempt, run.layout.world_size) == ("export", "u-1", 4, 1)
    assert forms_of(run.output) == ["merged", "gguf-q4_k_m"]
    told = {"stage", "job", "layout", "output", "version"}
    assert run.model_dump(exclude=told) == before.model_dump(exclude=told)


def test_there_is_one_at_a_time_and_it_writes_to_the_workspace_alone() -> None:
    """By its name; as a rank's pod, with the launcher that finds no other pod's address to wait for."""
    pod = export_pod(*made(), WANTED)
    (container,) = pod["spec"]["containers"]
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}

    assert pod["metadata"]["name"] == "docs-export"
    assert container["command"] == ["python", "-m", "qlora_trainer.launch"]
    assert not {"MASTER_ADDR", "MASTER_PORT"} & {variable["name"] for variable in container["env"]}
    assert writable == {str(VOLUMES_ROOT / "team"), "/tmp", "/dev/shm"}
    assert not [label for label in pod["metadata"]["labels"] if label.startswith("qlora.dev/")]
    assert pod["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    "status",
    [
        pytest.param({"phase": "Running"}, id="it trains"),
        pytest.param({**DONE, "adapter": None}, id="it failed"),
        pytest.param({**DONE, "conditions": []}, id="it still exports or uploads"),
    ],
)
def test_a_job_without_a_finished_adapter_is_refused(status: dict[str, Any]) -> None:
    """Two attempts would write to one folder."""
    with pytest.raises(CommandError, match="docs has no finished adapter: wait until the job has succeeded"):
        export_pod(*made(status), WANTED)
