"""What the cluster's administrator sets: which images, as whom pods run, who may scrape them."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from qlora_contract.base import ContractModel
from qlora_operator.errors import OperatorError


class SettingsError(OperatorError):
    """The settings are wrong: where, what, and what would be right."""


class Settings(ContractModel):
    """The operator's settings, a YAML file. Unknown keys are refused."""

    trainer_image: str = Field(min_length=1, max_length=512)
    """Image of the trainer for jobs that name none."""
    allowed_images: list[str] = Field(default=[])
    """Images that jobs may name in spec.image, besides trainerImage; `*` stands for any characters."""
    image_pull_policy: str = Field(default="IfNotPresent", pattern="^(Always|IfNotPresent|Never)$")
    """When nodes fetch the trainer image."""
    image_pull_secrets: list[str] = Field(default=[])
    """Names of Secrets, in each job's namespace, that nodes fetch the trainer image with."""
    run_as_user: int | None = Field(default=1000, ge=1)
    """User id of the pods. null: the image's, or the one that the platform sets (OpenShift)."""
    run_as_group: int | None = Field(default=1000, ge=1)
    """Group id of the pods. null: as for runAsUser."""
    fs_group: int | None = Field(default=1000, ge=1)
    """Group that owns the volumes' files. null: as for runAsUser."""
    scheduler_name: str | None = None
    """Scheduler of the pods. Unset: the cluster's default."""
    pod_labels: dict[str, str] = Field(default={})
    """Labels for every pod, besides the operator's own."""
    pod_annotations: dict[str, str] = Field(default={})
    """Annotations for every pod, besides the operator's own."""
    scrapers: list[dict[str, Any]] = Field(default=[])
    """NetworkPolicyPeers that may read rank 0's progress and metrics: the operator's pods, Prometheus."""
    sweep_seconds: float = Field(default=300, ge=1, le=3600)
    """Seconds between two looks at everything, whatever the watches told."""
    watch_inactivity_seconds: float = Field(default=70, ge=1, le=300)
    """Seconds after which a watch that tells nothing counts as dead. The API server says something at least
    every minute."""
    stuck_seconds: float = Field(default=300, ge=1, le=3600)
    """Seconds for which a job may be due before the operator counts as stuck: its liveness fails."""


def load_settings(path: Path) -> Settings:
    """The settings in a file. Raises SettingsError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: is no YAML: {error}") from error
    try:
        return Settings.model_validate(content if content is not None else {})
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()
        )
        raise SettingsError(f"{path}: {faults}") from error
