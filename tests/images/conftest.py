"""The images as users get them, and a way to run something in one as a cluster would."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from testcluster import images, packages
from testcluster.images import Buildah, Image, Store

SOMEBODY = "54321:54321"
"""A user and a group that no image knows, as OpenShift would choose them."""
_CONTAINER = """\
root=$1; shift
mount --bind "$root" "$root" && mount -o remount,bind,ro "$root" && mount -t proc proc "$root/proc" &&
mount --bind /dev "$root/dev" && mount -o ro -t sysfs sysfs "$root/sys" && mount -t tmpfs tmpfs "$root/tmp" &&
exec chroot --userspec="$user" --groups= "$root" env -i "$@"
"""


@dataclass(frozen=True)
class Built:
    """An image that was built, with its files."""

    image: Image
    config: Mapping[str, Any]
    """Its OCI configuration."""
    root: Path
    """Its files, as root sees them."""
    store: Store

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command as somebody unknown to the image, on a read-only root with an empty /tmp."""
        inside = ["sh", "-c", _CONTAINER, "sh", str(self.root), *self.config["config"]["Env"], *command]
        return subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", *inside],
            env={**os.environ, "user": SOMEBODY},
            capture_output=True,
            text=True,
            check=False,
        )

    def files(self) -> Iterator[Path]:
        """Every file and folder of the image; links are not followed."""
        for folder, folders, files in os.walk(self.root):
            yield from (Path(folder, name) for name in folders + files)


@pytest.fixture(scope="session")
def store() -> Store:
    """The store with all images built. Needs root, as the nodes do."""
    if os.geteuid() != 0:
        pytest.skip("building and mounting images takes root: run the tests as root")
    packages.ensure()
    made = Store()
    images.all_images(made)
    return made


@pytest.fixture(scope="session")
def buildah(store: Store) -> Buildah:
    """The buildah that built the images."""
    return Buildah(store.folder / "buildah")


@pytest.fixture(scope="session")
def built(store: Store, buildah: Buildah) -> Iterator[dict[str, Built]]:
    """The operator's and the trainer's image."""
    every = {image.name: image for image in images.all_images(store)}
    containers = []
    found = {}
    for name in ("operator", "trainer"):
        containers.append(buildah.run("from", "--pull-never", images.tag(name)).strip())
        root = Path(buildah.run("mount", containers[-1]).strip())
        config = json.loads(store.blob(every[name].config).read_bytes())
        found[name] = Built(every[name], config, root, store)
    yield found
    buildah.run("rm", *containers)


@pytest.fixture(params=["operator", "trainer"])
def each(built: dict[str, Built], request: pytest.FixtureRequest) -> Built:
    """Both images, one after the other."""
    return built[request.param]


@pytest.fixture
def operator(built: dict[str, Built]) -> Built:
    """The operator's image."""
    return built["operator"]


@pytest.fixture
def trainer(built: dict[str, Built]) -> Built:
    """The trainer's image."""
    return built["trainer"]
