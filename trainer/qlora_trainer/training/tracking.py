"""The metrics' other readers: TensorBoard, which reads files of the job's folder, and an MLflow tracking server.

What goes wrong with them is said once, and never ends or slows a training.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_contract.exit_codes import ExitCode
from qlora_contract.identity import identity_fields, identity_hash
from qlora_contract.job_folder import EVENTS, MLFLOW_RUN
from qlora_contract.paths import CREDENTIALS_ROOT
from qlora_contract.run_config import RunConfig
from qlora_trainer.artifacts.event_file import EventFile
from qlora_trainer.host.affinity import on_service_cpus
from qlora_trainer.telemetry.mlflow import MlflowRun, Target

log = logging.getLogger(__name__)


class Tracking:
    """What rank 0 tells of each line of metrics.jsonl, from the first step of its attempt on."""

    def __init__(self, run: RunConfig, folder: Path, start_step: int) -> None:
        self._events: EventFile | None = None
        try:
            self._events = EventFile(folder / EVENTS, run.job.attempt, start_step)
        except OSError as error:
            log.warning("no metrics for TensorBoard: %s", error)
        self._mlflow: MlflowRun | None = None
        if run.tracking.mlflow is not None:
            with on_service_cpus():
                self._mlflow = MlflowRun(target_of(run), folder / MLFLOW_RUN)

    def write(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self._events is not None:
            try:
                self._events.write(line)
            except OSError as error:
                log.warning("no more metrics for TensorBoard: %s", error)
                self._events = None
        if self._mlflow is not None:
            self._mlflow.write(line)

    def close(self, exit_code: int) -> None:
        """The rank ends with this code."""
        if self._mlflow is not None:
            self._mlflow.close(status_of(exit_code))


def status_of(exit_code: int) -> str:
    """How MLflow calls the end of an attempt with this code."""
    if exit_code == ExitCode.DONE:
        return "FINISHED"
    return "KILLED" if exit_code == ExitCode.TERMINATED else "FAILED"


def target_of(run: RunConfig) -> Target:
    """Where the metrics of a job go, and what is said of it besides."""
    assert run.tracking.mlflow is not None
    fields = identity_fields(run)
    secret = Path(CREDENTIALS_ROOT) / "tracking"
    params = {
        f"{section}.{name}": str(value)
        for section, values in fields.items()
        for name, value in values.items()
    }
    return Target(
        uri=run.tracking.mlflow.uri,
        experiment=run.tracking.mlflow.experiment,
        run_name=run.job.name,
        credentials=secret if secret.is_dir() else None,
        params={name: value for name, value in params.items() if value not in ("", "None")},
        tags={
            "qlora.namespace": run.job.namespace,
            "qlora.job_uid": run.job.uid,
            "qlora.config_hash": identity_hash(fields),
        },
    )
