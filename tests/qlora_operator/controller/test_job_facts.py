"""What is known of jobs between two reconciliations."""

import time

import pytest

from qlora_contract.progress import ProgressReport
from qlora_operator.controller.job_facts import JobFacts
from qlora_operator.status.observation import ReasonMessage

REPORT = ProgressReport(
    job_uid="u",
    attempt=0,
    stage="Training",
    step=1,
    total_steps=9,
    epoch=0,
    updated_time="2026-01-31T12:00:00Z",
)


def test_a_report_is_taken_once() -> None:
    """It is news for one decision."""
    facts = JobFacts()
    facts.put_report("u", REPORT)

    assert [facts.take_report("other"), facts.take_report("u"), facts.take_report("u")] == [
        None,
        REPORT,
        None,
    ]


def test_missing_children_are_known_until_they_are_created() -> None:
    """Of each job on its own."""
    facts = JobFacts()
    facts.set_children_missing(["u", "v"])
    facts.set_children_complete("u")

    assert [facts.children_missing(uid) for uid in ("u", "v", "w")] == [False, True, False]
    assert [facts.children_complete(uid) for uid in ("u", "v", "w")] == [True, False, False]
    facts.set_children_missing(["u"])
    assert not facts.children_complete("u")


def test_only_another_reason_is_news() -> None:
    """A webhook may name each request in its message; a success makes the next error news again."""
    facts = JobFacts()
    refused, again = ReasonMessage("Refused", "request 1"), ReasonMessage("Refused", "request 2")
    steps = [refused, again, ReasonMessage("NameConflict", ""), None, refused]

    assert [facts.set_create_error("u", step) for step in steps] == [True, False, True, False, True]
    facts.set_create_error("u", again)
    assert facts.create_error("u") == again


def test_failures_in_a_row_are_worth_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of them, or one that took long; a success begins anew."""
    facts = JobFacts()
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)

    assert [facts.count_failure("u", 99.0) for _ in range(3)] == [False, False, True]
    facts.clear_failures("u")
    assert facts.count_failure("u", 99.0) is False
    assert facts.count_failure("v", 70.0) is True


def test_a_job_that_is_gone_is_forgotten() -> None:
    """All of it."""
    facts = JobFacts()
    facts.put_report("u", REPORT)
    facts.set_children_missing(["u"])
    facts.set_create_error("u", ReasonMessage("Refused", ""))

    facts.forget("u")

    assert (facts.take_report("u"), facts.children_missing("u"), facts.create_error("u")) == (
        None,
        False,
        None,
    )


def test_a_network_is_known_from_its_creation_or_a_list_until_it_is_deleted() -> None:
    """Of each job on its own."""
    facts = JobFacts()
    facts.set_children_complete("u")
    facts.set_network_exists(["v"])

    assert [facts.network_exists(uid) for uid in ("u", "v", "w")] == [True, True, False]
    facts.set_network_gone("u")
    facts.forget("v")
    assert not any(facts.network_exists(uid) for uid in ("u", "v"))
    assert not facts.children_complete("u")
