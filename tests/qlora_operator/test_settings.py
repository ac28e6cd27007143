"""The administrator's settings."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_operator.settings import (
    CostSettings,
    Limits,
    Settings,
    SettingsError,
    TransferSettings,
    load_settings,
)

LEAST = {"trainerImage": "registry.example/trainer:1"}


def load(folder: Path, content: Any) -> Settings:
    """The settings in a file of this content."""
    file = folder / "settings.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return load_settings(file)


def test_one_setting_is_enough(tmp_path: Path) -> None:
    """Everything but the trainer's image has a default: nothing is limited, and nothing is special."""
    settings = load(tmp_path, LEAST)

    assert settings.trainer_image == "registry.example/trainer:1"
    assert (settings.allowed_images, settings.allowed_sources) == ([], ["*"])
    assert settings.limits == Limits()
    assert set(settings.limits.model_dump().values()) == {None}
    assert settings.transfer == TransferSettings()
    assert settings.transfer.model_dump(exclude_none=True) == {"cpu": "1", "memory": "2Gi"}
    assert (settings.run_as_user, settings.run_as_group, settings.fs_group) == (1000, 1000, 1000)
    assert (settings.image_pull_policy, settings.scrapers) == ("IfNotPresent", [])


FULL = {
    **LEAST,
    "trainerImage": f"registry.example/trainer@sha256:{'0' * 64}",
    "requireDigests": True,
    "allowedImages": ["registry.example/*"],
    "allowedSources": ["pvc://*", "hf://our-org/*"],
    "allowedTracking": ["http://mlflow.tracking.svc:*"],
    "limits": {
        "pods": 4,
        "ranks": 8,
        "cpus": 64,
        "memory": "512Gi",
        "ttlSecondsAfterFinished": 86400,
        "activeDeadlineSeconds": 604800,
        "terminationGracePeriodSeconds": 600,
    },
    "defaults": {
        "nodeSelector": {"pool": "cpu"},
        "tolerations": [{"key": "cpu", "operator": "Exists"}],
        "priorityClassName": "batch",
        "queueName": "team",
        "ttlSecondsAfterFinished": 3600,
    },
    "allowed": {
        "priorityClasses": ["batch-*"],
        "queues": ["team-*"],
        "nodeLabels": ["topology.kubernetes.io/*"],
        "tolerations": ["example.org/*"],
        "workspaces": ["pvc://team-*"],
    },
    "namespaces": {"team-b": {"limits": None, "defaults": None, "allowed": None, "notifications": None}},
    "transfer": {
        "serviceAccountName": "transfers",
        "cpu": "500m",
        "memory": "1Gi",
        "httpProxy": "http://proxy.example:3128",
        "httpsProxy": "http://proxy.example:3128",
        "noProxy": "10.0.0.0/8,s3.example",
        "caBundleConfigMap": "authorities",
        "proxySecret": "proxies",
        "hubEndpoint": "https://hub.example",
        "s3Endpoint": "https://s3.example",
        "s3Region": "eu-1",
    },
    "costs": {"pricePerCoreHour": 0.04, "currency": "EUR"},
    "notifications": {"url": "https://events.example/qlora"},
    "imagePullPolicy": "Always",
    "imagePullSecrets": ["pull"],
    "runAsUser": None,
    "runAsGroup": 7,
    "fsGroup": None,
    "hostUsers": False,
    "schedulerName": "other",
    "placementGate": False,
    "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
    "scaleUpSeconds": 900,
    "podLabels": {"team": "a"},
    "podAnnotations": {"note": "b"},
    "scrapers": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}],
    "sweepSeconds": 60,
    "watchInactivitySeconds": 70.0,
    "stuckSeconds": 300.0,
}


def test_every_setting_is_read(tmp_path: Path) -> None:
    """What stands in the file is what the operator has; a setting that is added must be added here, too."""
    settings = load(tmp_path, FULL)

    assert settings.model_dump(by_alias=True) == FULL
    assert settings.model_fields_set == set(Settings.model_fields)
    assert settings.limits.model_fields_set == set(Limits.model_fields)
    assert settings.transfer.model_fields_set == set(TransferSettings.model_fields)
    assert settings.costs.model_fields_set == set(CostSettings.model_fields)


FAULTS = {
    "no image": ({}, "trainerImage: Field required"),
    "an empty file": ("", "trainerImage: Field required"),
    "an empty image": ({"trainerImage": ""}, "trainerImage: String should have at least 1 character"),
    "an unknown setting": ({**LEAST, "image": "a"}, "image: Extra inputs are not permitted"),
    "a setting in another spelling": ({**LEAST, "allowed-sources": []}, "allowed-sources: Extra inputs"),
    "notifications by mail": (
        {**LEAST, "notifications": {"url": "mailto:a@b"}},
        "notifications.url: String should match",
    ),
    "an unknown limit": ({**LEAST, "limits": {"gpus": 1}}, "limits.gpus: Extra inputs are not permitted"),
    "a price below zero": (
        {**LEAST, "costs": {"pricePerCoreHour": -1}},
        "costs.pricePerCoreHour: Input should be greater than or equal to 0",
    ),
    "a currency of two words": (
        {**LEAST, "costs": {"currency": "US $"}},
        "costs.currency: String should match",
    ),
    "no pods at all": (
        {**LEAST, "limits": {"pods": 0}},
        "limits.pods: Input should be greater than or equal to 1",
    ),
    "no ranks at all": ({**LEAST, "limits": {"ranks": 0}}, "limits.ranks: Input should be greater than or"),
    "half a CPU": ({**LEAST, "limits": {"cpus": 0.5}}, "limits.cpus: Input should be a valid integer"),
    "a limit as text": ({**LEAST, "limits": {"pods": "4"}}, "limits.pods: Input should be a valid integer"),
    "memory as a number": (
        {**LEAST, "limits": {"memory": 5}},
        "limits.memory: Input should be a valid string",
    ),
    "memory in GB": ({**LEAST, "limits": {"memory": "5GB"}}, "limits.memory: String should match pattern"),
    "limits as a list": ({**LEAST, "limits": []}, "limits: Input should be a valid dictionary"),
    "an unknown setting of transfers": (
        {**LEAST, "transfer": {"proxy": "a"}},
        "transfer.proxy: Extra inputs are not permitted",
    ),
    "a transfer's memory in GB": (
        {**LEAST, "transfer": {"memory": "2GB"}},
        "transfer.memory: String should match pattern",
    ),
    "a transfer's CPU as a number": (
        {**LEAST, "transfer": {"cpu": 1}},
        "transfer.cpu: Input should be a valid string",
    ),
    "a transfer's CPU in words": ({**LEAST, "transfer": {"cpu": "one"}}, "transfer.cpu: String should match"),
    "a transfer's CPU is empty": ({**LEAST, "transfer": {"cpu": ""}}, "transfer.cpu: String should match"),
    "one source, not a list": (
        {**LEAST, "allowedSources": "hf://*"},
        "allowedSources: Input should be a valid list",
    ),
    "a source that is no text": (
        {**LEAST, "allowedSources": ["hf://*", 1]},
        "allowedSources.1: Input should be",
    ),
    "a pull policy of nobody's": (
        {**LEAST, "imagePullPolicy": "Sometimes"},
        "imagePullPolicy: String should",
    ),
    "digests demanded of others only": (
        {**LEAST, "requireDigests": True},
        "requireDigests: Value error, trainerImage registry.example/trainer:1 has no digest: name it as repository@",
    ),
    "root": ({**LEAST, "runAsUser": 0}, "runAsUser: Input should be greater than or equal to 1"),
    "a sweep all the time": ({**LEAST, "sweepSeconds": 0}, "sweepSeconds: Input should be greater than"),
    "a list": ("- a", "Input should be a valid dictionary"),
    "no YAML": ("a: [", "is not YAML"),
    "no text": (b"\xff\xfe\x00".decode("latin-1"), "is not YAML"),
}


@pytest.mark.parametrize(("content", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_with_its_path(content: Any, words: str, tmp_path: Path) -> None:
    """The message has the file, the setting, and what would be right."""
    with pytest.raises(SettingsError) as error:
        load(tmp_path, content)

    assert str(error.value).startswith(f"{tmp_path / 'settings.yaml'}: ")
    assert words in str(error.value)


def test_every_fault_is_named(tmp_path: Path) -> None:
    """A file with several faults is not refused one fault at a time."""
    content = {"limits": {"pods": 0, "memory": "much"}, "transfer": {"memory": 1}, "runAsUser": "me"}

    with pytest.raises(SettingsError) as error:
        load(tmp_path, content)

    for path in ("trainerImage", "limits.pods", "limits.memory", "transfer.memory", "runAsUser"):
        assert f"{path}: " in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A path that leads nowhere, or to a folder, is a fault of the settings."""
    with pytest.raises(SettingsError, match=r"nowhere\.yaml: cannot be read: No such file or directory"):
        load_settings(tmp_path / "nowhere.yaml")
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        load_settings(tmp_path)


@pytest.mark.parametrize("cpu", ["1", "16", "250m", "0.5", "1.5"])
def test_a_transfers_cpu_is_a_quantity(cpu: str, tmp_path: Path) -> None:
    """As Kubernetes writes it."""
    assert load(tmp_path, {**LEAST, "transfer": {"cpu": cpu}}).transfer.cpu == cpu
