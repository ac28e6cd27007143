"""What is known of jobs and their Jobs, whatever order it is told in."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_operator.store import Store, owner_key

KEY = ("team", "job")


def job(version: int, uid: str = "one", **status: Any) -> dict[str, Any]:
    """A QLoRAJob."""
    metadata = {"namespace": "team", "name": "job", "uid": uid, "resourceVersion": str(version)}
    return {"metadata": {**metadata, "managedFields": ["long"]}, "spec": {}, "status": status}


def gang(
    version: int, *, uid: str = "g", name: str = "job-a0", ready: int = 0, job_uid: str = "one"
) -> dict[str, Any]:
    """A batch/v1 Job of it."""
    labels = {"qlora.dev/job-name": "job", "qlora.dev/job-uid": job_uid, "qlora.dev/attempt": name[-1]}
    metadata = {
        "namespace": "team",
        "name": name,
        "uid": uid,
        "resourceVersion": str(version),
        "labels": labels,
    }
    return {"metadata": metadata, "spec": {}, "status": {"ready": ready}}


@given(st.permutations(range(5)))
def test_newest_state_wins(order: list[int]) -> None:
    """Told in any order, the newest state of a job and of its Job is what is known."""
    store = Store()
    for version in order:
        store.put_job(job(version, phase=f"p{version}"))
        store.put_gang(gang(version, ready=version))
    known = store.job(KEY)
    assert known is not None
    assert known["status"]["phase"] == "p4"
    assert [each.ready for each in store.gangs("one")] == [4]


def test_newer_job_of_the_same_name() -> None:
    """A job that was created again replaces the one before, and late news of that one change nothing."""
    store = Store()
    store.put_job(job(1))
    store.put_job(job(5, uid="two"))
    store.put_job(job(3))
    store.drop_job(KEY, "one")
    known = store.job(KEY)
    assert known is not None
    assert known["metadata"]["uid"] == "two"


def test_large_numbers_are_numbers() -> None:
    """Versions are compared as numbers: 10 is newer than 9."""
    store = Store()
    store.put_job(job(10, phase="new"))
    store.put_job(job(9, phase="old"))
    assert (store.job(KEY) or {})["status"] == {"phase": "new"}


def test_news() -> None:
    """An echo, and what is older, is no news; the same version with other fields, after a change of the CRD, is."""
    store = Store()
    assert store.put_job(job(5, phase="new"))
    assert not store.put_job(job(5, phase="new"))
    assert not store.put_job(job(4, phase="old"))
    assert store.put_job(job(5))
    assert store.put_gang(gang(5))
    assert not store.put_gang(gang(6))
    assert store.put_gang(gang(7, ready=1))


def test_gangs_that_start_are_counted_once() -> None:
    """From the Job's creation until all its pods are up, or it or its owner is gone."""
    store = Store()

    def told(version: int, ready: int = 0, *, uid: str = "g") -> int:
        raw = gang(version, ready=ready, uid=uid)
        store.put_gang({**raw, "spec": {"parallelism": 2}})
        return store.starting

    assert [told(1), told(2, 1), told(3, 2), told(4, 1)] == [1, 1, 0, 1]
    store.drop_gang(gang(5))
    assert store.starting == 0
    told(6)
    store.drop_gangs_but([])
    assert store.starting == 0
    told(7)
    store.put_job(job(8))
    store.drop_job(KEY)
    assert store.starting == 0


def test_a_gang_that_is_replaced_starts_no_more() -> None:
    """A Job of the same name with another uid takes the place of the one before."""
    store = Store()
    for version, uid in enumerate("gh", 1):
        store.put_gang({**gang(version, uid=uid), "spec": {"parallelism": 2}})
    assert store.starting == 1


def test_who_does_well() -> None:
    """A Job that starts or runs; not one that fails, or of which nothing is known."""
    store = Store()
    assert not store.does_well(gang(1))
    store.put_gang(gang(1))
    assert store.does_well(gang(1))
    failed = {"type": "FailureTarget", "status": "True", "lastTransitionTime": "2026-01-31T12:00:00Z"}
    store.put_gang({**gang(2), "status": {"conditions": [failed]}})
    assert not store.does_well(gang(2))


def test_lean() -> None:
    """Who changed which field, which is as long as all the rest, is not kept."""
    store = Store()
    store.put_job(job(1))
    assert "managedFields" not in (store.job(KEY) or {})["metadata"]


def test_a_job_takes_its_gangs_along() -> None:
    """With a job, what is known of its Jobs is forgotten."""
    store = Store()
    store.put_job(job(1))
    store.put_gang(gang(2))
    store.drop_job(KEY)
    assert (store.job(KEY), store.jobs(), store.gangs("one")) == (None, {}, ())


def test_only_the_very_gang_is_dropped() -> None:
    """The end of a Job says nothing about another of its name."""
    store = Store()
    store.put_gang(gang(5, uid="new"))
    store.drop_gang(gang(3, uid="old"))
    assert [each.uid for each in store.gangs("one")] == ["new"]
    store.drop_gang(gang(6, uid="new"))
    assert store.gangs("one") == ()


def test_gangs_that_are_no_more() -> None:
    """A look at all Jobs tells which are gone, and whose they were."""
    store = Store()
    store.put_gang(gang(1, uid="a", name="job-a0"))
    store.put_gang(gang(2, uid="b", name="job-a1"))
    store.put_gang(gang(3, uid="c", job_uid="two"))
    assert store.drop_gangs_but(["b", "c"]) == ["one"]
    assert [each.uid for each in store.gangs("one")] == ["b"]


def test_unlabelled_is_nobodys() -> None:
    """A Job without the label is of no job."""
    store, raw = Store(), gang(1)
    del raw["metadata"]["labels"]
    store.put_gang(raw)
    store.drop_gang(raw)
    assert store.gangs("one") == ()


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
    raw = {"metadata": {"namespace": "team", "name": "x", "labels": labels, "ownerReferences": owners}}
    assert owner_key(raw) == expected
