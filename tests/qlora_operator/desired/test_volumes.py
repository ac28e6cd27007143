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

from qlora_contract.paths import RUN_CONFIG_PATH, resolve
from qlora_contract.run_config import RunStage
from qlora_operator.api import names
from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.desired.volumes import Volume, check_volumes, volumes
from qlora_operator.settings import Settings

Made = Callable[..., list[Volume]]


@pytest.fixture
def made(a_job: Callable[..., QLoRAJob], settings: Callable[..., Settings]) -> Made:
    """made(stage, transfer, **spec) -> the volumes of a pod."""

    def make(stage: RunStage = "train", transfer: Any = None, **spec: Any) -> list[Volume]:
        return volumes(a_job(**spec).spec, stage, settings(transfer=transfer or {}))

    return make


def claims(found: list[Volume]) -> list[tuple[str, str, bool]]:
    """(claim, where it is mounted, read-only) of each claim."""
    return [
        (volume["persistentVolumeClaim"]["claimName"], mount["mountPath"], mount["readOnly"])
        for volume, mount in found
        if "persistentVolumeClaim" in volume
    ]


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
    "a model from afar": (
        ("pvc://a", "hf://org/model", "pvc://b/d"),
        [("a", "/volumes/a", False), ("b", "/volumes/b", True)],
    ),
    "all from afar": (("pvc://a", "s3://bucket/m", "hf://datasets/org/d"), [("a", "/volumes/a", False)]),
}


@pytest.mark.parametrize(("uris", "mounts"), CLAIMS.values(), ids=CLAIMS)
def test_each_claim_is_mounted_once(
    uris: tuple[str, str, str], mounts: list[tuple[str, str, bool]], made: Made
) -> None:
    """A claim is where the trainer looks for it, and read-only unless it is the workspace's."""
    workspace, model, dataset = uris
    found = made(workspace=workspace, model={"source": model}, dataset={"source": dataset})

    assert claims(found) == mounts


def test_an_export_reads_the_model_and_no_data(made: Made) -> None:
    """Everything else it needs is in the workspace, and no Secret is."""
    secret = {"credentialsSecret": "s", "destination": "s3://bucket/p"}
    found = made(
        "export",
        workspace="pvc://a/w",
        model={"source": "pvc://b"},
        dataset={"source": "pvc://c"},
        output=secret,
    )

    assert claims(found) == [("a", "/volumes/a", False), ("b", "/volumes/b", True)]
    assert [volume for volume, _ in found if "secret" in volume] == []


@pytest.mark.parametrize("stage", ["fetch", "publish"])
def test_transfers_need_the_workspace_alone(stage: RunStage, made: Made) -> None:
    """What lies on other claims is neither fetched nor sent, so a transfer does not mount them."""
    found = made(stage, workspace="pvc://a/w", model={"source": "pvc://b"}, dataset={"source": "s3://bucket"})

    assert claims(found) == [("a", "/volumes/a", False)]


REMOTE = {
    "model": {"source": "hf://org/model", "credentialsSecret": "hub"},
    "dataset": {"source": "s3://bucket/data", "credentialsSecret": "store"},
    "output": {"destination": "hf://org/adapter", "credentialsSecret": "writer"},
}
SAME = {
    "model": {"source": "hf://org/model", "credentialsSecret": "hub"},
    "dataset": {"source": "hf://datasets/org/data", "credentialsSecret": "hub"},
}
CREDENTIALS: dict[str, tuple[RunStage, dict[str, Any], list[tuple[str, str]]]] = {
    "fetch": (
        "fetch",
        REMOTE,
        [("hub", "/etc/qlora/credentials/model"), ("store", "/etc/qlora/credentials/dataset")],
    ),
    "fetch with one": (
        "fetch",
        {**REMOTE, "dataset": {"source": "s3://bucket/data"}},
        [
            ("hub", "/etc/qlora/credentials/model"),
        ],
    ),
    "fetch with none": ("fetch", {"model": {"source": "hf://org/model"}}, []),
    "one Secret for both": (
        "fetch",
        SAME,
        [("hub", "/etc/qlora/credentials/model"), ("hub", "/etc/qlora/credentials/dataset")],
    ),
    "several sources": (
        "fetch",
        {
            "dataset": {
                "source": None,
                "sources": [
                    {"source": "s3://bucket/a", "credentialsSecret": "store"},
                    {"source": "pvc://b"},
                    {"source": "hf://datasets/org/c", "credentialsSecret": "hub"},
                ],
            }
        },
        [
            ("store", "/etc/qlora/credentials/dataset-sources-0"),
            ("hub", "/etc/qlora/credentials/dataset-sources-2"),
        ],
    ),
    "an initial adapter": (
        "fetch",
        {"adapter": {"initialAdapter": "hf://org/a", "initialAdapterCredentialsSecret": "hub"}},
        [("hub", "/etc/qlora/credentials/adapter-initialadapter")],
    ),
    "train": ("train", REMOTE, []),
    "publish": ("publish", REMOTE, [("writer", "/etc/qlora/credentials/output")]),
    "publish with none": ("publish", {"output": {"destination": "s3://bucket/out"}}, []),
}


@pytest.mark.parametrize(("stage", "spec", "secrets"), CREDENTIALS.values(), ids=CREDENTIALS)
def test_credentials_are_where_the_transfer_looks(
    stage: RunStage, spec: dict[str, Any], secrets: list[tuple[str, str]], made: Made
) -> None:
    """Each Secret is a folder of its source or destination, which nobody can write, in that stage's pod alone."""
    found = [(volume, mount) for volume, mount in made(stage, **spec) if "secret" in volume]

    assert [(volume["secret"]["secretName"], mount["mountPath"]) for volume, mount in found] == secrets
    assert all(mount["readOnly"] is True for _, mount in found)
    assert all(set(volume["secret"]) == {"secretName"} for volume, _ in found)


@pytest.mark.parametrize("stage", ["fetch", "train", "publish"])
def test_the_authorities_are_those_of_transfers(stage: RunStage, made: Made) -> None:
    """The ConfigMap's one key is a file of the pods that transfer, and of no rank's."""
    found = [
        pair for pair in made(stage, {"caBundleConfigMap": "authorities"}, **REMOTE) if "configMap" in pair[0]
    ]

    wanted = {
        "name": "ca-bundle",
        "configMap": {"name": "authorities", "items": [{"key": "ca.crt", "path": "ca.crt"}]},
    }
    mount = {"name": "ca-bundle", "mountPath": "/etc/qlora/ca", "readOnly": True}
    assert found == ([] if stage == "train" else [(wanted, mount)])
    assert [pair for pair in made(stage, **REMOTE) if "configMap" in pair[0]] == []


@hypothesis.settings(deadline=None)
@given(data=st.data())
def test_volumes_and_mounts_fit_each_other(
    attempts: SearchStrategy[dict[str, Any]], data: st.DataObject
) -> None:
    """Names are DNS labels, each used once; what the job names lies below a mount."""
    attempt = data.draw(attempts)
    spec = attempt["job"].spec
    made = volumes(spec, attempt["stage"], attempt["settings"])
    volume_names = [volume["name"] for volume, _ in made]
    paths = [mount["mountPath"] for _, mount in made]

    assert volume_names == [mount["name"] for _, mount in made]
    assert len(set(volume_names)) == len(volume_names)
    assert [
        name for name in volume_names if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name)
    ] == []
    assert len(set(paths)) == len(paths)
    assert [path for path in paths if ":" in path or not path.startswith("/")] == []
    given = ("uid", "attempt", "isa", "fetched")
    run = to_run_config(attempt["job"], **{name: attempt[name] for name in given})
    read = (run.model_uri, run.dataset_uris[0]) if attempt["stage"] == "train" else ()
    for uri in (spec.workspace, *read):
        place = Path(uri.replace("pvc:/", "/volumes"))
        assert any(place.is_relative_to(path) for path in paths)


def test_the_mounts_are_where_the_trainer_resolves_uris(made: Made) -> None:
    """The trainer's own reading of a URI in a pod begins with the claim's mount."""
    paths = [mount["mountPath"] for _, mount in made(workspace="pvc://team/work")]

    assert any(resolve("pvc://team/work", {}).is_relative_to(path) for path in paths)


@pytest.mark.parametrize("stage", ["fetch", "train", "publish"])
def test_run_json_is_the_annotation(stage: RunStage, made: Made) -> None:
    """The trainer finds the annotation's text at the path of its run.json."""
    (found,) = [(volume, mount) for volume, mount in made(stage) if "downwardAPI" in volume]
    volume, mount = found
    (item,) = volume["downwardAPI"]["items"]

    assert Path(mount["mountPath"]) / item["path"] == RUN_CONFIG_PATH
    assert item["fieldRef"] == {"fieldPath": f"metadata.annotations['{names.RUN_CONFIG_ANNOTATION}']"}
    assert mount["readOnly"] is True


@pytest.mark.parametrize("stage", ["fetch", "train", "publish"])
def test_all_that_can_be_written_besides_the_workspace_is_bounded(stage: RunStage, made: Made) -> None:
    """/tmp and /dev/shm lie in memory, each with a limit."""
    scratch = {
        mount["mountPath"]: volume["emptyDir"] for volume, mount in made(stage) if "emptyDir" in volume
    }

    handoff = {"/run/qlora/handoff": {"medium": "Memory", "sizeLimit": "1048576"}}
    assert scratch == {
        "/tmp": {"medium": "Memory", "sizeLimit": "268435456"},
        "/dev/shm": {"medium": "Memory", "sizeLimit": "67108864"},
        **(handoff if stage == "fetch" else {}),
    }


def test_who_looks_at_the_data_reads_all_and_writes_nothing(
    made: Made, a_job: Callable[..., QLoRAJob]
) -> None:
    """Every claim is read-only there, its names are those of the fetch beside it, and no Secret is mounted."""
    spec = {**REMOTE, "workspace": "pvc://a/w", "dataset": {"source": "pvc://c/d.jsonl"}}
    found = check_volumes(a_job(**spec).spec)
    fetch = {volume["name"]: volume for volume, _ in made("fetch", **spec)}

    assert claims(found) == [("a", "/volumes/a", True), ("c", "/volumes/c", True)]
    written = [mount["mountPath"] for _, mount in found if not mount.get("readOnly")]
    assert written == ["/tmp"]
    assert [volume for volume, _ in found if {"secret", "configMap"} & set(volume)] == []
    shared = [volume for volume, _ in found if volume["name"] in fetch]
    assert [volume["name"] for volume in shared] == ["claim-0", "run-config", "handoff"]
    assert all(volume == fetch[volume["name"]] for volume in shared)
