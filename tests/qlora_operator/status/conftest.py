"""Jobs, Jobs' Jobs and pods as the operator sees them, and a small cluster in memory that plays them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from builders import JOB_UID, a_job, a_pod, an_attempt_job, merged
from qlora_contract.remote import is_remote
from qlora_contract.run_config import IsaTier, ResolvedRevisions, RunStage
from qlora_contract.units import rfc3339
from qlora_operator.api.names import ConditionType
from qlora_operator.api.pod_resources import stage_pods, with_pods
from qlora_operator.api.status import QLoRAJobStatus
from qlora_operator.api.v1alpha1 import QLoRAJob, QLoRAJobSpec, topology_hash
from qlora_operator.status import conditions, stages
from qlora_operator.status.actions import (
    Action,
    Decision,
    DeleteAttemptJob,
    DeletePod,
    DropWorkload,
    KeepWorkload,
    StartAttempt,
)
from qlora_operator.status.decision import decide
from qlora_operator.status.holds import hold
from qlora_operator.status.observation import AttemptJob, Observation, Pod, Read, ReasonMessage
from qlora_operator.status.view import JobView

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
REMOTE_MODEL = {"model": {"source": "hf://org/model"}}
REMOTE_DATA = {"dataset": {"source": "s3://bucket/data.jsonl"}}
DESTINATION = {"output": {"destination": "s3://bucket/adapters"}}
JOURNEYS: dict[str, dict[str, Any]] = {
    "on claims": {},
    "a remote model": REMOTE_MODEL,
    "remote data": REMOTE_DATA,
    "remote sources": {**REMOTE_MODEL, **REMOTE_DATA},
    "a destination": DESTINATION,
    "all of them": {**REMOTE_MODEL, **REMOTE_DATA, **DESTINATION},
}
"""Specs whose jobs go through other stages."""
ORDER: tuple[RunStage, ...] = ("fetch", "train", "publish")


def termination_message(**report: Any) -> str:
    """The termination message of a pod that ended well."""
    return json.dumps({"version": 1, "exitCode": 0, "reason": "DONE", "cause": "done", **report})


def make_job(status: QLoRAJobStatus | dict[str, Any] | None = None, **spec: Any) -> QLoRAJob:
    """A job of two pods."""
    metadata = {"namespace": "team", "uid": JOB_UID, "generation": 1}
    job = a_job(metadata=metadata, **merged({"topology": {"pods": 2}}, spec))
    if status is None:
        return job
    known = status if isinstance(status, QLoRAJobStatus) else QLoRAJobStatus.model_validate(status)
    return job.model_copy(update={"status": known})


def everything(
    jobs: Sequence[AttemptJob], pods: Sequence[Pod] | None, *, tiers: Sequence[IsaTier], **observed: Any
) -> Observation:
    """An observation for which everything was read; with pods=None, neither Jobs nor pods."""
    known = {
        "attempt_jobs": tuple(jobs),
        "jobs_listed": pods is not None,
        "pods": None if pods is None else tuple(pods),
        "lost_nodes": frozenset(),
        "warnings": (),
        "deactivated": "",
        "feasible_tiers": tuple(tiers),
        "infeasible_because": "" if tiers else "0/7 nodes can",
        "image": "registry.example/trainer:1",
    }
    return Observation(**{**known, **observed})  # type: ignore[arg-type]


START = "2026-01-31T11:00:00Z"
REVISIONS = {"modelRevision": "c0ffee", "datasetRevision": "d0d0"}
TRAINED = {
    "progress": {
        "step": 10,
        "totalSteps": 10,
        "percent": 100,
        "loss": 1.5,
        "etaSeconds": 0,
        "stepTime": START,
    },
    "ranks": [{"index": 0, "pod": "job-a1-0", "node": "n"}],
    "checkpoint": {"step": 10},
    "adapter": {"uri": "pvc://team/work/jobs/job/adapter", "evalLoss": 1.5, "baseEvalLoss": 2.5},
    "provenance": REVISIONS,
}


def running_status(**attempt: Any) -> dict[str, Any]:
    """The status of a job whose attempt 0 runs."""
    since = {"message": "", "lastTransitionTime": START, "status": "True"}
    return {
        "attempt": 0,
        "attempts": [{"attempt": 0, "start": START, "jobUid": "job-uid-0", **attempt}],
        "placement": {"isa": "avx512", "worldSize": 2},
        "conditions": [
            {"type": "Initialized", "reason": "Started", **since},
            {"type": "Running", "reason": "Training", **since},
        ],
        "startTime": START,
    }


def starting_status(seconds: float, now: datetime, **status: Any) -> dict[str, Any]:
    """The status of a job whose attempt 0 began so many seconds ago and waits for its ranks."""
    since = rfc3339(now - timedelta(seconds=seconds))
    said = {"message": "", "lastTransitionTime": since}
    return {
        "attempt": 0,
        "attempts": [{"attempt": 0, "start": since, "jobUid": "job-uid-0"}],
        "placement": {"isa": "avx512", "worldSize": 2},
        "conditions": [
            {"type": "Initialized", "reason": "Started", "status": "True", **said},
            {"type": "Running", "reason": "Starting", "status": "False", **said},
        ],
        "startTime": since,
        **status,
    }


def transferring_status(stage: str, **status: Any) -> dict[str, Any]:
    """The status of a job whose attempt 0 fetches, exports or sends, and is up."""
    reason = {"fetch": "Fetching", "export": "Exporting", "publish": "Uploading"}[stage]
    known = running_status(stage=stage) | ({} if stage == "fetch" else TRAINED) | status
    said = {"type": "Running", "reason": reason, "status": "True", "message": "", "lastTransitionTime": START}
    known["conditions"] = [known["conditions"][0], said]
    return known


@dataclass
class Cluster:
    """One QLoRAJob, its Jobs and pods, and an operator that may be behind, or die at any line."""

    job: QLoRAJob
    now: datetime = NOW
    batch_jobs: dict[str, AttemptJob] = field(default_factory=dict)
    pods: dict[str, Pod] = field(default_factory=dict)
    watched: dict[str, AttemptJob] = field(default_factory=dict)
    """The Jobs as the operator's watch has told of them."""
    tiers: tuple[IsaTier, ...] = ("avx512",)
    made: int = 0
    words: dict[str, str] = field(default_factory=dict)
    """What the pods of each Job say when they end well, by the Job's uid."""
    deactivated: str = ""
    """What Kueue says of the Job's Workload while its administrator holds it."""
    workloads: dict[str, tuple[str, bool]] = field(default_factory=dict)
    """Kueue's Workloads by their names: the uid of the Job of each, and whether it outlives that."""
    phases: list[str] = field(default_factory=list)
    """Every phase that the job was in, each time it was another."""

    # --- the operator

    def reconcile(self, *, dies: str = "") -> None:
        """Observe, decide, save and act; `dies`: before "save" or before "act"."""
        seen = Observation(tuple(self.watched.values()), image="registry.example/trainer:1")
        decision = decide(self.job, seen, self.now)
        while decision.reads:
            assert seen.missing(*decision.reads) == decision.reads, "nothing is read twice"
            assert (decision.actions, decision.events, decision.look_at) == ((), (), None)
            seen = self._read(seen, decision.reads)
            decision = decide(self.job, seen, self.now)
        if seen.jobs_listed:
            self.watched |= self.batch_jobs
        self._check(seen, decision)
        if dies == "save":
            return
        self.job = self.job.model_copy(update={"status": decision.status})
        if decision.status.phase and [decision.status.phase] != self.phases[-1:]:
            self.phases.append(decision.status.phase)
        if dies != "act":
            for action in decision.actions:
                self._act(action)

    def watch(self) -> None:
        """The operator's watch catches up."""
        self.watched = dict(self.batch_jobs)

    def _read(self, seen: Observation, reads: frozenset[Read]) -> Observation:
        """What the operator asks the API server for."""
        if Read.JOBS in reads:
            jobs = self.watched | self.batch_jobs
            seen = replace(seen, attempt_jobs=tuple(jobs.values()), jobs_listed=True)
        if Read.PODS in reads:
            seen = replace(seen, pods=tuple(self.pods.values()))
        if Read.FEASIBLE_TIERS in reads:
            why = "" if self.tiers else "0/1 nodes can"
            seen = replace(seen, feasible_tiers=self.tiers, infeasible_because=why)
        if Read.NODE_HEALTH in reads:
            seen = replace(seen, lost_nodes=frozenset())
        if Read.WARNINGS in reads:
            seen = replace(seen, warnings=())
        if Read.WORKLOAD in reads:
            seen = replace(seen, deactivated=self.deactivated, workload=self._workload_of_newest())
        return seen

    def _act(self, action: Action) -> None:
        match action:
            case StartAttempt():
                self._start(action)
            case DeleteAttemptJob(_, uid):
                self.delete_job(uid)
            case KeepWorkload(name, _, uid):
                if name in self.workloads:
                    self.workloads[name] = (uid, True)
            case DropWorkload(name):
                self.workloads.pop(name, None)
            case DeletePod(_, uid):
                self.delete_pod(uid)

    def _workload_of_newest(self) -> str | None:
        status = self.job.status
        if status is None or not status.attempts:
            return None
        mine = {uid for uid, each in self.batch_jobs.items() if each.attempt == status.attempt}
        mine |= {str(status.attempts[-1].job_uid)}
        return next((name for name, (uid, _) in self.workloads.items() if uid in mine), None)

    def _queue(self, uid: str, asked: str | None) -> str | None:
        """Kueue gives a new Job the Workload that it names, or makes one. What it has taken over."""
        taken = asked if asked in self.workloads else None
        self.workloads[taken or f"w-{uid}"] = (uid, taken is not None)
        return taken

    def unclaimed(self) -> list[str]:
        """Workloads that would hold quota for no Job."""
        return [name for name, (uid, _) in self.workloads.items() if uid not in self.batch_jobs]

    def _start(self, action: StartAttempt) -> None:
        number = action.attempt
        assert not self._finished(self.job.status), "a finished job gets no attempt"
        assert hold(self.job.spec, self.now) is None, "a job gets no attempt outside its windows"
        self._check_stage(action)
        if not any(batch_job.attempt == number for batch_job in self.batch_jobs.values()):
            assert not [pod for pod in self.pods.values() if not pod.finished], "two jobs at a time"
            assert not [batch_job for batch_job in self.batch_jobs.values() if not batch_job.finished], (
                "two Jobs at a time"
            )
            self.made += 1
            uid = f"job-uid-{number}-{self.made}"
            queued = self.job.spec.scheduling.queue_name is not None
            self.batch_jobs[uid] = an_attempt_job(
                number,
                uid=uid,
                suspended=queued,
                workload=self._queue(uid, action.workload) if queued else None,
                parallelism=stage_pods(with_pods(self.job.spec.topology, action.pods), action.stage),
                topology_hash=topology_hash(self.job.spec),
            )
            self.words[uid] = self._last_words(action)
        self.watched |= {
            uid: batch_job for uid, batch_job in self.batch_jobs.items() if batch_job.attempt == number
        }

    def _last_words(self, action: StartAttempt) -> str:
        """A branch moves: who fetches without knowing the revision finds another one each time."""
        if action.stage == "publish":
            return termination_message(published_uri=f"s3://bucket/adapters/{action.attempt}")
        if action.stage == "train":
            return termination_message(adapterUri="pvc://team/work/jobs/job/adapter", evalLoss=1.5)
        spec, known = self.job.spec, action.fetched
        found = {
            "model": known.model or f"m{self.made}" if is_remote(spec.model.source) else None,
            "dataset": known.dataset or f"d{self.made}" if is_remote(spec.dataset.source) else None,
        }
        return termination_message(fetched=found)

    # --- what must hold after every decision

    def _check_stage(self, action: StartAttempt) -> None:
        """Nobody trains on what was not fetched, or sends what was not trained."""
        status = self.job.status
        assert status is not None
        assert action.stage == status.attempts[-1].stage
        assert action.fetched == stages.fetched(status)
        if action.stage == "fetch":
            assert not is_complete(action.fetched, self.job.spec), "what is known is not fetched again"
        else:
            assert is_complete(action.fetched, self.job.spec)
        assert (action.stage == "publish") == (status.adapter is not None)
        assert action.stage != "publish" or self.job.spec.output.destination is not None

    def _check_history(self, before: QLoRAJobStatus, after: QLoRAJobStatus) -> None:
        """Stages follow each other, and what is known of a source stays."""
        order = [ORDER.index(attempt.stage) for attempt in after.attempts]
        assert order == sorted(order), "no stage comes again after the next one"
        for reason in ("ResolvedRevisions", "Trained", "Succeeded"):
            assert sum(attempt.reason == reason for attempt in after.attempts) <= 1
        had, has = stages.fetched(before), stages.fetched(after)
        assert had.model in (None, has.model)
        assert had.dataset in (None, has.dataset)

    def _check(self, seen: Observation, decision: Decision) -> None:
        before, after = self.job.status or QLoRAJobStatus(), decision.status
        numbers = [attempt.attempt for attempt in after.attempts]
        assert numbers == sorted(set(numbers)), "attempts are numbered in order"
        assert (after.attempt if numbers else None) == (numbers[-1] if numbers else None)
        assert (after.attempt or 0) - (before.attempt or 0) in (0, 1)
        self._check_history(before, after)
        self._check_budgets(before, after)
        self._check_conditions(before, after)
        saved = self.job.model_copy(update={"status": after})
        again = decide(saved, seen, self.now)
        if decision.look_at == self.now:
            assert again.reads, "what was to be decided is saved, since more has to be read"
            return
        while again.reads:
            seen = self._read(seen, again.reads)
            again = decide(saved, seen, self.now)
        assert again.status == after, "what was decided is not decided anew"
        assert again.events == ()

    def _check_budgets(self, before: QLoRAJobStatus, after: QLoRAJobStatus) -> None:
        spec, used = self.job.spec, after.restarts
        assert used is not None
        assert used.user <= spec.backoff_limit
        assert used.infrastructure <= spec.infrastructure_backoff_limit
        had = before.restarts.user + before.restarts.infrastructure if before.restarts else 0
        assert used.user + used.infrastructure - had in (0, 1)
        # No attempt has a price before it has a reason, and none gets another reason.
        reasons = {attempt.attempt: attempt.reason for attempt in before.attempts}
        fresh = [a for a in after.attempts if a.reason and reasons.get(a.attempt) is None]
        assert len(fresh) >= used.user + used.infrastructure - had
        assert all(a.reason == reasons[a.attempt] for a in after.attempts if reasons.get(a.attempt))

    def _check_conditions(self, before: QLoRAJobStatus, after: QLoRAJobStatus) -> None:
        assert after.phase == conditions.phase(after.conditions)
        ends = [
            conditions.is_true(after.conditions, kind)
            for kind in (ConditionType.COMPLETE, ConditionType.FAILED)
        ]
        assert self._finished(after) == any(ends)
        assert not all(ends)
        assert (after.completion_time is not None) == self._finished(after)
        if self._finished(before):
            assert (after.phase, after.attempt) == (before.phase, before.attempt), "over is over"

    @staticmethod
    def _finished(status: QLoRAJobStatus | None) -> bool:
        return status is not None and conditions.is_true(status.conditions, ConditionType.FINISHED)

    @property
    def finished(self) -> bool:
        """Whether the job is over."""
        return self._finished(self.job.status)

    # --- everybody else

    def control(self) -> None:
        """The Job controller catches up."""
        for uid, batch_job in list(self.batch_jobs.items()):
            mine = {pod.uid: pod for pod in self.pods.values() if pod.owner_uid == uid}
            living = [pod for pod in mine.values() if not pod.finished]
            if batch_job.deleting:
                for pod in living:
                    self.delete_pod(pod.uid)
                if not living:
                    del self.batch_jobs[uid]
                    self._collect()
                    self.pods = {key: pod for key, pod in self.pods.items() if key not in mine}
                continue
            self.batch_jobs[uid] = self._controlled(batch_job, mine, living)

    def _controlled(self, batch_job: AttemptJob, mine: dict[str, Pod], living: list[Pod]) -> AttemptJob:
        wanted = self.job.spec.topology.pods if batch_job.parallelism is None else batch_job.parallelism
        if batch_job.finished:
            return batch_job
        failed = next((pod for pod in mine.values() if pod.phase == "Failed"), None)
        if batch_job.failing is None and failed is not None:
            batch_job = replace(batch_job, failing=self._failure(failed), failing_since=self.now)
        if batch_job.failing is not None or batch_job.suspended:
            for pod in living:
                self.delete_pod(pod.uid)
            # A suspended Job has no start, without which the API server takes no end of it (ValidateJobStatus).
            failed = batch_job.failing is not None and not living and not batch_job.suspended
            return replace(batch_job, failed=failed, ready=0)
        if len(mine) < wanted:
            self._make_pods(batch_job, wanted)
        ready = sum(pod.phase == "Running" and pod.deleting_since is None for pod in mine.values())
        done = sum(pod.phase == "Succeeded" for pod in mine.values()) == wanted
        return replace(batch_job, ready=ready, complete=done, admitted_at=batch_job.admitted_at or self.now)

    def _make_pods(self, batch_job: AttemptJob, wanted: int) -> None:
        for index in range(wanted):
            self.made += 1
            pod = a_pod(index, batch_job.attempt, uid=f"pod-{self.made}", owner_uid=batch_job.uid)
            if not any(p.owner_uid == batch_job.uid and p.index == index for p in self.pods.values()):
                self.pods[pod.uid] = pod

    @staticmethod
    def _failure(pod: Pod) -> ReasonMessage:
        if pod.disruption is not None:
            return ReasonMessage(
                "PodFailurePolicy", f"Pod team/{pod.name} has condition DisruptionTarget matching rule"
            )
        if pod.exit_code in (40, 41, 143):
            return ReasonMessage("BackoffLimitExceeded", "Job has reached the specified backoff limit")
        told = f"Container trainer for pod team/{pod.name} failed with exit code {pod.exit_code} matching"
        return ReasonMessage("PodFailurePolicy", told)

    def delete_job(self, uid: str, *, orphan: bool = False) -> None:
        """Somebody deletes a Job; with `orphan`, its pods stay."""
        if uid in self.batch_jobs:
            self.batch_jobs[uid] = replace(self.batch_jobs[uid], deleting=True)
            if orphan:
                del self.batch_jobs[uid]
                self._collect()

    def _collect(self) -> None:
        """The garbage collector takes the Workloads whose only owner is gone."""
        self.workloads = {
            name: (uid, kept)
            for name, (uid, kept) in self.workloads.items()
            if kept or uid in self.batch_jobs
        }

    def delete_pod(self, uid: str) -> None:
        """Somebody deletes a pod: it goes at once if it has no node."""
        pod = self.pods.get(uid)
        if pod is not None and not pod.finished and pod.deleting_since is None:
            self.pods[uid] = replace(pod, deleting_since=self.now + timedelta(seconds=30))
            if pod.node is None:
                self._goes(uid)

    def _goes(self, uid: str, code: int = 143) -> None:
        self.pods[uid] = replace(self.pods[uid], phase="Failed", exit_code=code)

    def living(self) -> list[Pod]:
        """Pods that are not over, in the order of their names."""
        return sorted((pod for pod in self.pods.values() if not pod.finished), key=lambda pod: pod.uid)

    def runs(self, uid: str) -> None:
        """A pod gets a node and is ready."""
        if self.pods[uid].deleting_since is None:
            self.pods[uid] = replace(self.pods[uid], phase="Running", node="n")

    def ends(self, uid: str, code: int, words: str | None = None) -> None:
        """A pod that runs ends, with other words than usual if they are given."""
        pod = self.pods[uid]
        if pod.phase != "Running":
            return
        if words is None and code == 0:
            words = self.words.get(pod.owner_uid or "")
        phase = "Failed" if code else "Succeeded"
        self.pods[uid] = replace(pod, phase=phase, exit_code=code, termination_message=words or "")

    def drained(self, uid: str) -> None:
        """A pod is evicted."""
        said = ReasonMessage("EvictionByEvictionAPI", "")
        self.pods[uid] = replace(self.pods[uid], disruption=said)
        self.delete_pod(uid)

    def let_in(self, *, suspended: bool) -> None:
        """The queue lets every Job in, or takes it out."""
        for uid, batch_job in self.batch_jobs.items():
            if self.job.spec.scheduling.queue_name is not None and not batch_job.finished:
                self.batch_jobs[uid] = replace(batch_job, suspended=suspended)

    def set_spec(self, **fields: Any) -> None:
        """The user changes spec."""
        spec = self.job.spec.model_copy(update=fields)
        generation = (self.job.metadata.generation or 0) + 1
        metadata = self.job.metadata.model_copy(update={"generation": generation})
        self.job = self.job.model_copy(update={"spec": spec, "metadata": metadata})

    def settle(self, rounds: int = 200) -> None:
        """From now on all goes well, until the job is over and nothing of it lives."""
        self.tiers = ("avx512",)
        for _ in range(rounds):
            self.now += timedelta(seconds=30)
            found = hold(self.job.spec, self.now)
            if found is not None and "2026-02" in found.message:
                self.set_spec(schedule=None)
            if self.job.spec.suspend:
                self.set_spec(suspend=False)
            self.let_in(suspended=False)
            self.control()
            for pod in self.living():
                if pod.deleting_since is not None:
                    self._goes(pod.uid)
                elif pod.phase == "Pending":
                    self.runs(pod.uid)
                elif not any(other.phase == "Pending" for other in self.living()):
                    self.ends(pod.uid, 0)
            self.watch()
            self.reconcile()
            if self.finished and not self.living() and not self.unclaimed():
                return


def is_complete(fetched: ResolvedRevisions, spec: QLoRAJobSpec) -> bool:
    """Whether every remote source is known by its revision."""
    sources = ((spec.model.source, fetched.model), (spec.dataset.source, fetched.dataset))
    return all(revision is not None for source, revision in sources if is_remote(source))


@pytest.fixture
def now() -> datetime:
    """The time of day in all tests."""
    return NOW


@pytest.fixture(name="make_job")
def make_job_fixture() -> Callable[..., QLoRAJob]:
    """A maker of jobs: make_job(status, **spec)."""
    return make_job


@pytest.fixture
def make_attempt_job() -> Callable[..., AttemptJob]:
    """A maker of an attempt's Jobs."""
    return an_attempt_job


@pytest.fixture
def make_pod() -> Callable[..., Pod]:
    """A maker of pods."""
    return a_pod


@pytest.fixture
def ask() -> Callable[..., Decision]:
    """ask(status, jobs, pods, at=now, tiers=..., spec=..., **observed) -> the decision."""

    def made(
        status: dict[str, Any] | None = None,
        jobs: Sequence[AttemptJob] = (),
        pods: Sequence[Pod] | None = None,
        *,
        at: datetime = NOW,
        tiers: Sequence[IsaTier] = ("avx512",),
        spec: dict[str, Any] | None = None,
        **observed: Any,
    ) -> Decision:
        return decide(make_job(status, **(spec or {})), everything(jobs, pods, tiers=tiers, **observed), at)

    return made


@pytest.fixture
def make_view() -> Callable[..., JobView]:
    """make_view(status, jobs, pods, at=now, tiers=..., spec=..., **observed) -> what checks are given."""

    def made(
        status: dict[str, Any] | None = None,
        jobs: Sequence[AttemptJob] = (),
        pods: Sequence[Pod] | None = None,
        *,
        at: datetime = NOW,
        tiers: Sequence[IsaTier] = ("avx512",),
        spec: dict[str, Any] | None = None,
        **observed: Any,
    ) -> JobView:
        job = make_job(status, **(spec or {}))
        return JobView(
            job, everything(jobs, pods, tiers=tiers, **observed), at, job.status or QLoRAJobStatus()
        )

    return made


@pytest.fixture
def cluster() -> Callable[..., Cluster]:
    """cluster(journey="on claims", **spec) -> a cluster with one job."""
    return lambda journey="on claims", **spec: Cluster(make_job(**JOURNEYS[journey], **spec))


@pytest.fixture
def running() -> Callable[..., dict[str, Any]]:
    """running(**attempt) -> the status of a job whose attempt 0 runs."""
    return running_status


@pytest.fixture
def starting() -> Callable[..., dict[str, Any]]:
    """starting(seconds, now, **status) -> the status of a job whose attempt 0 began so many seconds ago."""
    return starting_status


@pytest.fixture
def transferring() -> Callable[..., dict[str, Any]]:
    """transferring(stage, **status) -> the status of a job whose attempt 0 fetches, or sends, and is up."""
    return transferring_status
