"""What the administrator lets jobs ask for."""

import fnmatch
import re
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_job, merged
from qlora_operator.api import names
from qlora_operator.api.names import Reason
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.desired.admission import image_allowed, policy_violation
from qlora_operator.settings import Settings

# --- images

IMAGES = {
    "the default": ("registry.example/trainer:1", [], True),
    "another": ("registry.example/other:1", [], False),
    "one by name": ("a/b:1", ["a/b:1"], True),
    "one of several": ("c/d:1", ["a/b:*", "c/*"], True),
    "any tag": ("a/b:2026.1", ["a/b:*"], True),
    "any digest": ("a/b@sha256:" + "0" * 64, ["a/b@sha256:*"], True),
    "a star for nothing": ("a/b", ["a/b*"], True),
    "a star in the middle": ("a/x/y/c:1", ["a/*/c:1"], True),
    "anything": ("a/b:1", ["*"], True),
    "more before the pattern": ("evil/a/b:1", ["a/b:*"], False),
    "more after the pattern": ("a/b:1-evil", ["a/b:1"], False),
    "other capitals": ("A/b:1", ["a/b:1"], False),
    "a dot is a dot": ("registryXexample/b:1", ["registry.example/*"], False),
    "a question mark is no wildcard": ("a/b:1", ["a/b:?"], False),
    "brackets are no wildcard": ("a/b:1", ["a/b:[1]"], False),
    "no pattern": ("a/b:1", [""], False),
}


@pytest.mark.parametrize(("image", "patterns", "allowed"), IMAGES.values(), ids=IMAGES)
def test_which_images_a_job_may_name(
    image: str, patterns: list[str], allowed: bool, settings: Callable[..., Settings]
) -> None:
    """The default image, and those that one of the administrator's patterns fits as a whole."""
    assert image_allowed(image, settings(allowedImages=patterns)) is allowed


@hypothesis.settings(deadline=None)
@given(image=st.text("ab/:.*?[]!"), pattern=st.text("ab/:.*?[]!", max_size=8))
def test_a_star_is_the_only_wildcard(image: str, pattern: str, settings: Callable[..., Settings]) -> None:
    """Patterns mean what fnmatch makes of them once its other wildcards are quoted."""
    quoted = re.sub(r"([?\[])", r"[\1]", pattern)

    assert image_allowed(image, settings(allowedImages=[pattern])) == fnmatch.fnmatchcase(image, quoted)


# --- sources, destinations, sizes


def job(**fields: Any) -> QLoRAJob:
    """A job of two pods with two ranks each."""
    known = {
        "model": {"source": "hf://org/model"},
        "dataset": {"source": "s3://bucket/data.jsonl"},
        "topology": {"pods": 2, "ranksPerPod": 2, "cpusPerRank": 3},
    }
    return a_job(**merged(known, fields))


PINNED = {
    "trainerImage": f"registry.example/trainer@sha256:{'1' * 64}",
    "requireDigests": True,
    "allowedImages": ["a/*"],
}
REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[Reason, str] | None]] = {
    "everything is allowed by default": ({}, {}, None),
    "an image that is not allowed": (
        {"image": "evil/trainer:1"},
        {},
        (Reason.IMAGE_NOT_ALLOWED, "spec.image evil/trainer:1"),
    ),
    "a web server that nobody named": (
        {"dataset": {"source": "https://data.example/d.jsonl"}},
        {},
        (Reason.SOURCE_NOT_ALLOWED, "spec.dataset.source https://data.example/d.jsonl"),
    ),
    "a web server that is named": (
        {"dataset": {"source": "https://data.example/d.jsonl"}},
        {"allowedSources": ["*", "https://data.example/*"]},
        None,
    ),
    "a registry that nobody named": (
        {"output": {"destination": "oci://registry.example/team/adapter:v1"}},
        {},
        (Reason.SOURCE_NOT_ALLOWED, "spec.output.destination oci://registry.example/team/adapter:v1"),
    ),
    "a registry that is named": (
        {"output": {"destination": "oci://registry.example/team/adapter:v1"}},
        {"allowedSources": ["*", "oci://registry.example/team/*"]},
        None,
    ),
    "a scheme that is not allowed": (
        {},
        {"allowedSources": ["pvc://*", "s3://*"]},
        (Reason.SOURCE_NOT_ALLOWED, "spec.model.source hf://org/model"),
    ),
    "another organisation": (
        {},
        {"allowedSources": ["hf://ours/*", "s3://*"]},
        (Reason.SOURCE_NOT_ALLOWED, "spec.model.source hf://org/model"),
    ),
    "another bucket": (
        {},
        {"allowedSources": ["hf://*", "s3://other/*"]},
        (Reason.SOURCE_NOT_ALLOWED, "spec.dataset.source s3://bucket/data.jsonl"),
    ),
    "one of several sources": (
        {"dataset": {"source": None, "sources": [{"source": "s3://ours/a"}, {"source": "s3://other/b"}]}},
        {"allowedSources": ["hf://*", "s3://ours/*"]},
        (Reason.SOURCE_NOT_ALLOWED, "spec.dataset.sources[1].source s3://other/b"),
    ),
    "a destination that is not allowed": (
        {"output": {"destination": "s3://elsewhere/x"}},
        {"allowedSources": ["hf://*", "s3://bucket/*"]},
        (Reason.SOURCE_NOT_ALLOWED, "spec.output.destination s3://elsewhere/x"),
    ),
    "a tracking server, of which none is allowed by default": (
        {"tracking": {"mlflow": {"uri": "http://mlflow:5000"}}},
        {},
        (Reason.SOURCE_NOT_ALLOWED, "spec.tracking.mlflow.uri http://mlflow:5000"),
    ),
    "another tracking server": (
        {"tracking": {"mlflow": {"uri": "http://mlflow.evil:5000"}}},
        {"allowedTracking": ["http://mlflow:*"]},
        (Reason.SOURCE_NOT_ALLOWED, "spec.tracking.mlflow.uri http://mlflow.evil:5000"),
    ),
    "a tracking server that is allowed": (
        {"tracking": {"mlflow": {"uri": "http://mlflow:5000"}}},
        {"allowedTracking": ["http://mlflow:*"]},
        None,
    ),
    "all of them allowed by name": ({}, {"allowedSources": ["hf://org/model", "s3://bucket/*"]}, None),
    "too many pods": (
        {},
        {"limits": {"pods": 1}},
        (Reason.LIMIT_EXCEEDED, "2 pods in all, and a job may have 1"),
    ),
    "too many ranks": (
        {},
        {"limits": {"ranks": 3}},
        (Reason.LIMIT_EXCEEDED, "4 ranks in all, and a job may have 3"),
    ),
    "too many CPUs": (
        {},
        {"limits": {"cpus": 11}},
        (Reason.LIMIT_EXCEEDED, "12 CPUs in all, and a job may have 11"),
    ),
    "too much memory": (
        {},
        {"limits": {"memory": "4095Mi"}},
        (Reason.LIMIT_EXCEEDED, f"{4 * 2**30} bytes of memory in all, and a job may have {4095 * 2**20}"),
    ),
    "a pod whose ranks are settled there counts as one": (
        {"topology": {"pods": 2, "ranksPerPod": "auto", "cpusPerRank": 6, "memoryPerRank": "2Gi"}},
        {"limits": {"pods": 2, "ranks": 2, "cpus": 12, "memory": "4Gi"}},
        None,
    ),
    "too many CPUs of pods whose ranks are settled there": (
        {"topology": {"pods": 2, "ranksPerPod": "auto", "cpusPerRank": 7, "memoryPerRank": "2Gi"}},
        {"limits": {"cpus": 12}},
        (Reason.LIMIT_EXCEEDED, "14 CPUs in all, and a job may have 12"),
    ),
    "a workspace that is not allowed": (
        {"workspace": "pvc://payroll/x"},
        {"allowed": {"workspaces": ["pvc://team-*"]}},
        (Reason.SOURCE_NOT_ALLOWED, "spec.workspace pvc://payroll/x"),
    ),
    "a priority class that is not allowed": (
        {"scheduling": {"priorityClassName": "urgent"}},
        {"allowed": {"priorityClasses": ["batch-*"]}},
        (
            Reason.SCHEDULING_NOT_ALLOWED,
            "spec.scheduling.priorityClassName urgent is not allowed here; allowed: batch-*",
        ),
    ),
    "a priority class that is the default": (
        {"scheduling": {"priorityClassName": "team"}},
        {"allowed": {"priorityClasses": []}, "defaults": {"priorityClassName": "team"}},
        None,
    ),
    "none is no class": ({}, {"allowed": {"priorityClasses": [], "queues": []}}, None),
    "a queue that is not allowed": (
        {"scheduling": {"queueName": "others"}},
        {"allowed": {"queues": ["team-*"]}},
        (Reason.SCHEDULING_NOT_ALLOWED, "spec.scheduling.queueName others"),
    ),
    "every taint tolerated": (
        {"scheduling": {"tolerations": [{"operator": "Exists"}]}},
        {"allowed": {"tolerations": ["example.org/*"]}},
        (Reason.SCHEDULING_NOT_ALLOWED, "spec.scheduling.tolerations of every taint"),
    ),
    "the control plane's taint tolerated": (
        {
            "scheduling": {
                "tolerations": [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}]
            }
        },
        {"allowed": {"tolerations": ["example.org/*"]}},
        (Reason.SCHEDULING_NOT_ALLOWED, "spec.scheduling.tolerations node-role.kubernetes.io/control-plane"),
    ),
    "a taint that may be tolerated": (
        {"scheduling": {"tolerations": [{"key": "example.org/cpu", "operator": "Exists"}]}},
        {"allowed": {"tolerations": ["example.org/*"]}},
        None,
    ),
    "a node label that is not allowed": (
        {"scheduling": {"nodeSelector": {"pool": "gold"}}},
        {"allowed": {"nodeLabels": ["topology.kubernetes.io/*"]}},
        (Reason.SCHEDULING_NOT_ALLOWED, "spec.scheduling.nodeSelector pool"),
    ),
    "another pool than the administrator's": (
        {"scheduling": {"nodeSelector": {"pool": "gold"}}},
        {"defaults": {"nodeSelector": {"pool": "cpu"}}},
        (
            Reason.SCHEDULING_NOT_ALLOWED,
            "pool=gold is not allowed here, where jobs run on nodes with pool=cpu",
        ),
    ),
    "nothing that moves, where digests are demanded": (
        {
            "image": f"a/b@sha256:{'0' * 64}",
            "model": {"source": "hf://org/model", "revision": "c0ffee" * 6 + "c0ff"},
            "dataset": {"source": "pvc://data/docs"},
        },
        PINNED,
        None,
    ),
    "an image by its tag, where digests are demanded": (
        {"image": "a/b:1"},
        PINNED,
        (Reason.IMAGE_NOT_ALLOWED, "spec.image a/b:1 has no digest, which is demanded here: name it as rep"),
    ),
    "a digest that is none": (
        {"image": "a/b@sha256:0"},
        PINNED,
        (Reason.IMAGE_NOT_ALLOWED, "spec.image a/b@sha256:0 has no digest"),
    ),
    "a branch, where digests are demanded": (
        {"model": {"source": "hf://org/model"}},
        PINNED,
        (
            Reason.SOURCE_NOT_ALLOWED,
            "spec.model.revision main is no commit, which is demanded here: name the 40",
        ),
    ),
    "one of several sources by its tag, where digests are demanded": (
        {
            "model": {"source": "pvc://data/model"},
            "dataset": {
                "source": None,
                "sources": [{"source": "pvc://data/a"}, {"source": "hf://datasets/org/b", "revision": "v1"}],
            },
        },
        PINNED,
        (Reason.SOURCE_NOT_ALLOWED, "spec.dataset.sources[1].revision v1 is no commit"),
    ),
    "an adapter that is gone on from by its branch, where digests are demanded": (
        {"model": {"source": "pvc://data/model"}, "adapter": {"initialAdapter": "hf://org/adapter"}},
        PINNED,
        (Reason.SOURCE_NOT_ALLOWED, "spec.adapter.initialAdapterRevision main is no commit"),
    ),
    "just as much as is allowed": (
        {},
        {"limits": {"pods": 2, "ranks": 4, "cpus": 12, "memory": "4Gi"}},
        None,
    ),
}


@pytest.mark.parametrize(("fields", "given_settings", "said"), REFUSALS.values(), ids=REFUSALS)
def test_which_jobs_may_start(
    fields: dict[str, Any],
    given_settings: dict[str, Any],
    said: tuple[Reason, str] | None,
    settings: Callable[..., Settings],
) -> None:
    """A job whose image, sources, destination and size are allowed may start; else it is told the field, the
    value and what is allowed."""
    found = policy_violation(job(**fields), settings(**given_settings))

    assert (found is None) == (said is None)
    if found is not None and said is not None:
        assert found[0] == said[0]
        assert said[1] in found[1]


def test_the_label_of_a_queue_is_a_queue(settings: Callable[..., Settings]) -> None:
    """A queue that the job's label names is looked at like one in its spec."""
    labelled = a_job(metadata={"labels": {names.QUEUE_LABEL: "others"}})

    assert policy_violation(labelled, settings(allowed={"queues": ["team-*"]})) is not None


def test_a_workloads_priority_is_a_priority(settings: Callable[..., Settings]) -> None:
    """Kueue's own classes are bounded like the scheduler's."""
    labelled = a_job(metadata={"labels": {names.WORKLOAD_PRIORITY_LABEL: "urgent"}})

    assert policy_violation(labelled, settings(allowed={"priorityClasses": ["batch-*"]})) is not None
