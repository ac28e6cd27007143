"""The administrator's settings: which images jobs may use, as which user pods run, who may scrape them."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from qlora_contract.base import ContractModel
from qlora_contract.cost import Price
from qlora_operator.api.quantity import MEMORY_PATTERN
from qlora_operator.errors import OperatorError


class SettingsError(OperatorError):
    """The settings cannot be used: the file, the field, and what would be right."""


class Limits(ContractModel):
    """The most that one job may ask for. Unset: only the API's own bounds apply."""

    pods: int | None = Field(default=None, ge=1)
    """topology.pods."""
    ranks: int | None = Field(default=None, ge=1)
    """Ranks of all pods."""
    cpus: int | None = Field(default=None, ge=1)
    """CPUs of all pods."""
    memory: str | None = Field(default=None, pattern=MEMORY_PATTERN)
    """Memory of all pods, such as 512Gi."""


class CostSettings(ContractModel):
    """What CPUs cost, for the status and reports of jobs."""

    price_per_core_hour: float | None = Field(default=None, ge=0, le=1e6)
    """Price of one CPU for one hour. Unset: no money is reported."""
    currency: str = Field(default="", max_length=8, pattern=r"^[^\s\x00-\x1f\x7f]*$")
    """Currency of the price, such as EUR."""

    @property
    def price(self) -> Price | None:
        """The price, if there is one."""
        if self.price_per_core_hour is None:
            return None
        return Price(amount=self.price_per_core_hour, currency=self.currency)


class TransferSettings(ContractModel):
    """How pods fetch remote sources, and send adapters to remote destinations."""

    service_account_name: str | None = None
    """Service account, in each job's namespace, that the platform gives a workload identity. Unset: default,
    without a token."""
    cpu: str = Field(default="1", pattern="^([1-9][0-9]*m?|[0-9]+[.][0-9]{1,3})$")
    """CPU that such a pod requests, such as 500m."""
    memory: str = Field(default="2Gi", pattern=MEMORY_PATTERN)
    """Memory that such a pod has."""
    http_proxy: str | None = None
    """Proxy for http:// addresses."""
    https_proxy: str | None = None
    """Proxy for https:// addresses."""
    no_proxy: str | None = None
    """Hosts, separated by commas, that are reached without a proxy."""
    ca_bundle_config_map: str | None = None
    """ConfigMap, in each job's namespace, whose key `ca.crt` has the certificate authorities to trust."""
    hub_endpoint: str | None = None
    """Mirror of the Hugging Face Hub that hf:// means. Unset: the Hub itself."""
    s3_endpoint: str | None = None
    """S3 server that s3:// means. Unset: Amazon's."""
    s3_region: str | None = None
    """Region of the S3 server."""


class Settings(ContractModel):
    """The operator's settings, a YAML file. Unknown fields are refused."""

    trainer_image: str = Field(min_length=1, max_length=512)
    """Image of the trainer for jobs that name none."""
    allowed_images: list[str] = Field(default=[])
    """Images that jobs may name in spec.image, besides trainerImage; `*` stands for any characters."""
    allowed_sources: list[str] = Field(default=["*"])
    """Sources and destinations that jobs may name, such as `pvc://*` or `hf://our-org/*`; `*` stands for any
    characters."""
    allowed_tracking: list[str] = Field(default=[])
    """Addresses of tracking servers that jobs may name, such as `http://mlflow.tracking.svc:5000`; `*` stands for any
    characters."""
    limits: Limits = Limits()
    """The most that one job may ask for."""
    transfer: TransferSettings = TransferSettings()
    """How remote sources are fetched, and adapters sent."""
    costs: CostSettings = CostSettings()
    """What CPUs cost."""
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
    """Seconds between two resynchronizations, in which every object is listed whatever the watches delivered."""
    watch_inactivity_seconds: float = Field(default=70, ge=1, le=300)
    """Seconds after which a watch that delivers nothing counts as dead. The API server sends something at least every
    minute."""
    stuck_seconds: float = Field(default=300, ge=1, le=3600)
    """Seconds that a job may be overdue before the operator counts as stuck and its liveness probe fails."""


def load_settings(path: Path) -> Settings:
    """The settings in a file.

    Raises:
        SettingsError: it cannot be read, is not YAML, or a setting is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: is not YAML: {error}") from error
    try:
        return Settings.model_validate(content if content is not None else {})
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()
        )
        raise SettingsError(f"{path}: {faults}") from error
