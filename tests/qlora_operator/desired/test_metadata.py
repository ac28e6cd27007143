"""What every child of a job has in common."""

from collections.abc import Callable

from qlora_operator.api import names
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.desired import metadata


def test_labels_say_whose_a_child_is_and_what_for(a_job: Callable[..., QLoRAJob]) -> None:
    """A child has the job's own labels and the recommended ones; an attempt's child its attempt as well."""
    of_job = metadata.labels(a_job(), "u-1", names.Role.DISCOVERY)
    of_attempt = metadata.labels(a_job(), "u-1", names.Role.DISCOVERY, 3)

    assert of_job == {
        "app.kubernetes.io/name": "qlorajob",
        "app.kubernetes.io/instance": "small",
        "app.kubernetes.io/component": "discovery",
        "app.kubernetes.io/managed-by": "qlora-operator",
        "qlora.dev/job-name": "small",
        "qlora.dev/job-uid": "u-1",
        "qlora.dev/role": "discovery",
    }
    assert of_attempt == {**of_job, "qlora.dev/attempt": "3"}


def test_a_child_goes_with_its_job(a_job: Callable[..., QLoRAJob]) -> None:
    """The job is the child's one controller, told from another job of its name by the uid."""
    made = metadata.metadata(a_job(), "u-1", "small-x", names.Role.TRAINER, 0)

    assert made == {
        "name": "small-x",
        "namespace": "default",
        "labels": metadata.labels(a_job(), "u-1", names.Role.TRAINER, 0),
        "ownerReferences": [
            {
                "apiVersion": "qlora.dev/v1alpha1",
                "kind": "QLoRAJob",
                "name": "small",
                "uid": "u-1",
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }


def test_a_child_lives_beside_its_job(a_job: Callable[..., QLoRAJob]) -> None:
    """A child is in the namespace of its job."""
    job = a_job()
    there = job.model_copy(update={"metadata": job.metadata.model_copy(update={"namespace": "team"})})

    assert metadata.metadata(there, "u", "x", names.Role.TRAINER)["namespace"] == "team"


def test_pods_of_an_earlier_job_of_the_name_are_not_selected(a_job: Callable[..., QLoRAJob]) -> None:
    """The selector fits the labels of the job's pods, and not those of a job with another uid."""
    selector = metadata.pods_of("u-1")["matchLabels"].items()

    assert selector <= metadata.labels(a_job(), "u-1", names.Role.TRAINER, 0).items()
    assert not selector <= metadata.labels(a_job(), "u-2", names.Role.TRAINER, 0).items()
