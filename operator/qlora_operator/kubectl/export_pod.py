"""The pod of `kubectl qlora export`: the stage `export` of an attempt after the last of a job that has finished.

It does what the operator would have had done for `output.formats`: the fence keeps other attempts out, and the job's
report tells of the new forms. Its name is fixed, so that there is one at a time.
"""

from collections.abc import Mapping
from typing import Any

from qlora_contract import entry_points
from qlora_contract.run_config import Output, RunConfig, oldest_version
from qlora_operator.api import names
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.client import has_condition
from qlora_operator.errors import CommandError
from qlora_operator.kubectl.own_pod import own_pod

ROLE = "export"


def export_pod(job: QLoRAJob, template: Mapping[str, Any], output: Output) -> dict[str, Any]:
    """The pod for a job.

    Args:
        job: with its uid and status.
        template: pod template of an attempt of the job that trained.
        output: its formats are made.

    Raises:
        CommandError: the job has no finished adapter.
    """
    name, status = job.metadata.name, job.status
    if status is None or status.adapter is None or not has_condition(job, names.ConditionType.FINISHED):
        raise CommandError(f"{name} has no finished adapter: wait until the job has succeeded")
    run = RunConfig.model_validate_json(template["metadata"]["annotations"][names.RUN_CONFIG_ANNOTATION])
    run = run.model_copy(
        update={
            "stage": "export",
            "job": run.job.model_copy(
                update={"attempt": 1 + max((a.attempt for a in status.attempts), default=0)}
            ),
            "layout": run.layout.model_copy(update={"pods": 1, "ranks_per_pod": 1}),
            "output": output,
        }
    )
    # The first attempt's is the oldest that could say what the job used; an image that does not read this one says so.
    run = run.model_copy(update={"version": max(run.version, oldest_version(run))})
    pod, container = own_pod(job, template, ROLE)
    pod["metadata"]["name"] = f"{name}-{ROLE}"
    pod["metadata"]["annotations"][names.RUN_CONFIG_ANNOTATION] = run.to_json(indent=None)
    container["command"] = ["python", "-m", entry_points.LAUNCH]
    return pod
