"""Where URIs lead to."""

from pathlib import Path

import pytest

from qlora_contract import paths
from qlora_contract.env import VOLUMES_ENV
from qlora_contract.paths import InvalidUriError


def test_in_a_pod_a_claim_is_where_it_is_mounted() -> None:
    """Without a map, every claim has its folder below /volumes."""
    assert paths.resolve("pvc://team-data/docs.jsonl", {}) == Path("/volumes/team-data/docs.jsonl")


def test_on_one_machine_a_claim_is_where_the_map_says(tmp_path: Path) -> None:
    """The map is read from the environment, as `qlora run` sets it."""
    volumes = paths.volume_map({VOLUMES_ENV: f'{{"team": "{tmp_path}"}}'})

    assert paths.resolve("pvc://team/a/b", volumes) == tmp_path / "a/b"
    assert paths.resolve("pvc://team", volumes) == tmp_path


@pytest.mark.parametrize("environ", [{}, {VOLUMES_ENV: ""}])
def test_a_pod_has_no_map(environ: dict[str, str]) -> None:
    """An unset or empty variable means a pod."""
    assert paths.volume_map(environ) == {}


def test_a_claim_without_a_folder_is_named_with_those_that_have_one(tmp_path: Path) -> None:
    """The message lists what the map holds."""
    with pytest.raises(InvalidUriError, match="claim 'c' has no directory here; these have one: a, b"):
        paths.resolve("pvc://c/x", {"b": tmp_path, "a": tmp_path})


@pytest.mark.parametrize(
    "uri", ["/volumes/team", "team/x", "hf://org/name", "pvc://", "pvc:team/x", "PVC://team/x"]
)
def test_only_pvc_uris_are_resolved(uri: str) -> None:
    """Another scheme, or none, is refused with the form that is right."""
    with pytest.raises(InvalidUriError, match="is not of the form pvc://claim/path"):
        paths.resolve(uri, {})


@pytest.mark.parametrize(
    "uri", ["pvc://team/..", "pvc://team/../other", "pvc://team/a/../../x", "pvc://team//etc/passwd"]
)
def test_a_path_that_leaves_its_claim_is_refused(uri: str) -> None:
    """Neither .. nor an absolute path leads out of a claim."""
    with pytest.raises(InvalidUriError, match="leads out of its claim"):
        paths.resolve(uri, {})


@pytest.mark.parametrize("uri", ["pvc:///x", "pvc://../etc", "pvc://./x"])
def test_a_uri_without_a_claim_is_refused(uri: str) -> None:
    """What stands where the claim's name should be must not become a part of a path."""
    with pytest.raises(InvalidUriError, match="does not name a claim"):
        paths.resolve(uri, {})


def test_a_link_that_leaves_its_claim_is_refused(tmp_path: Path) -> None:
    """A link out of the claim is refused at any depth, and one within it is followed."""
    claim, outside = tmp_path / "claim", tmp_path / "outside"
    (claim / "inside").mkdir(parents=True)
    outside.mkdir()
    (claim / "out").symlink_to(outside)
    (claim / "in").symlink_to(claim / "inside")

    assert paths.resolve("pvc://c/in/file", {"c": claim}) == claim / "in/file"
    for uri in ("pvc://c/out", "pvc://c/out/file"):
        with pytest.raises(InvalidUriError, match="is a symbolic link that leads out of its claim"):
            paths.resolve(uri, {"c": claim})


def test_a_volume_may_itself_be_a_link(tmp_path: Path) -> None:
    """What counts is whether the path stays within the folder that the map's entry leads to."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")

    assert paths.resolve("pvc://c/x", {"c": tmp_path / "link"}) == tmp_path / "link/x"
