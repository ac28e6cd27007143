"""The administrator's settings: which images jobs may use, as which user pods run, who may scrape them."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator

from qlora_contract.base import ContractModel
from qlora_contract.cost import Price
from qlora_operator.api.quantity import MEMORY_PATTERN
from qlora_operator.api.v1alpha1 import MAX_SECONDS, Toleration
from qlora_operator.errors import OperatorError

DIGEST_PATTERN = "@sha256:[0-9a-f]{64}$"
"""How an image ends that is named by its content."""


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
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0, le=MAX_SECONDS)
    """How long a finished job stays, whatever it asks for."""
    active_deadline_seconds: int | None = Field(default=None, ge=1, le=MAX_SECONDS)
    """How long a job may be active, whatever it asks for."""
    termination_grace_period_seconds: int | None = Field(default=None, ge=1, le=86_400)
    """How long its pods may take to stop, and so hold up a drain, whatever it asks for."""


class Defaults(ContractModel):
    """What jobs get that do not say otherwise, and where all of them run."""

    node_selector: dict[str, str] = Field(default={})
    """Labels of the nodes that jobs run on, besides those that they ask for. A job cannot ask for others of these
    keys."""
    tolerations: list[dict[str, Any]] = Field(default=[])
    """Taints that all pods of jobs tolerate, besides those that a job names."""
    priority_class_name: str | None = None
    """PriorityClass of jobs that name none."""
    queue_name: str | None = None
    """LocalQueue, in the job's namespace, of jobs that name none."""
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0, le=MAX_SECONDS)
    """How long a finished job stays that does not say."""

    @field_validator("tolerations")
    @classmethod
    def _are_tolerations(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for toleration in value:
            Toleration.model_validate(toleration)
        return value


class Allowed(ContractModel):
    """What jobs may name; `*` stands for any characters. What the defaults name is allowed."""

    priority_classes: list[str] = Field(default=["*"])
    """PriorityClasses. Those that begin with `system-` are refused all the same."""
    queues: list[str] = Field(default=["*"])
    """LocalQueues."""
    node_labels: list[str] = Field(default=["*"])
    """Keys of scheduling.nodeSelector."""
    tolerations: list[str] = Field(default=["*"])
    """Keys of scheduling.tolerations. A toleration without a key, which is one of every taint, needs `*`."""
    workspaces: list[str] = Field(default=["*"])
    """Workspaces, such as `pvc://team-*`."""


class NotificationSettings(ContractModel):
    """Who is told of what happens to jobs. Jobs cannot name anybody: the operator sends to no address of theirs."""

    url: str | None = Field(default=None, max_length=2048, pattern=r"^https?://[^\s\x00-\x1f\x7f]+$")
    """Address that gets a CloudEvent, by POST, when a job starts, succeeds, fails, is suspended or resumed. Unset:
    none."""


class NamespaceSettings(ContractModel):
    """What differs in one namespace. What is set here replaces the whole of what holds elsewhere."""

    limits: Limits | None = None
    """The most that one job may ask for there."""
    defaults: Defaults | None = None
    """What jobs get there."""
    allowed: Allowed | None = None
    """What jobs may name there."""
    notifications: NotificationSettings | None = None
    """Who is told of jobs there."""


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
    """Memory that such a pod has; beside a fetch, what looks at the data has as much again."""
    http_proxy: str | None = None
    """Proxy for http:// addresses."""
    https_proxy: str | None = None
    """Proxy for https:// addresses."""
    no_proxy: str | None = None
    """Hosts, separated by commas, that are reached without a proxy."""
    proxy_secret: str | None = None
    """Secret, in each job's namespace, with the proxies' addresses where these hold a password: keys `HTTP_PROXY` and
    `HTTPS_PROXY`, in place of the two above."""
    ca_bundle_config_map: str | None = None
    """ConfigMap, in each job's namespace, whose key `ca.crt` has the certificate authorities to trust."""
    hub_endpoint: str | None = None
    """Mirror of the Hugging Face Hub that hf:// means. Unset: the Hub itself."""
    s3_endpoint: str | None = None
    """S3 server that s3:// means. Unset: Amazon's."""
    s3_region: str | None = None
    """Region of the S3 server."""

    @property
    def checks_data(self) -> bool:
        """Whether a container beside the fetch looks at the data. Not where the pod has an identity: whatever runs in
        it, and reads files of strangers, would have that, too."""
        return self.service_account_name is None


class Settings(ContractModel):
    """The operator's settings, a YAML file. Unknown fields are refused."""

    trainer_image: str = Field(min_length=1, max_length=512)
    """Image of the trainer for jobs that name none."""
    allowed_images: list[str] = Field(default=[])
    """Images that jobs may name in spec.image, besides trainerImage; `*` stands for any characters."""
    allowed_sources: list[str] = Field(default=["*"])
    """Sources and destinations that jobs may name, such as `pvc://*` or `hf://our-org/*`; `*` stands for any
    characters. `https://` addresses must be named as such: `https://data.example/*`, and so must those to which the
    servers redirect, and `oci://` destinations: `oci://registry.example/team/*`."""
    allowed_tracking: list[str] = Field(default=[])
    """Addresses of tracking servers that jobs may name, such as `http://mlflow.tracking.svc:5000`; `*` stands for any
    characters."""
    require_digests: bool = False
    """Refuse what may become something else under its name: images without a digest, trainerImage among them, and
    sources on the Hub whose revision is no commit."""
    limits: Limits = Limits()
    """The most that one job may ask for."""
    defaults: Defaults = Defaults()
    """What jobs get that do not say otherwise."""
    allowed: Allowed = Allowed()
    """What jobs may name."""
    namespaces: dict[str, NamespaceSettings] = Field(default={})
    """By a namespace's name: what differs there."""
    transfer: TransferSettings = TransferSettings()
    """How remote sources are fetched, and adapters sent."""
    costs: CostSettings = CostSettings()
    """What CPUs cost."""
    notifications: NotificationSettings = NotificationSettings()
    """Who is told of what happens to jobs."""
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
    host_users: bool | None = None
    """false: pods run in a user namespace of their own, so that whoever breaks out of one is nobody on its node.
    The nodes' runtime, and the file systems of the claims, must support it. Unset: as the cluster has it."""
    scheduler_name: str | None = None
    """Scheduler of the pods. Unset: the cluster's default."""
    pod_labels: dict[str, str] = Field(default={})
    """Labels for every pod, besides the operator's own."""
    pod_annotations: dict[str, str] = Field(default={})
    """Annotations for every pod, besides the operator's own."""
    placement_gate: bool = True
    """Create pods only once enough nodes have the processors and the room. Without it pods are created for the first
    tier that a job allows even if no nodes fit: where an autoscaler makes nodes for pods that wait."""
    scale_up_seconds: int = Field(default=0, ge=0, le=86_400)
    """How long an autoscaler takes to bring up a node and its images: at least so long pods wait for nodes before
    another tier is tried, or nodes are released."""
    scrapers: list[dict[str, Any]] = Field(default=[])
    """NetworkPolicyPeers that may read rank 0's progress and metrics: the operator's pods, Prometheus."""
    egress: list[dict[str, Any]] | None = None
    """NetworkPolicyEgressRules for the pods of jobs, besides DNS and each other; unset: they may reach everything."""
    sweep_seconds: float = Field(default=300, ge=1, le=3600)
    """Seconds between two resynchronizations, in which every object is listed whatever the watches delivered."""
    watch_inactivity_seconds: float = Field(default=70, ge=1, le=300)
    """Seconds after which a watch that delivers nothing counts as dead. The API server sends something at least every
    minute."""
    stuck_seconds: float = Field(default=300, ge=1, le=3600)
    """Seconds that a job may be overdue before the operator counts as stuck and its liveness probe fails."""

    @field_validator("require_digests")
    @classmethod
    def _holds_for_the_default_image(cls, value: bool, settings: ValidationInfo) -> bool:
        image = settings.data.get("trainer_image", "")
        if value and not re.search(DIGEST_PATTERN, image):
            raise ValueError(f"trainerImage {image} has no digest: name it as repository@sha256:...")
        return value

    def of(self, namespace: str | None) -> "Settings":
        """The settings for jobs of a namespace."""
        own = self.namespaces.get(namespace or "")
        if own is None:
            return self
        return self.model_copy(update={name: value for name, value in own if value is not None})


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
