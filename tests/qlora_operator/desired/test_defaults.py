"""A job as the administrator's settings make it."""

from collections.abc import Callable
from typing import Any

import pytest

from builders import a_job
from qlora_operator.api.v1alpha1 import topology_hash
from qlora_operator.desired.defaults import scheduling, with_defaults
from qlora_operator.settings import Settings

MakeSettings = Callable[..., Settings]


@pytest.mark.parametrize(
    ("asked", "given", "found"),
    [
        ({}, {}, (None, None, 300)),
        ({}, {"defaults": {"ttlSecondsAfterFinished": 60}}, (60, None, 300)),
        ({"ttlSecondsAfterFinished": 0}, {"defaults": {"ttlSecondsAfterFinished": 60}}, (0, None, 300)),
        ({}, {"limits": {"ttlSecondsAfterFinished": 9, "activeDeadlineSeconds": 8}}, (9, 8, 300)),
        (
            {
                "ttlSecondsAfterFinished": 10,
                "activeDeadlineSeconds": 7,
                "terminationGracePeriodSeconds": 86_400,
            },
            {
                "limits": {
                    "ttlSecondsAfterFinished": 9,
                    "activeDeadlineSeconds": 8,
                    "terminationGracePeriodSeconds": 600,
                }
            },
            (9, 7, 600),
        ),
    ],
    ids=["nothing set", "a default", "the user's, were it 0", "a maximum of what is not set", "maxima"],
)
def test_times_are_the_users_within_the_administrators(
    settings: MakeSettings, asked: dict[str, Any], given: dict[str, Any], found: tuple[int | None, ...]
) -> None:
    """Time to live, deadline and grace period: unset means the default, and the maximum holds for all."""
    spec = with_defaults(a_job(**asked), settings(**given)).spec

    assert (
        spec.ttl_seconds_after_finished,
        spec.active_deadline_seconds,
        spec.termination_grace_period_seconds,
    ) == found


def test_a_job_that_names_no_queue_has_the_administrators(settings: MakeSettings) -> None:
    """So that nobody gets round a quota by leaving it out."""
    given = settings(defaults={"queueName": "team"})

    assert with_defaults(a_job(), given).queue_name == "team"
    assert with_defaults(a_job(scheduling={"queueName": "own"}), given).queue_name == "own"


def test_pods_go_where_both_want_them(settings: MakeSettings) -> None:
    """The administrator's node labels and tolerations hold for all; the class is the user's first."""
    given = settings(
        defaults={
            "nodeSelector": {"pool": "cpu"},
            "tolerations": [{"key": "cpu", "operator": "Exists"}],
            "priorityClassName": "batch",
        }
    )
    asked = {"nodeSelector": {"disk": "ssd"}, "tolerations": [{"key": "own", "operator": "Exists"}]}

    found = scheduling(a_job(scheduling=asked).spec.scheduling, given)

    assert found.node_selector == {"pool": "cpu", "disk": "ssd"}
    assert [each.key for each in found.tolerations] == ["own", "cpu"]
    assert found.priority_class_name == "batch"
    own = a_job(scheduling={"priorityClassName": "own"}).spec.scheduling
    assert scheduling(own, given).priority_class_name == "own"


def test_other_settings_end_no_attempt(settings: MakeSettings) -> None:
    """A Job is compared by what the user asked for: administrators may change defaults while jobs run."""
    given = settings(
        defaults={"nodeSelector": {"pool": "cpu"}, "queueName": "team", "ttlSecondsAfterFinished": 1},
        limits={"activeDeadlineSeconds": 5},
    )

    assert topology_hash(with_defaults(a_job(), given).spec) == topology_hash(a_job().spec)


def test_a_namespace_may_differ(settings: MakeSettings) -> None:
    """What it sets replaces a whole section; the others hold."""
    given = settings(
        limits={"pods": 1, "cpus": 8},
        defaults={"queueName": "team"},
        namespaces={"large": {"limits": {"pods": 64}}},
    )

    assert (given.of("large").limits.pods, given.of("large").limits.cpus) == (64, None)
    assert given.of("large").defaults.queue_name == "team"
    assert given.of("other") is given


@pytest.mark.parametrize(("asked", "scale_up", "found"), [(300, 0, 300), (300, 900, 900), (1200, 900, 1200)])
def test_pods_wait_until_nodes_may_have_come_up(
    settings: MakeSettings, asked: int, scale_up: int, found: int
) -> None:
    """An autoscaler's nodes are not given up before they are there."""
    job = a_job(isa={"stepDownSeconds": asked})

    assert with_defaults(job, settings(scaleUpSeconds=scale_up)).spec.isa.step_down_seconds == found
