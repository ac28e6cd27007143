"""`qlora validate`: whether job files are valid, before a cluster or a machine sees them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from qlora_contract.run_config import NOTHING_HELD_OUT
from qlora_operator.api.loader import file_label, load_jobs
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli.job_file import amendment, on_a_cluster
from qlora_operator.cli.settings import Setting
from qlora_operator.errors import InvalidFileError

VALID = 0
INVALID = 2


def validate(
    paths: Sequence[str], stdout: TextIO, settings: Sequence[Setting] = (), *, output: str = "text"
) -> int:
    """Print a line for each valid job, warning and fault, file by file (`-`: standard input); with `json`, one object.

    Returns the exit status: 0 if all are valid, else 2.
    """
    status = VALID
    files: list[dict[str, Any]] = []
    for path in paths:
        told: dict[str, Any] = {"file": file_label(path), "jobs": [], "faults": []}
        files.append(told)
        try:
            for job in load_jobs(path, amendment(path, settings)):
                told["jobs"].append(
                    {
                        "name": job.metadata.name,
                        "onACluster": on_a_cluster(job),
                        "warnings": warnings(job),
                    }
                )
        except InvalidFileError as error:
            told["faults"] = [asdict(fault) for fault in error.faults]
            status = INVALID
            if output == "text":
                print(error, file=stdout)
        for job_told in told["jobs"] if output == "text" else ():
            note = f"; {sentence}" if (sentence := job_told["onACluster"]) else ""
            print(f"{told['file']}: {job_told['name']}: valid{note}", file=stdout)
            for warning in job_told["warnings"]:
                print(f"{told['file']}: {job_told['name']}: warning: {warning}", file=stdout)
    if output == "json":
        print(json.dumps({"files": files}, indent=2), file=stdout)
    return status


def warnings(job: QLoRAJob) -> list[str]:
    """Why a valid job will fail all the same, whatever its data are."""
    dataset, evaluation = job.spec.dataset, job.spec.evaluation
    held_out = dataset.eval_fraction > 0 or any(source.eval_split for source in dataset.all_sources)
    return [NOTHING_HELD_OUT] if evaluation.require_improvement and not held_out else []
