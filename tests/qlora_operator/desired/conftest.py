"""Random jobs and settings, and what Kubernetes' own types say of a rendering."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from kubernetes.client import models

from builders import a_job
from qlora_contract.remote import is_remote
from qlora_contract.run_config import ISA_TIERS, ResolvedRevisions
from qlora_operator.api import names
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.settings import Settings


@pytest.fixture(scope="session")
def settings() -> Callable[..., Settings]:
    """A maker of settings."""
    return lambda **fields: Settings.model_validate({"trainerImage": "registry.example/trainer:1", **fields})


# --- random jobs

names_of_jobs = st.from_regex(rf"\A{names.JOB_NAME_PATTERN[1:-1]}\Z").filter(names.is_job_name)
words = st.from_regex(r"\A[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
claims = st.sampled_from(["team", "data.v1"]) | st.from_regex(r"\A[a-z0-9]([-a-z0-9.]{0,200}[a-z0-9])?\Z")
segments = st.text(
    st.characters(min_codepoint=32, exclude_characters="/\x7f", codec="utf-8"), min_size=1, max_size=20
).filter(lambda segment: segment != "..")
uris = st.builds(
    lambda claim, path: "/".join([f"pvc://{claim}", *path]), claims, st.lists(segments, max_size=4)
)
hub_names = st.from_regex(r"\A[A-Za-z0-9]([-A-Za-z0-9._]{0,20}[A-Za-z0-9])?\Z")
buckets = st.from_regex(r"\A[a-z0-9][-a-z0-9.]{1,61}[a-z0-9]\Z")
s3_uris = st.builds(
    lambda bucket, path: "/".join([f"s3://{bucket}", *path]), buckets, st.lists(segments, max_size=4)
)
hub_models = st.builds("hf://{}/{}".format, hub_names, hub_names)
hub_datasets = st.builds(
    lambda org, name, path: "/".join([f"hf://datasets/{org}/{name}", *path]),
    hub_names,
    hub_names,
    st.lists(segments, max_size=3),
)
label_keys = st.from_regex(r"\A([a-z]{1,9}[.]example/)?[A-Za-z]([-A-Za-z0-9_.]{0,20}[A-Za-z0-9])?\Z")
label_values = st.from_regex(r"\A[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?\Z")
tolerations = st.fixed_dictionaries(
    {"key": label_keys, "effect": st.just("NoExecute")},
    optional={"value": label_values, "tolerationSeconds": st.integers(0, 9)},
) | st.just({"operator": "Exists"})

specs = st.fixed_dictionaries(
    {
        "workspace": uris,
        "model": st.builds(lambda uri: {"source": uri}, uris)
        | st.fixed_dictionaries({"source": s3_uris}, optional={"credentialsSecret": words})
        | st.fixed_dictionaries(
            {"source": hub_models},
            optional={"revision": st.sampled_from(["v1.5", "pr/7"]), "credentialsSecret": words},
        ),
        "dataset": st.fixed_dictionaries(
            {"source": uris},
            optional={"evalFraction": st.floats(0, 0.5), "format": st.sampled_from(["auto", "chat"])},
        )
        | st.fixed_dictionaries({"source": s3_uris | hub_datasets}, optional={"credentialsSecret": words}),
        "training": st.fixed_dictionaries(
            {"maxSteps": st.integers(1, 10**8)},
            optional={
                "learningRate": st.floats(1e-9, 1),
                "seed": st.integers(0, 2**32 - 1),
                "packing": st.booleans(),
                "computeDtype": st.sampled_from(["auto", "bf16", "fp32"]),
            },
        ),
        "topology": st.fixed_dictionaries(
            {
                "memoryPerRank": st.builds("{}{}".format, st.integers(1, 64), st.sampled_from(["Gi", "G"]))
                | st.sampled_from(["64Mi", "64Ti", "1.5Gi", "100000000"])
            },
            optional={
                "pods": st.integers(1, 512),
                "ranksPerPod": st.integers(1, 2),
                "cpusPerRank": st.integers(1, 1024),
                "pinning": st.sampled_from(["strict", "best-effort"]),
            },
        ),
    },
    optional={
        "adapter": st.builds(
            lambda modules: {"targetModules": modules}, st.lists(st.text(min_size=1), min_size=1, max_size=3)
        ),
        "scheduling": st.fixed_dictionaries(
            {},
            optional={
                "nodeSelector": st.dictionaries(label_keys, label_values, max_size=3),
                "tolerations": st.lists(tolerations, max_size=3),
                "priorityClassName": words,
                "queueName": words,
            },
        ),
        "output": st.fixed_dictionaries(
            {"destination": s3_uris | hub_models}, optional={"credentialsSecret": words}
        ),
        "terminationGracePeriodSeconds": st.integers(1, 86_400),
    },
)
random_transfers = st.fixed_dictionaries(
    {},
    optional={
        "serviceAccountName": words,
        "cpu": st.sampled_from(["250m", "2"]),
        "memory": st.sampled_from(["512Mi", "8Gi"]),
        "httpProxy": st.just("http://proxy.example:3128"),
        "httpsProxy": st.just("http://proxy.example:3129"),
        "noProxy": st.just("s3.example,10.0.0.0/8"),
        "caBundleConfigMap": words,
        "proxySecret": words,
        "hubEndpoint": st.just("https://hub.example"),
        "s3Endpoint": st.just("https://s3.example"),
        "s3Region": st.just("eu-1"),
    },
)
random_settings = st.builds(
    Settings.model_validate,
    st.fixed_dictionaries(
        {"trainerImage": st.just("registry.example/trainer:1")},
        optional={
            "imagePullPolicy": st.sampled_from(["Always", "IfNotPresent", "Never"]),
            "imagePullSecrets": st.lists(words, max_size=2),
            "runAsUser": st.none() | st.integers(1, 2**31 - 1),
            "runAsGroup": st.none() | st.integers(1, 2**31 - 1),
            "fsGroup": st.none() | st.integers(1, 2**31 - 1),
            "schedulerName": words,
            "hostUsers": st.booleans(),
            "podLabels": st.dictionaries(label_keys, label_values, max_size=2),
            "podAnnotations": st.dictionaries(label_keys, st.text(max_size=20), max_size=2),
            "transfer": random_transfers,
        },
    ),
)


def _job(name: str, namespace: str | None, spec: dict[str, Any]) -> QLoRAJob:
    return a_job(name, metadata={"namespace": namespace}, **spec)


def fetched(job: QLoRAJob) -> ResolvedRevisions:
    """Revisions of the job's remote sources."""
    model, dataset = job.spec.model.source, job.spec.dataset.source
    return ResolvedRevisions(
        model="c" * 40 if is_remote(model) else None, dataset="d" * 64 if is_remote(dataset) else None
    )


@pytest.fixture(scope="session")
def attempts() -> SearchStrategy[dict[str, Any]]:
    """Random arguments of attempt_job, all valid; the job under "job"."""
    return st.fixed_dictionaries(
        {
            "job": st.builds(_job, names_of_jobs, st.none() | words, specs),
            "uid": st.uuids().map(str),
            "attempt": st.integers(0, 999_999),
            "isa": st.sampled_from(ISA_TIERS),
            "image": st.just("registry.example/trainer:1"),
            "settings": random_settings,
            "stage": st.sampled_from(["fetch", "train", "publish"]),
        }
    ).map(lambda attempt: attempt | {"fetched": fetched(attempt["job"])})


# --- Kubernetes' types


@pytest.fixture(scope="session")
def misfits() -> Callable[[Any, str], list[str]]:
    """misfits(object, "V1Job"): paths of the fields that the type does not have, or whose type is another."""
    return lambda value, kind: list(_misfits(value, kind, kind))


def _misfits(value: Any, kind: str, path: str) -> Iterator[str]:
    container = re.fullmatch(r"(List|Dict)\[(?:str, )?(.+)\]", kind)
    if container and isinstance(value, {"List": list, "Dict": dict}[container[1]]):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _misfits(item, container[2], f"{path}[{key}]")
    elif hasattr(models, kind) and isinstance(value, dict):
        model = getattr(models, kind)
        fields = {alias: model.openapi_types[field] for field, alias in model.attribute_map.items()}
        for key, item in value.items():
            if key in fields:
                yield from _misfits(item, fields[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif kind != "object" and type(value).__name__ != kind:
        yield f"{path}: {value!r}"
