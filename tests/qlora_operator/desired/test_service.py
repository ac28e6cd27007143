"""The Service of a job's ranks."""

from collections.abc import Callable, Mapping
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from builders import environment_of
from qlora_operator.api import names
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.desired.attempt_job import attempt_job
from qlora_operator.desired.metadata import labels
from qlora_operator.desired.service import is_ranks_service, ranks_service
from qlora_operator.settings import Settings

SETTINGS = Settings(trainer_image="registry.example/trainer:1")


def test_ranks_are_found_before_they_are_ready(a_job: Callable[..., QLoRAJob]) -> None:
    """The Service is headless and publishes pods that are not ready."""
    spec = ranks_service(a_job(), uid="u")["spec"]

    assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)


def test_only_rank_0_of_this_very_job_is_selected(a_job: Callable[..., QLoRAJob]) -> None:
    """Neither pods of an earlier job of the same name nor pods with another role, nor other ranks, whom nobody looks
    for."""
    selector = ranks_service(a_job(), uid="u")["spec"]["selector"].items()

    def pod(uid: str, role: names.Role, index: int) -> Mapping[str, str]:
        return {**labels(a_job(), uid, role, 7), "batch.kubernetes.io/job-completion-index": str(index)}

    assert selector <= pod("u", names.Role.TRAINER, 0).items()
    assert not selector <= pod("u", names.Role.TRAINER, 1).items()
    assert not selector <= pod("other", names.Role.TRAINER, 0).items()
    for role in set(names.Role) - {names.Role.TRAINER}:
        assert not selector <= pod("u", role, 0).items()


@pytest.mark.parametrize(
    ("change", "as_made"),
    [
        ({}, True),
        ({"clusterIPs": ["None"], "sessionAffinity": "None"}, True),
        ({"selector": {"app": "other"}}, False),
        ({"publishNotReadyAddresses": None}, False),
        ({"ports": []}, False),
    ],
    ids=["as made", "what API servers add", "another selector", "unready ones left out", "no ports"],
)
def test_an_edited_service_is_told_from_its_own(
    a_job: Callable[..., QLoRAJob], change: dict[str, Any], *, as_made: bool
) -> None:
    """Whatever an API server adds."""
    service = ranks_service(a_job(), uid="u")
    for port in service["spec"]["ports"]:
        port["targetPort"] = port["port"]
    service["spec"] |= change

    assert is_ranks_service(service, SETTINGS) == as_made


@hypothesis.settings(deadline=None)
@given(data=st.data())
def test_pods_have_their_names_in_the_service(
    attempts: SearchStrategy[dict[str, Any]], misfits: Callable[[Any, str], list[str]], data: st.DataObject
) -> None:
    """The pods' subdomain is the Service, which selects them: so rank 0 has the name that the ranks are told. A single
    pod's ranks need no name."""
    attempt = {**data.draw(attempts), "stage": "train"}
    service = ranks_service(attempt["job"], uid=attempt["uid"])
    template = attempt_job(**attempt)["spec"]["template"]
    environment = environment_of(template)

    if attempt["job"].spec.topology.pods == 1:
        assert "subdomain" not in template["spec"]
        assert environment["MASTER_ADDR"] == "127.0.0.1"
    else:
        assert service["metadata"]["name"] == template["spec"]["subdomain"]
        assert environment["MASTER_ADDR"].endswith(f"-0.{template['spec']['subdomain']}")
    rank_0 = {**template["metadata"]["labels"], names.INDEX_LABEL: "0"}  # the Job controller's
    assert service["spec"]["selector"].items() <= rank_0.items()
    assert misfits(service, "V1Service") == []
