"""Where URIs lead to."""

from pathlib import Path

import pytest

from qlora_contract import places
from qlora_contract.places import PlaceError


def test_in_a_pod_a_claim_is_where_it_is_mounted() -> None:
    """Without a map, every claim has its folder below /volumes."""
    assert places.resolve("pvc://team-data/docs.jsonl", {}) == Path("/volumes/team-data/docs.jsonl")


def test_on_one_machine_a_claim_is_where_the_map_says(tmp_path: Path) -> None:
    """The map is read from the environment, as `qlora run` sets it."""
    volumes = places.volume_map({places.VOLUMES_ENV: f'{{"team": "{tmp_path}"}}'})

    assert places.resolve("pvc://team/a/b", volumes) == tmp_path / "a/b"
    assert places.resolve("pvc://team", volumes) == tmp_path


@pytest.mark.parametrize("environ", [{}, {places.VOLUMES_ENV: ""}])
def test_a_pod_has_no_map(environ: dict[str, str]) -> None:
    """An unset or empty variable means a pod."""
    assert places.volume_map(environ) == {}


def test_a_claim_without_a_folder_is_named_with_those_that_have_one(tmp_path: Path) -> None:
    """The message lists what the map holds."""
    with pytest.raises(PlaceError, match="claim 'c' has no folder here; those that have one: a, b"):
        places.resolve("pvc://c/x", {"b": tmp_path, "a": tmp_path})


@pytest.mark.parametrize(
    "uri", ["/volumes/team", "team/x", "hf://org/name", "pvc://", "pvc:team/x", "PVC://team/x"]
)
def test_only_claims_are_places(uri: str) -> None:
    """Another scheme, or none, is refused with the form that is right."""
    with pytest.raises(PlaceError, match="is not of the form pvc://claim/path"):
        places.resolve(uri, {})


@pytest.mark.parametrize(
    "uri", ["pvc://team/..", "pvc://team/../other", "pvc://team/a/../../x", "pvc://team//etc/passwd"]
)
def test_a_path_that_leaves_its_claim_is_refused(uri: str) -> None:
    """Neither .. nor an absolute path leads out of a claim."""
    with pytest.raises(PlaceError, match="leaves its claim"):
        places.resolve(uri, {})


@pytest.mark.parametrize("uri", ["pvc:///x", "pvc://../etc", "pvc://./x"])
def test_a_uri_without_a_claim_is_refused(uri: str) -> None:
    """What stands where the claim's name should be must not become a part of a path."""
    with pytest.raises(PlaceError, match="names no claim"):
        places.resolve(uri, {})


def test_a_link_that_leaves_its_claim_is_refused(tmp_path: Path) -> None:
    """A link out of the claim is refused at any depth, and one within it is followed."""
    claim, outside = tmp_path / "claim", tmp_path / "outside"
    (claim / "inside").mkdir(parents=True)
    outside.mkdir()
    (claim / "out").symlink_to(outside)
    (claim / "in").symlink_to(claim / "inside")

    assert places.resolve("pvc://c/in/file", {"c": claim}) == claim / "in/file"
    for uri in ("pvc://c/out", "pvc://c/out/file"):
        with pytest.raises(PlaceError, match="is a link that leaves its claim"):
            places.resolve(uri, {"c": claim})


def test_a_volume_may_itself_be_a_link(tmp_path: Path) -> None:
    """What counts is whether the path stays within the folder that the map's entry leads to."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")

    assert places.resolve("pvc://c/x", {"c": tmp_path / "link"}) == tmp_path / "link/x"


@pytest.mark.parametrize("workspace", ["pvc://team/qlora", "pvc://team/qlora/"])
def test_a_jobs_folder_is_in_its_workspace(workspace: str) -> None:
    """A slash at the end of the workspace changes nothing."""
    assert places.job_folder(workspace, "demo", {}) == Path("/volumes/team/qlora/jobs/demo")
