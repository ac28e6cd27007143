"""The volumes of an attempt's pods."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from qlora_contract.places import RUN_CONFIG_PATH, resolve
from qlora_operator.api import names
from qlora_operator.api.types import QLoRAJob
from qlora_operator.desired.volumes import volumes

CLAIMS = {
    "three claims": (
        ("pvc://a/w", "pvc://b", "pvc://c/d.jsonl"),
        [("a", "/volumes/a", False), ("b", "/volumes/b", True), ("c", "/volumes/c", True)],
    ),
    "one claim for all": (("pvc://a/w", "pvc://a/m", "pvc://a/d"), [("a", "/volumes/a", False)]),
    "data beside the model": (
        ("pvc://a", "pvc://b/m", "pvc://b/d"),
        [("a", "/volumes/a", False), ("b", "/volumes/b", True)],
    ),
    "a name with dots": (("pvc://a.b", "pvc://a.b/m", "pvc://a.b/d"), [("a.b", "/volumes/a.b", False)]),
}


@pytest.mark.parametrize(("uris", "mounts"), CLAIMS.values(), ids=CLAIMS)
def test_each_claim_is_mounted_once(
    uris: tuple[str, str, str], mounts: list[tuple[str, str, bool]], a_job: Callable[..., QLoRAJob]
) -> None:
    """A claim is where the trainer looks for it, and read-only unless it is the workspace's."""
    workspace, model, dataset = uris
    job = a_job(workspace=workspace, model={"source": model}, dataset={"source": dataset})
    found = [
        (volume["persistentVolumeClaim"]["claimName"], mount["mountPath"], mount["readOnly"])
        for volume, mount in volumes(job.spec)
        if "persistentVolumeClaim" in volume
    ]

    assert found == mounts


@hypothesis.settings(deadline=None)
@given(data=st.data())
def test_volumes_and_mounts_fit_each_other(
    gangs: SearchStrategy[dict[str, Any]], data: st.DataObject
) -> None:
    """Names are DNS labels, each used once; what the job names lies below a mount."""
    spec = data.draw(gangs)["job"].spec
    made = volumes(spec)
    volume_names = [volume["name"] for volume, _ in made]
    paths = [mount["mountPath"] for _, mount in made]

    assert volume_names == [mount["name"] for _, mount in made]
    assert len(set(volume_names)) == len(volume_names)
    assert [
        name for name in volume_names if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name)
    ] == []
    assert len(set(paths)) == len(paths)
    assert [path for path in paths if ":" in path or not path.startswith("/")] == []
    for uri in (spec.workspace, spec.model.source, spec.dataset.source):
        place = Path(uri.replace("pvc:/", "/volumes"))
        assert any(place.is_relative_to(path) for path in paths)


def test_the_mounts_are_where_the_trainer_resolves_uris(a_job: Callable[..., QLoRAJob]) -> None:
    """The trainer's own reading of a URI in a pod begins with the claim's mount."""
    job = a_job(workspace="pvc://team/work")
    paths = [mount["mountPath"] for _, mount in volumes(job.spec)]

    assert any(resolve(job.spec.workspace, {}).is_relative_to(path) for path in paths)


def test_run_json_is_the_annotation(a_job: Callable[..., QLoRAJob]) -> None:
    """The trainer finds the annotation's text at the path of its run.json."""
    (found,) = [(volume, mount) for volume, mount in volumes(a_job().spec) if "downwardAPI" in volume]
    volume, mount = found
    (item,) = volume["downwardAPI"]["items"]

    assert Path(mount["mountPath"]) / item["path"] == RUN_CONFIG_PATH
    assert item["fieldRef"] == {"fieldPath": f"metadata.annotations['{names.RUN_CONFIG_ANNOTATION}']"}
    assert mount["readOnly"] is True


def test_all_that_can_be_written_besides_the_workspace_is_bounded(a_job: Callable[..., QLoRAJob]) -> None:
    """/tmp and /dev/shm lie in memory, each with a limit."""
    scratch = {
        mount["mountPath"]: volume["emptyDir"]
        for volume, mount in volumes(a_job().spec)
        if "emptyDir" in volume
    }

    assert scratch == {
        "/tmp": {"medium": "Memory", "sizeLimit": "268435456"},
        "/dev/shm": {"medium": "Memory", "sizeLimit": "67108864"},
    }
