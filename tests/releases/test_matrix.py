"""Old and new: definition, operator and trainer, on jobs in every phase. None of them fails a job of the other.

tests/apiserver/test_upgrade.py does the same with operators as processes.
"""

import copy
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from builders import job_manifest
from qlora_operator.api.loader import parse_api_object
from qlora_operator.api.run_config import cannot_write, to_run_config
from qlora_operator.api.schema import Schema, custom_resource_definition

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
TIME = "2026-01-31T11:00:00Z"
Document = Callable[..., dict[str, Any]]
SPEC = job_manifest(output={"destination": "s3://bucket/adapters"}, topology={"pods": 2})["spec"]
ADDED = {"notifications": {"onEnd": []}}
"""What an API server with a newer definition puts into every job."""


def condition(kind: str, reason: str, *, holds: bool = True) -> dict[str, Any]:
    """A condition of a status."""
    return {
        "type": kind,
        "status": str(holds),
        "reason": reason,
        "message": "because",
        "lastTransitionTime": TIME,
        "observedGeneration": 1,
    }


def attempt(reason: str | None = None, *, ended: bool = False, stage: str = "train") -> dict[str, Any]:
    """The first attempt of a job."""
    end = {"end": TIME, "message": "because"} if ended else {}
    why = {} if reason is None else {"reason": reason}
    return {"attempt": 0, "stage": stage, "start": TIME, "jobUid": "gang-0", **why, **end}


STARTED = condition("Initialized", "Started")
PHASES: dict[str, dict[str, Any]] = {
    "Pending": {"conditions": [condition("Initialized", "NoMatchingNodes", holds=False)]},
    "Running": {
        "conditions": [STARTED, condition("Running", "Training")],
        "attempt": 0,
        "attempts": [attempt()],
    },
    "Restarting": {
        "conditions": [
            STARTED,
            condition("Running", "Starting", holds=False),
            condition("Restarting", "Drained"),
        ],
        "attempt": 0,
        "attempts": [attempt("Drained", ended=True)],
        "restarts": {"user": 0, "infrastructure": 1},
    },
    "Suspended": {
        "conditions": [
            STARTED,
            condition("Suspended", "Suspended"),
            condition("Running", "Suspended", holds=False),
        ],
        "attempt": 0,
        "attempts": [attempt("Suspended", ended=True)],
    },
    "Publishing": {
        "conditions": [STARTED, condition("Running", "Trained", holds=False)],
        "attempt": 0,
        "attempts": [attempt("Trained", ended=True)],
        "adapter": {"uri": "pvc://team/work/jobs/demo/adapter"},
    },
    "Succeeded": {
        "conditions": [condition("Complete", "Succeeded"), condition("Finished", "Succeeded")],
        "attempt": 0,
        "attempts": [attempt("Succeeded", ended=True)],
        "completionTime": TIME,
    },
}
"""Phase -> the status of a job that is in it."""
phases = pytest.mark.parametrize("phase", PHASES)


@pytest.fixture
def in_phase(document: Document) -> Callable[..., dict[str, Any]]:
    """in_phase(phase, version, **spec): a job whose first attempt had this version of the RunConfig."""

    def make(phase: str, version: int, **spec: Any) -> dict[str, Any]:
        status = copy.deepcopy(PHASES[phase]) | {"phase": phase, "startTime": TIME}
        if status.get("attempt") is not None:
            status["placement"] = {"isa": "avx2", "dtype": "fp32", "nodes": ["n"]}
            status["provenance"] = {
                "image": "x",
                "runConfigVersion": version,
                "seed": 0,
                "configHash": "5eed",
            }
        return document({**SPEC, "suspend": phase == "Suspended", **spec}, status)

    return make


@phases
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("added", [{}, ADDED], ids=["its own definition", "a newer definition"])
def test_this_operator_goes_on_with_jobs_of_either_release(
    phase: str, version: int, added: dict[str, Any], in_phase: Callable[..., dict[str, Any]]
) -> None:
    """It reads the job, keeps what its status says, and writes the RunConfig that the job's image reads."""
    raw = in_phase(phase, version, **added)
    job, ignored = parse_api_object(raw)

    assert ignored == [f"spec.{name}" for name in added]
    assert job.status is not None
    kept = job.status.model_dump(by_alias=True, mode="json", exclude_unset=True)
    assert kept == raw["status"]
    assert cannot_write(job) is None
    begun = job.status.attempt is not None
    assert to_run_config(job, uid="u", attempt=1, isa="avx2").version == (version if begun else 1)


def seen_by(old: SimpleNamespace, phase: str) -> Any:
    """What an operator of release 0.1.0 observes of such a job."""
    running = phase == "Running"
    child = old.observation.Gang(
        name="demo-a0",
        uid="gang-0",
        attempt=0,
        ours=True,
        parallelism=2,
        ready=2 if running else 0,
        failed=not running,
    )
    pods = tuple(
        old.observation.Pod(
            name=f"demo-a0-{index}",
            uid=f"p{index}",
            attempt=0,
            index=index,
            phase="Running",
            owner_uid="gang-0",
        )
        for index in range(2)
    )
    return old.observation.Observation(
        gangs=() if phase == "Pending" else (child,),
        pods=pods if running else (),
        feasible=old.observation.Feasible(("avx2",)),
        image="x",
    )


@phases
@pytest.mark.parametrize("version", [1, 2])
def test_the_old_operator_fails_no_job_of_this_release(
    phase: str, version: int, old: SimpleNamespace, in_phase: Callable[..., dict[str, Any]]
) -> None:
    """After a rollback it ignores newer fields of a status, and a job of a newer RunConfig waits for its operator."""
    raw = in_phase(phase, version)
    raw["status"] |= {"later": {"a": 1}}
    raw["status"].setdefault("placement", {})["later"] = 1
    job = old.types.QLoRAJob.model_validate(raw)
    decision = old.decision.decide(job, seen_by(old, phase), NOW)

    assert (decision.status.phase == "Succeeded") == (phase == "Succeeded")
    assert decision.status.phase != "Failed"
    starts = [action for action in decision.actions if type(action).__name__ == "StartAttempt"]
    waits = version == 2 and phase in ("Restarting", "Publishing")
    assert len(starts) == (
        1 if phase == "Pending" or (phase in ("Restarting", "Publishing") and version == 1) else 0
    )
    if waits:
        assert "version 2 of the RunConfig" in decision.status.message
        assert [each.reason for each in decision.status.conditions if each.type == "Initialized"] == [
            "InvalidSpec"
        ]


@phases
def test_the_old_operator_fails_no_job_under_a_newer_definition(
    phase: str, old: SimpleNamespace, in_phase: Callable[..., dict[str, Any]]
) -> None:
    """It cannot read a spec with fields that it does not know: it says so, and leaves the job's history alone."""
    raw = in_phase(phase, 2, **ADDED)
    with pytest.raises(ValidationError, match="notifications"):
        old.types.QLoRAJob.model_validate(raw)
    status = old.unreadable.unreadable(raw, "spec.notifications no such field", NOW)

    assert status is not None
    assert status.phase != "Failed"
    assert status.phase == "Succeeded" or phase != "Succeeded"
    assert [each.attempt for each in status.attempts] == [
        each["attempt"] for each in raw["status"].get("attempts", [])
    ]


# --- the definition


def stricter(old: Schema, new: Schema, path: str) -> Iterator[str]:
    """Where a schema refuses, or does not have, what an older one accepted."""
    for name, node in old.get("properties", {}).items():
        if name not in new.get("properties", {}):
            yield f"{path}.{name} is gone"
        else:
            yield from stricter(node, new["properties"][name], f"{path}.{name}")
    for part in ("items", "additionalProperties"):
        if part in old:
            yield from stricter(old[part], new[part], f"{path}[]")
    yield from (
        f"{path}.{name} is required" for name in {*new.get("required", ())} - {*old.get("required", ())}
    )
    yield from (f"{path} may not be {value}" for value in {*old.get("enum", ())} - {*new.get("enum", ())})
    for bound, tighter in (("min", lambda a, b: b > a), ("max", lambda a, b: b < a)):
        for unit in ("imum", "Length", "Items", "Properties"):
            limit = f"{bound}{unit}"
            if limit in new and (limit not in old or tighter(old[limit], new[limit])):
                yield f"{path} has the bound {limit} {new[limit]}"
    for same in (
        "type",
        "pattern",
        "default",
        "format",
        "x-kubernetes-list-type",
        "x-kubernetes-int-or-string",
    ):
        if old.get(same) != new.get(same) and not (same == "pattern" and widened(old, new)):
            yield f"{path} has another {same}"


def widened(old: Schema, new: Schema) -> bool:
    """Whether a pattern is an older one with more alternatives: `^(a|b)$` became `^(a|b|c)$`."""
    before, after = str(old.get("pattern", "")), str(new.get("pattern", ""))
    return before.startswith("^(") and before.endswith(")$") and after.startswith(f"{before[:-2]}|")


def schema_of(crd: dict[str, Any]) -> Schema:
    """The schema of v1alpha1."""
    (version,) = [each for each in crd["spec"]["versions"] if each["name"] == "v1alpha1"]
    schema = version["schema"]["openAPIV3Schema"]
    assert isinstance(schema, dict)
    return schema


def test_every_job_that_is_stored_stays_valid(old_crd: dict[str, Any]) -> None:
    """The definition accepts what the one before accepted, and gives the same defaults."""
    assert list(stricter(schema_of(old_crd), schema_of(custom_resource_definition()), "job")) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda spec: spec["properties"].pop("isa"), "job.spec.isa is gone"),
        (lambda spec: spec["required"].append("image"), "job.spec.image is required"),
        (lambda spec: spec["properties"]["backoffLimit"].update(maximum=9), "has the bound maximum 9"),
        (lambda spec: spec["properties"]["backoffLimit"].update(default=9), "has another default"),
        (lambda spec: spec["properties"]["image"].update(pattern="^a$"), "has another pattern"),
        (
            lambda spec: spec["properties"]["output"]["properties"]["destination"].update(
                pattern="^(hf://a|s3://b)$"
            ),
            "has another pattern",
        ),
        (
            lambda spec: spec["properties"]["isa"]["properties"]["allowed"]["items"]["enum"].remove("avx2"),
            "may not be avx2",
        ),
    ],
    ids=["removed", "required", "bound", "default", "pattern", "alternatives", "value"],
)
def test_a_stricter_definition_is_noticed(
    change: Callable[[Schema], object], fault: str, old_crd: dict[str, Any]
) -> None:
    """The comparison above sees what would make a stored job invalid, or mean another thing."""
    changed = copy.deepcopy(old_crd)
    change(schema_of(changed)["properties"]["spec"])

    (found,) = stricter(schema_of(old_crd), schema_of(changed), "job")
    assert fault in found


def rules_of(crd: dict[str, Any]) -> set[str]:
    """The rules of a definition, wherever they stand."""

    def within(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (rule["rule"] for rule in node.get("x-kubernetes-validations", ()))
            for value in node.values():
                yield from within(value)
        elif isinstance(node, list):
            for item in node:
                yield from within(item)

    return set(within(schema_of(crd)))


HOLD_FOR_STORED_JOBS = {
    "self.workspace.contains('://')": "the patterns of those fields ask for more than that",
    "self.model.source.contains('://')": "likewise",
    "has(self.source) != has(self.sources)": "each of them has a source, which was required, and no list",
    "!has(self.sources) ||": "none has a list",
    "!has(self.dataset.source) ||": "the rule was there; now it has an exception",
    "!has(self.model.credentialsSecret) ||": "a source was of a claim, the Hub or a bucket: all that is not of a claim",
    "!has(self.dataset.credentialsSecret) ||": "likewise",
    "!has(self.credentialsSecret) || self.source": "is of an item of a list, which none has",
    "!has(self.revision) ||": "likewise",
    "self.dataset.revision == 'main' || !has(self.dataset.source) ||": "the rule was there, without the exception",
    "!(self.source + '/')": "likewise",
    "!has(self.minPods) ||": "none has that field",
    "!has(self.adapter.initialAdapter) ||": "none has that field",
    "!has(self.keepBest) ||": "none has that field",
    "!has(self.earlyStoppingPatience) ||": "none has that field",
    "has(self.end) != has(self.durationSeconds)": "is of a window of spec.schedule, which none has",
    "self.start.matches(": "likewise",
    "!has(self.end) ||": "likewise",
    "!has(self.method) || self.method == 'lora' ||": "lora was the only method",
    "has(self.numVirtualTokens) ==": "lora was the only method, and none has that field",
    "!has(self.promptInit) ||": "none has that field",
    "has(self.promptInitText) ==": "none has that field, nor promptInit",
    "(has(self.method) && self.method == 'prefix-tuning') || !has(self.prefixProjection)": "none has that field",
    "!has(self.encoderHiddenSize) ||": "none has that field",
    "!has(self.initialAdapter) ||": "none has that field",
    "!has(self.initialAdapterRevision) ||": "none has that field",
    "!has(self.initialAdapterCredentialsSecret) ||": "none has that field",
    "!has(self.adapter.numVirtualTokens) ||": "none has that field",
    "self.adapter.method == 'lora' ||": "lora was the only method",
}
"""How a rule begins that came after release 0.1.0: why every job that is stored keeps to it."""


def test_no_rule_is_added_that_stored_jobs_may_break(old_crd: dict[str, Any]) -> None:
    """It would make every later write to such a job fail. What reads random jobs of release 0.1.0 is in test_forms."""
    added = rules_of(custom_resource_definition()) - rules_of(old_crd)
    unexplained = [rule for rule in added if not rule.startswith(tuple(HOLD_FOR_STORED_JOBS))]
    unused = [start for start in HOLD_FOR_STORED_JOBS if not any(rule.startswith(start) for rule in added)]

    assert (unexplained, unused) == ([], [])
