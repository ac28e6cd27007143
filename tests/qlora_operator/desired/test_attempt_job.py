"""The Job of one attempt."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from builders import environment_of
from qlora_contract.exit_codes import COLLATERAL, INFRASTRUCTURE, PERMANENT, ExitCode
from qlora_contract.run_config import ResolvedRevisions, RunConfig, RunStage
from qlora_operator.api import names
from qlora_operator.api.loader import load_jobs
from qlora_operator.api.v1alpha1 import QLoRAJob, topology_hash
from qlora_operator.desired.attempt_job import attempt_job, failure_rules
from qlora_operator.desired.network import network_policy
from qlora_operator.desired.service import ranks_service
from qlora_operator.settings import Settings

DEMO = Path(__file__).parents[3] / "manifests/samples/two-nodes.yaml"
GOLDEN = Path(__file__).parent / "golden/demo.yaml"
LABEL_VALUE = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"
DNS_LABEL = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"


# --- the meaning of failures


def matching_rule(code: int) -> int | None:
    """Index of the rule that a Job controller picks for a container that ended with a code other than 0."""
    for index, rule in enumerate(failure_rules()):
        values = rule.get("onExitCodes", {"values": []})["values"]
        operator = rule.get("onExitCodes", {"operator": "In"})["operator"]
        if (code in values) == (operator == "In"):
            return index
    return None


CODES = {
    **{code.name: (int(code), 1) for code in PERMANENT},
    **{code.name: (int(code), 2) for code in INFRASTRUCTURE},
    **{code.name: (int(code), None) for code in COLLATERAL},
    "UNEXPECTED": (ExitCode.UNEXPECTED, 3),
    "RENDEZVOUS_FAILED": (ExitCode.RENDEZVOUS_FAILED, 3),
    "STALLED": (ExitCode.STALLED, 3),
    "TRANSFER_FAILED": (ExitCode.TRANSFER_FAILED, 3),
    "ADAPTERS_DIFFER": (ExitCode.ADAPTERS_DIFFER, 3),
    "killed": (137, 3),
    "terminated before the launcher listened": (143, None),
    "no such command": (127, 3),
}


def test_every_code_of_a_failure_has_a_case() -> None:
    """A code that the contract gains must be given a meaning here."""
    assert {code.name for code in ExitCode} - set(CODES) == {"DONE"}


@pytest.mark.parametrize(("code", "rule"), CODES.values(), ids=CODES)
def test_a_failed_pod_names_the_reason_unless_another_pods_end_was_the_cause(
    code: int, rule: int | None
) -> None:
    """Permanent codes, then infrastructure, then the rest; what is only a consequence matches no rule."""
    assert matching_rule(code) == rule


def test_a_disrupted_pod_is_known_before_its_code() -> None:
    """A pod that was evicted, preempted or drained is the cluster's doing, whatever code it ended with."""
    rules = failure_rules()

    assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert {rule["action"] for rule in rules} == {"FailJob"}


def test_the_api_server_accepts_the_rules(
    a_job: Callable[..., QLoRAJob], settings: Callable[..., Settings]
) -> None:
    """Codes are in order, each once, with no 0 for In, and of a container that the pods have."""
    job = attempt_job(a_job(), uid="u", attempt=0, isa="avx2", image="a", settings=settings())
    containers = [container["name"] for container in job["spec"]["template"]["spec"]["containers"]]

    on_codes = [rule["onExitCodes"] for rule in failure_rules() if "onExitCodes" in rule]
    assert len(on_codes) == 3
    for rule in on_codes:
        assert rule["values"] == sorted(set(rule["values"]))
        assert 1 <= len(rule["values"]) <= 255
        assert rule["containerName"] in containers
        assert rule["operator"] == "NotIn" or 0 not in rule["values"]


# --- the Job


@hypothesis.settings(deadline=None)
@given(data=st.data())
def test_any_job_renders_to_what_kubernetes_knows(
    attempts: SearchStrategy[dict[str, Any]], misfits: Callable[[Any, str], list[str]], data: st.DataObject
) -> None:
    """Every field exists in Kubernetes' types and has their type; equal input gives equal bytes."""
    attempt = data.draw(attempts)
    job = attempt_job(**attempt)

    assert misfits(job, "V1Job") == []
    assert json.dumps(attempt_job(**attempt)) == json.dumps(job)
    assert yaml.safe_load(yaml.safe_dump(job)) == job


@hypothesis.settings(deadline=None)
@given(data=st.data())
def test_any_job_renders_to_valid_names(
    attempts: SearchStrategy[dict[str, Any]], data: st.DataObject
) -> None:
    """Names, subdomain, host names and labels are what Kubernetes and DNS accept, however long the job's is."""
    attempt = data.draw(attempts)
    job = attempt_job(**attempt)
    template = job["spec"]["template"]
    last = names.pod_host_name(
        attempt["job"].metadata.name, attempt["attempt"], job["spec"]["completions"] - 1
    )
    subdomain = template["spec"].get("subdomain", "none")
    of_dns = [job["metadata"]["name"], last, subdomain, job["metadata"]["namespace"]]

    assert last.startswith(f"{job['metadata']['name']}-")
    assert [name for name in of_dns[:3] if not re.fullmatch(DNS_LABEL, name)] == []
    for metadata in (job["metadata"], template["metadata"]):
        assert [value for value in metadata["labels"].values() if not re.fullmatch(LABEL_VALUE, value)] == []


@pytest.mark.parametrize("pods", [1, 7])
def test_the_gang_lives_and_dies_together(
    pods: int, a_job: Callable[..., QLoRAJob], settings: Callable[..., Settings]
) -> None:
    """All pods at once, none replaced, and no limit but those that the operator itself counts."""
    job = a_job(topology={"pods": pods}, backoffLimit=3, ttlSecondsAfterFinished=9, activeDeadlineSeconds=9)
    spec = attempt_job(job, uid="u", attempt=0, isa="avx2", image="a", settings=settings())["spec"]

    rest = {key: value for key, value in spec.items() if key not in ("template", "podFailurePolicy")}
    assert rest == {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
    }


@pytest.mark.parametrize(("stage", "role"), [("fetch", "fetcher"), ("publish", "publisher")])
def test_a_transfer_is_a_gang_of_one(
    stage: RunStage, role: str, a_job: Callable[..., QLoRAJob], settings: Callable[..., Settings]
) -> None:
    """However many pods train, one transfers, under the same rules of failure; its labels tell what it does."""
    job = a_job(topology={"pods": 7}, model={"source": "hf://org/model"})
    known = ResolvedRevisions(model="c" * 40)
    attempt = attempt_job(
        job, uid="u", attempt=2, isa="avx2", image="a", settings=settings(), stage=stage, fetched=known
    )

    spec, template = attempt["spec"], attempt["spec"]["template"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (1, 1, 0)
    assert spec["podFailurePolicy"] == {"rules": failure_rules()}
    assert attempt["metadata"]["name"] == "small-a2"
    assert {each["labels"][names.ROLE_LABEL] for each in (attempt["metadata"], template["metadata"])} == {
        role
    }
    run = RunConfig.model_validate_json(template["metadata"]["annotations"][names.RUN_CONFIG_ANNOTATION])
    assert (run.stage, run.fetched) == (stage, known)


@pytest.mark.parametrize(
    ("spec", "label"),
    [({"queueName": "team-queue"}, None), ({}, "team-queue"), ({"queueName": "team-queue"}, "another")],
    ids=["in spec", "by Kueue's label", "both"],
)
def test_a_queue_gets_the_job_suspended(
    a_job: Callable[..., QLoRAJob], settings: Callable[..., Settings], spec: dict[str, str], label: str | None
) -> None:
    """With a queue the Job waits for it; its pods do not have the queue's label, or Kueue would count twice."""
    qlora_job = a_job(scheduling=spec)
    if label is not None:
        qlora_job.metadata.labels["kueue.x-k8s.io/queue-name"] = label
    job = attempt_job(
        qlora_job,
        uid="u",
        attempt=0,
        isa="avx2",
        image="a",
        settings=settings(),
    )

    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-queue"
    assert "kueue.x-k8s.io/queue-name" not in job["spec"]["template"]["metadata"]["labels"]


def test_what_kueue_is_told_of_a_job_its_jobs_and_pods_say(
    a_job: Callable[..., QLoRAJob], settings: Callable[..., Settings]
) -> None:
    """Its WorkloadPriorityClass is on the Job, and where its topology is to be close, on the pods."""
    priority, topology = "kueue.x-k8s.io/priority-class", "kueue.x-k8s.io/podset-required-topology"
    qlora_job = a_job(scheduling={"queueName": "q"})
    qlora_job.metadata.labels[priority] = "high"
    qlora_job.metadata.annotations.update({topology: "rack", "other": "note"})

    job = attempt_job(qlora_job, uid="u", attempt=0, isa="avx2", image="a", settings=settings())

    assert job["metadata"]["labels"][priority] == "high"
    annotations = job["spec"]["template"]["metadata"]["annotations"]
    assert annotations[topology] == "rack"
    assert "other" not in annotations


@pytest.mark.parametrize(
    ("pods", "host"), [(None, "small-a0-0.small-ranks"), (2, "small-a0-0.small-ranks"), (1, "127.0.0.1")]
)
def test_an_attempt_that_makes_do_with_fewer_pods_is_a_gang_of_these(
    a_job: Callable[..., QLoRAJob], settings: Callable[..., Settings], pods: int | None, host: str
) -> None:
    """For all that its ranks know there are no others; only the hash is that of what the job asks for, since the job
    was not changed."""
    asked = a_job(topology={"pods": 4, "minPods": 1})
    job = attempt_job(asked, uid="u", attempt=0, isa="avx2", image="a", settings=settings(), pods=pods)
    spec = job["spec"]
    template = spec["template"]
    run = RunConfig.model_validate_json(template["metadata"]["annotations"][names.RUN_CONFIG_ANNOTATION])
    environment = environment_of(template)

    assert (spec["completions"], spec["parallelism"]) == (pods or 4, pods or 4)
    assert (run.layout.pods, run.layout.world_size) == (pods or 4, pods or 4)
    assert environment["MASTER_ADDR"] == host
    assert job["metadata"]["annotations"][names.TOPOLOGY_HASH_ANNOTATION] == topology_hash(asked.spec)


MIN, EQUAL = names.PARTIAL_ADMISSION


@pytest.mark.parametrize(
    ("pods", "workload", "queue", "stage", "parallelism", "least"),
    [
        pytest.param(None, None, "q", "train", 4, "2", id="all, or the least"),
        pytest.param(None, None, None, "train", 4, None, id="no queue"),
        pytest.param(None, None, "q", "fetch", 1, None, id="a transfer"),
        pytest.param(3, None, "q", "train", 3, "2", id="fewer, for want of nodes"),
        pytest.param(2, None, "q", "train", 2, None, id="the least"),
        pytest.param(2, "w", "q", "train", 4, "2", id="those that the queue has let in"),
    ],
)
def test_a_queue_is_told_how_many_pods_will_do(
    a_job: Callable[..., QLoRAJob],
    settings: Callable[..., Settings],
    pods: int | None,
    workload: str | None,
    queue: str | None,
    stage: RunStage,
    parallelism: int,
    least: str | None,
) -> None:
    """The Job is what its Workload was made for, the ranks are those that come."""
    asked = a_job(topology={"pods": 4, "minPods": 2}, scheduling={"queueName": queue} if queue else {})
    job = attempt_job(
        asked, uid="u", attempt=1, isa="avx2", image="a", settings=settings(), pods=pods, stage=stage,
        workload=workload,
    )  # fmt: skip
    annotations, labels = job["metadata"]["annotations"], job["metadata"]["labels"]
    template = job["spec"]["template"]["metadata"]["annotations"]
    run = RunConfig.model_validate_json(template[names.RUN_CONFIG_ANNOTATION])

    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (parallelism, parallelism)
    assert annotations.get(MIN) == least
    assert annotations.get(EQUAL) == (None if least is None else "true")
    assert labels.get(names.PREBUILT_WORKLOAD_LABEL) == workload
    if stage == "train":
        assert run.layout.pods == (pods or 4)


def test_the_containers_of_all_attempts_are_equal(
    a_job: Callable[..., QLoRAJob], settings: Callable[..., Settings]
) -> None:
    """Kueue lets the Job of one take over the Workload of another only then."""
    made = [
        attempt_job(
            a_job(topology={"pods": 4, "minPods": 1}), uid="u", image="a", settings=settings(), **attempt
        )
        for attempt in (
            {"attempt": 0, "isa": "avx2"},
            {"attempt": 7, "isa": "avx512", "pods": 1, "requested": "2026-01-31T12:00:00Z", "avoid": ["n"]},
        )
    ]

    first, second = (job["spec"]["template"]["spec"]["containers"] for job in made)
    assert first == second


@pytest.mark.parametrize("time", [None, "2026-01-31T12:00:00Z"])
def test_a_job_says_how_old_its_checkpoint_is(
    a_job: Callable[..., QLoRAJob], settings: Callable[..., Settings], time: str | None
) -> None:
    """In an annotation, which is absent as long as there is none."""
    job = attempt_job(
        a_job(), uid="u", attempt=1, isa="avx2", image="a", settings=settings(), checkpoint_time=time
    )

    assert job["metadata"]["annotations"].get("qlora.dev/checkpoint-time") == time


def test_the_demo_renders_as_reviewed(settings: Callable[..., Settings]) -> None:
    """All children of the demo's first attempt, as golden/demo.yaml shows them."""
    (job,) = load_jobs(str(DEMO))
    uid = "0f8fad5b-d9cb-469f-a165-70867728950e"
    scraper = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    admins = settings(trainerImage="registry.example/qlora-trainer:0.1.0", scrapers=[scraper])
    rendered = [
        ranks_service(job, uid=uid),
        network_policy(job, uid=uid, settings=admins),
        attempt_job(job, uid=uid, attempt=0, isa="avx512", image=admins.trainer_image, settings=admins),
    ]

    text = yaml.safe_dump_all(rendered, sort_keys=False, width=110)
    assert GOLDEN.read_text() == text
