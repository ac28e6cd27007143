"""Images are made once, from layers that are known by what they are made from."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from testcluster import images
from testcluster.errors import ClusterError
from testcluster.images import Image, Layer, Store

LITTLE = 0.001


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


def writes(text: str) -> Callable[[Path], None]:
    """What fills a layer with one file."""

    def fill(root: Path) -> None:
        (root / "file").write_text(text)

    return fill


def never(root: Path) -> None:
    """What must not be called."""
    pytest.fail("the layer is made although the store has it")


def make(store: Store, recipe: str, fill: Callable[[Path], None]) -> Layer:
    """The store's layer of a small recipe."""
    return store.layer("small", recipe, fill, says="at once", gigabytes=LITTLE)


def test_a_layer_is_made_once(store: Store) -> None:
    """A recipe that has not changed gives the layer of the first time, also to another process."""
    first = make(store, "recipe", writes("text"))

    assert make(Store(store.folder), "recipe", never) == first
    assert hashlib.sha256(store.blob(first).read_bytes()).hexdigest() == first.digest
    assert store.blob(first).stat().st_size == first.size


def test_another_recipe_is_another_layer_and_the_old_one_goes(store: Store) -> None:
    """A changed recipe makes the layer anew; pruning removes what nothing names any more."""
    old = make(store, "recipe", writes("old"))
    new = make(store, "changed", writes("new"))
    store.prune()

    assert old != new
    assert not store.blob(old).exists()
    assert store.blob(new).exists()


def test_equal_files_are_equal_layers(store: Store, tmp_path: Path) -> None:
    """When a file was written does not matter, so that nodes keep what they have."""

    def fill_later(root: Path) -> None:
        writes("text")(root)
        os.utime(root / "file", (0, 0))

    assert make(store, "one", writes("text")) == make(store, "other", fill_later)


def test_a_failed_layer_leaves_nothing(store: Store) -> None:
    """An error while files are written reaches the caller, and the next call tries again."""

    def fail(root: Path) -> None:
        writes("half")(root)
        raise ClusterError("no network")

    with pytest.raises(ClusterError, match="no network"):
        make(store, "recipe", fail)

    assert not list((store.folder / "blobs").iterdir())
    assert not list(store.folder.glob("making-*"))
    assert make(store, "recipe", writes("whole"))


def test_a_full_disk_is_an_error(store: Store) -> None:
    """A layer for which there is no room is refused with how much it takes and what to set."""
    with pytest.raises(ClusterError, match=r"takes 1e\+09 GB .* free space, or set QLORA_CLUSTER_CACHE"):
        store.layer("huge", "recipe", never, says="", gigabytes=1e9)


def test_a_layout_names_each_image_by_tag_and_by_digest(store: Store, tmp_path: Path) -> None:
    """Its index leads to manifests and configurations whose digests are those of the files."""
    image = Image("small", (make(store, "recipe", writes("text")),), command=("sleep", "1"), user="1000:1000")

    images.write_layout([image], tmp_path / "layout")

    blobs = tmp_path / "layout" / "blobs" / "sha256"
    index = json.loads((tmp_path / "layout" / "index.json").read_text())
    names = [entry["annotations"]["io.containerd.image.name"] for entry in index["manifests"]]
    assert names == ["qlora.test/small:test", f"qlora.test/small@{image.digest}"]
    assert {file.name for file in blobs.iterdir()} == {
        hashlib.sha256(file.read_bytes()).hexdigest() for file in blobs.iterdir()
    }
    manifest = json.loads((blobs / image.digest.removeprefix("sha256:")).read_text())
    config = json.loads((blobs / manifest["config"]["digest"].removeprefix("sha256:")).read_text())
    assert config["config"] == {"Entrypoint": ["sleep", "1"], "Env": [], "User": "1000:1000"}
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]


@pytest.mark.parametrize(
    "first",
    ["#!/somewhere/.venv/bin/python\n", "#!/bin/sh\n'''exec' \"/a long/path/python\" \"$0\" \"$@\"\n' '''\n"],
    ids=["one line", "long path"],
)
def test_commands_start_the_images_own_python(tmp_path: Path, first: str) -> None:
    """A command names the Python that installed it; in the image it names the one beside it."""
    scripts = tmp_path / "opt/venv/lib/python3.11/site-packages/bin"
    scripts.mkdir(parents=True)
    (scripts / "qlora").write_text(f"{first}import sys\n")

    images._place_scripts(tmp_path)

    placed = tmp_path / "opt/venv/bin/qlora"
    assert placed.read_text() == "#!/opt/venv/bin/python\nimport sys\n"
    assert os.access(placed, os.X_OK)
    assert not scripts.exists()
