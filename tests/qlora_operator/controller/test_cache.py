"""What is known of jobs and their Jobs, whatever order it is told in."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import batch_job, job_manifest
from qlora_operator.controller.cache import ObjectCache, job_uid_of, owner_key

KEY = ("team", "job")


def job(version: int, uid: str = "one", **status: Any) -> dict[str, Any]:
    """A QLoRAJob."""
    metadata = {"namespace": "team", "uid": uid, "resourceVersion": str(version), "managedFields": ["long"]}
    return job_manifest(metadata=metadata, status=status)


def child_job(
    version: int, *, uid: str = "g", name: str = "job-a0", ready: int = 0, job_uid: str = "one"
) -> dict[str, Any]:
    """A batch/v1 Job of it."""
    metadata = {"name": name, "uid": uid, "resourceVersion": str(version)}
    return batch_job(int(name[-1]), job_uid=job_uid, metadata=metadata, status={"ready": ready})


@given(st.permutations(range(5)))
def test_newest_state_wins(order: list[int]) -> None:
    """Told in any order, the newest state of a job and of its Job is what is known."""
    cache = ObjectCache()
    for version in order:
        cache.put_job(job(version, phase=f"p{version}"))
        cache.put_attempt_job(child_job(version, ready=version))
    known = cache.job(KEY)
    assert known is not None
    assert known["status"]["phase"] == "p4"
    assert [each.ready for each in cache.attempt_jobs("one")] == [4]


def test_newer_job_of_the_same_name() -> None:
    """A job that was created again replaces the one before, and late news of that one change nothing."""
    cache = ObjectCache()
    cache.put_job(job(1))
    cache.put_job(job(5, uid="two"))
    cache.put_job(job(3))
    cache.drop_job(KEY, "one")
    known = cache.job(KEY)
    assert known is not None
    assert known["metadata"]["uid"] == "two"


def test_large_numbers_are_numbers() -> None:
    """Versions are compared as numbers: 10 is newer than 9."""
    cache = ObjectCache()
    cache.put_job(job(10, phase="new"))
    cache.put_job(job(9, phase="old"))
    assert (cache.job(KEY) or {})["status"] == {"phase": "new"}


def test_news() -> None:
    """An echo, and what is older, is no news; the same version with other fields, after a change of the CRD, is."""
    cache = ObjectCache()
    assert cache.put_job(job(5, phase="new"))
    assert not cache.put_job(job(5, phase="new"))
    assert not cache.put_job(job(4, phase="old"))
    assert cache.put_job(job(5))
    assert cache.put_attempt_job(child_job(5))
    assert not cache.put_attempt_job(child_job(6))
    assert cache.put_attempt_job(child_job(7, ready=1))


def test_gangs_that_start_are_counted_once() -> None:
    """From the Job's creation until all its pods are up, or it or its owner is gone."""
    cache = ObjectCache()

    def told(version: int, ready: int = 0, *, uid: str = "g") -> int:
        raw = child_job(version, ready=ready, uid=uid)
        cache.put_attempt_job({**raw, "spec": {"parallelism": 2}})
        return cache.starting

    assert [told(1), told(2, 1), told(3, 2), told(4, 1)] == [1, 1, 0, 1]
    cache.drop_attempt_job("one", "job-a0", "g")
    assert cache.starting == 0
    told(6)
    cache.drop_attempt_jobs(cache.attempt_job_uids())
    assert cache.starting == 0
    told(7)
    cache.put_job(job(8))
    cache.drop_job(KEY)
    assert cache.starting == 0


def test_a_gang_that_is_replaced_starts_no_more() -> None:
    """A Job of the same name with another uid takes the place of the one before."""
    cache = ObjectCache()
    for version, uid in enumerate("gh", 1):
        cache.put_attempt_job({**child_job(version, uid=uid), "spec": {"parallelism": 2}})
    assert cache.starting == 1


def test_which_batch_jobs_are_healthy() -> None:
    """A Job that starts or runs; not one that fails, or of which nothing is known."""
    cache = ObjectCache()
    assert not cache.is_healthy(child_job(1))
    cache.put_attempt_job(child_job(1))
    assert cache.is_healthy(child_job(1))
    failed = {"type": "FailureTarget", "status": "True", "lastTransitionTime": "2026-01-31T12:00:00Z"}
    cache.put_attempt_job({**child_job(2), "status": {"conditions": [failed]}})
    assert not cache.is_healthy(child_job(2))


def test_lean() -> None:
    """Who changed which field, which is as long as all the rest, is not kept."""
    cache = ObjectCache()
    cache.put_job(job(1))
    assert "managedFields" not in (cache.job(KEY) or {})["metadata"]


def test_a_job_takes_its_gangs_along() -> None:
    """With a job, what is known of its Jobs is forgotten."""
    cache = ObjectCache()
    cache.put_job(job(1))
    cache.put_attempt_job(child_job(2))
    cache.drop_job(KEY)
    assert (cache.job(KEY), cache.jobs(), cache.attempt_jobs("one")) == (None, {}, ())


def test_only_the_very_gang_is_dropped() -> None:
    """The end of a Job says nothing about another of its name."""
    cache = ObjectCache()
    cache.put_attempt_job(child_job(5, uid="new"))
    cache.drop_attempt_job("one", "job-a0", "old")
    assert [each.uid for each in cache.attempt_jobs("one")] == ["new"]
    cache.drop_attempt_job("one", "job-a0", "new")
    assert cache.attempt_jobs("one") == ()


def test_gangs_that_are_no_more() -> None:
    """A look at all Jobs tells which are gone; nothing is left of a job that has no more."""
    cache = ObjectCache()
    cache.put_attempt_job(child_job(1, uid="a", name="job-a0"))
    cache.put_attempt_job(child_job(2, uid="b", name="job-a1"))
    cache.put_attempt_job(child_job(3, uid="c", job_uid="two"))
    assert cache.attempt_job_uids() == {"a", "b", "c"}
    cache.drop_attempt_jobs({"a", "c"})
    assert [each.uid for each in cache.attempt_jobs("one")] == ["b"]
    assert cache._attempt_jobs.keys() == {"one"}


def test_what_was_dropped_while_all_is_listed_does_not_come_back() -> None:
    """A page may be older than the deletion, of which the watch tells only once, before the page or after it."""
    cache = ObjectCache()
    cache.put_attempt_job(child_job(1, uid="a"))
    with cache.listing():
        cache.drop_attempt_job("one", "job-a0", "a")
        cache.drop_attempt_job("one", "job-a1", "b")
        cache.drop_job(KEY, "one")
        assert not cache.put_attempt_job(child_job(1, uid="a"))
        assert not cache.put_attempt_job(child_job(2, uid="b", name="job-a1"))
        assert not cache.put_job(job(1))
        assert cache.put_job(job(2, uid="two"))
    assert cache.attempt_jobs("one") == ()
    assert cache.jobs() == {KEY: "two"}


def test_unlabelled_is_nobodys() -> None:
    """A Job without the label is of no job."""
    cache, raw = ObjectCache(), child_job(1)
    del raw["metadata"]["labels"]
    cache.put_attempt_job(raw)
    cache.drop_attempt_job(job_uid_of(raw), "job-a0", "g")
    assert cache.attempt_job_uids() == set()


@pytest.mark.parametrize(
    ("labels", "owners", "expected"),
    [
        pytest.param({"qlora.dev/job-name": "job"}, [], KEY, id="label"),
        pytest.param(None, [{"kind": "QLoRAJob", "name": "job"}], KEY, id="owner"),
        pytest.param({}, [{"kind": "CronJob", "name": "job"}], None, id="another's"),
        pytest.param({}, [], None, id="nobody's"),
    ],
)
def test_owner_key(labels: Any, owners: Any, expected: Any) -> None:
    """A child belongs to the job that its label names, or else its owner reference."""
    raw = batch_job(metadata={"labels": labels, "ownerReferences": owners})
    assert owner_key(raw) == expected


def test_jobs_of_one_pod_are_known() -> None:
    """They have no Service, and a resync misses none."""
    cache = ObjectCache()
    for uid, topology in (("one", {"pods": 1}), ("default", {}), ("two", {"pods": 2})):
        metadata = {"namespace": "team", "uid": uid, "resourceVersion": "1"}
        cache.put_job(job_manifest(uid, metadata=metadata, topology=topology))

    assert cache.jobs_of_one_pod() == cache.jobs_of_one_pod("team") == {"one", "default"}
    assert cache.jobs_of_one_pod("other") == set()
