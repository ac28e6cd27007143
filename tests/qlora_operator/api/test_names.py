"""Names: what a job may be called, and what is called after it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.run_config import ISA_TIERS
from qlora_operator.api import names
from qlora_trainer.host.isa import TIER_FLAGS

DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")

job_names = st.from_regex(names.JOB_NAME_PATTERN.replace("$", r"\Z"), fullmatch=True).filter(
    lambda name: len(name) <= names.MAX_JOB_NAME
)
longest_names = st.integers(0, 25).map(lambda n: "q" + "-" * n + "7" * (names.MAX_JOB_NAME - 1 - n))


@given(st.one_of(job_names, longest_names), st.integers(0, 999_999), st.integers(0, 511))
def test_every_derived_name_is_a_dns_label(name: str, attempt: int, index: int) -> None:
    """Whatever a job is legally called, the names of its children are valid and short enough for DNS."""
    derived = [
        names.ranks_service(name),
        names.ranks_network_policy(name),
        names.attempt_job(name, attempt),
        names.pod_host_name(name, attempt, index),
        *names.rank_zero_host(name, attempt).split("."),
    ]

    assert names.is_job_name(name)
    assert [label for label in derived if len(label) > 63 or not DNS_LABEL.fullmatch(label)] == []


def test_rank_zero_is_found_at_the_first_pod_of_its_attempt() -> None:
    """The address of rank 0 is the host name of pod 0 within the ranks' service."""
    assert names.rank_zero_host("docs", 7) == "docs-a7-0.docs-ranks"


@pytest.mark.parametrize(
    "name",
    ["", "7b", "-a", "a-", "A", "a.b", "a_b", "a\n", "ä", "a" * 51, "a b"],
)
def test_other_names_are_refused(name: str) -> None:
    """A name that would make an invalid child name is no job name."""
    assert not names.is_job_name(name)


def test_attempts_of_different_jobs_never_share_a_name() -> None:
    """Two attempts have one name only if they are the same attempt at the same job."""
    made = [names.attempt_job(name, attempt) for name in ("a", "a-a1", "a-a", "b") for attempt in (0, 1, 11)]

    assert len(set(made)) == len(made)


@pytest.mark.parametrize("isa", ISA_TIERS)
def test_a_tiers_labels_are_flags_that_its_ranks_look_for(isa: str) -> None:
    """Node Feature Discovery spells a flag in capitals without underscores."""
    flags = {flag.replace("_", "").upper() for flag in TIER_FLAGS[isa]}
    labels = [label.split("/cpu-cpuid.") for label in names.TIER_LABELS[isa]]

    assert {space for space, _ in labels} == {"feature.node.kubernetes.io"}
    assert {flag for _, flag in labels} <= flags


@pytest.mark.parametrize("members", [names.Phase, names.ConditionType, names.Reason])
def test_constants_are_camel_case_words(members: type[names.Phase]) -> None:
    """Phases, conditions and reasons have the form that metav1.Condition asks of a reason."""
    assert [member for member in members if not re.fullmatch(r"[A-Z][A-Za-z]*", member)] == []
