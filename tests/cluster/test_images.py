"""Images are built when what they are made from changes, and kept in one layout."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from testcluster import images
from testcluster.errors import ClusterError
from testcluster.images import Image, Layer, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


def put(store: Store, content: bytes) -> dict[str, Any]:
    """Write a file into the store; what a manifest says of it."""
    digest = hashlib.sha256(content).hexdigest()
    store.blob(digest).parent.mkdir(parents=True, exist_ok=True)
    store.blob(digest).write_bytes(content)
    return {"digest": f"sha256:{digest}", "size": len(content)}


def put_image(store: Store, *layers: str) -> str:
    """Write an image; its digest."""
    manifest = {"config": put(store, b"{}"), "layers": [put(store, layer.encode()) for layer in layers]}
    return str(put(store, json.dumps(manifest).encode())["digest"])


def test_images_are_known_by_what_they_are_made_from(store: Store) -> None:
    """What a recipe made is found again by that recipe and by no other, also by another process."""
    digest = put_image(store, "base", "code")
    store.note("recipe", {"operator": digest})

    again = Store(store.folder)

    assert again.known("another") is None
    assert again.known("recipe") == [
        Image(
            "operator",
            digest,
            hashlib.sha256(b"{}").hexdigest(),
            tuple(Layer(hashlib.sha256(one.encode()).hexdigest(), 4) for one in ("base", "code")),
        )
    ]


@pytest.mark.parametrize("lost", ["layer", "manifest"])
def test_images_with_a_lost_file_are_not_known(store: Store, lost: str) -> None:
    """Where somebody removed a file of the layout the images are to be built again."""
    digest = put_image(store, "base")
    store.note("recipe", {"operator": digest})
    store.blob(digest if lost == "manifest" else hashlib.sha256(b"base").hexdigest()).unlink()

    assert store.known("recipe") is None


def test_pruning_keeps_what_is_wanted(store: Store) -> None:
    """The layers of images that were made anew go; those that the new ones share with them stay."""
    put_image(store, "base", "old")
    store.note("recipe", {"operator": put_image(store, "base", "new")})

    store.prune()

    assert store.known("recipe")
    assert not store.blob(hashlib.sha256(b"old").hexdigest()).exists()


def test_a_layout_names_each_image_by_tag_and_by_digest(store: Store, tmp_path: Path) -> None:
    """Its index leads to manifests and configurations; the layers stay where they are."""
    digest = put_image(store, "base")
    image = store.image("small", digest)

    images.write_layout([image], tmp_path / "layout", store)

    index = json.loads((tmp_path / "layout" / "index.json").read_text())
    names = [entry["annotations"]["io.containerd.image.name"] for entry in index["manifests"]]
    assert names == ["qlora.test/small:test", f"qlora.test/small@{digest}"]
    blobs = tmp_path / "layout" / "blobs" / "sha256"
    assert {file.name for file in blobs.iterdir()} == {image.config, digest.removeprefix("sha256:")}


def test_unchanged_images_are_not_built(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as nothing changed that they are made from, buildah is not even started."""
    store.note(images._recipe(), {"operator": put_image(store, "base")})
    monkeypatch.setenv("PATH", "")

    assert [image.name for image in images.all_images(store)] == ["operator"]


def test_the_index_of_torch_is_part_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another index may have another build of torch: the images are built again."""
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    before = images._recipe()
    monkeypatch.setenv("TORCH_INDEX_URL", "https://index.example/cpu")

    assert images._recipe() != before


def test_what_backends_are_compiled_from_is_part_of_the_recipe() -> None:
    """The sources in C++ are; what was compiled from them for this machine is not."""
    names = {file.name for file in images._sources()}

    assert {"ccl.cpp", "mpi.cpp", "backend.hpp", "compile.sh", "backends.txt"} <= names
    assert not {name for name in names if name.startswith(("_ccl.", "_mpi."))}


def test_a_full_disk_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images for which there is no room are refused with how much they take and what to set."""
    monkeypatch.setattr(images, "GIGABYTES", 1e9)

    with pytest.raises(ClusterError, match=r"takes 1e\+09 GB .* free space, or set QLORA_CLUSTER_CACHE"):
        images.all_images(store)


def test_images_are_called_as_users_call_them() -> None:
    """The images of the tests are those that images/build.sh leaves, by name and version."""
    assert images.tag("operator").startswith("qlora-operator:0.")
    assert images.tag("trainer") == images.tag("operator").replace("operator", "trainer")
