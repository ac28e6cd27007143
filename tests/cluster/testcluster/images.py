"""The images of a node: those that users build from the Dockerfile, made by buildah, in an OCI layout.

buildah keeps the layers that it has made: a change of our code takes seconds. What is unchanged in all is not
even looked at.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testcluster import binaries
from testcluster.errors import ClusterError

REGISTRY = "qlora.test"
"""No host of this name exists: an image that is not on the node fails to be pulled at once."""
TAG = "test"
"""Any but `latest`, which a kubelet would try to pull."""
GIGABYTES = 22
"""Disk for building everything from nothing and unpacking it on two nodes, of which 16 stay in use."""
GIGABYTES_FOR_CPUS = 8
"""The same, where torch's index has builds for CPUs."""
_REPOSITORY = Path(__file__).parents[3]
MADE_FROM = (
    "Dockerfile",
    ".dockerignore",
    "images",
    "requirements",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "operator",
    "trainer",
)
"""Files and folders of the repository."""
_LEFT_OUT = {"__pycache__", "compiled"}
"""Folders that .dockerignore names, too."""
_BUSYBOX = Path("/bin/busybox")
_PAUSE = """\
FROM scratch
COPY busybox /bin/busybox
USER 65535:65535
ENTRYPOINT ["/bin/busybox", "sleep", "2147483647"]
"""
_TARGETS = {"python": "base", "operator": "operator", "trainer": "trainer"}
"""The Dockerfile's target of each image."""


@dataclass(frozen=True)
class Layer:
    """An uncompressed tar file in the store."""

    digest: str
    """sha256 in hexadecimal; also the file's name."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Image:
    """An image in the store."""

    name: str
    digest: str
    """The manifest's, such as sha256:012..."""
    config: str
    """The configuration's sha256 in hexadecimal."""
    layers: tuple[Layer, ...]
    """The lowest first."""

    @property
    def reference(self) -> str:
        """What a pod's `image` says."""
        return f"{REGISTRY}/{self.name}:{TAG}"

    @property
    def pinned_reference(self) -> str:
        """The same image by its content."""
        return f"{REGISTRY}/{self.name}@{self.digest}"


class Store:
    """The images on this machine, in a folder: an OCI layout, and buildah's own storage."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or binaries.cache() / "images"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.layout = self.folder / "layout"
        self._note = self.folder / "images.json"

    def blob(self, digest: str) -> Path:
        """The file of the sha256."""
        return self.layout / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def image(self, name: str, digest: str) -> Image:
        """The image whose manifest has the digest."""
        manifest = json.loads(self.blob(digest).read_bytes())
        layers = [
            Layer(layer["digest"].removeprefix("sha256:"), layer["size"]) for layer in manifest["layers"]
        ]
        return Image(name, digest, manifest["config"]["digest"].removeprefix("sha256:"), tuple(layers))

    def known(self, recipe: str) -> list[Image] | None:
        """The images that were made by the recipe, as long as all their files are there."""
        note = self._noted()
        if note.get("recipe") != recipe:
            return None
        try:
            images = [self.image(name, digest) for name, digest in note["images"].items()]
        except FileNotFoundError:
            return None
        whole = all(self.blob(digest).exists() for image in images for digest in _blobs(image))
        return images if whole else None

    def note(self, recipe: str, digests: Mapping[str, str]) -> None:
        """Remember the images that a recipe made: manifests by name."""
        self._note.write_text(json.dumps({"recipe": recipe, "images": dict(digests)}))

    def prune(self) -> None:
        """Remove the files of images that were made anew since."""
        wanted = {
            digest for image in self.known(self._noted().get("recipe", "")) or [] for digest in _blobs(image)
        }
        if wanted:
            for blob in self.blob("").iterdir():
                if blob.name not in wanted:
                    blob.unlink()

    def push(self, buildah: "Buildah", image: str, name: str) -> str:
        """Write an image of buildah's as it is, uncompressed; its digest."""
        # buildah itself would compress every layer anew, which takes minutes.
        target = ["--dest-oci-accept-uncompressed-layers", f"oci:{self.layout}:{name}"]
        with tempfile.NamedTemporaryFile("r") as digest:
            source = ["--digestfile", digest.name, f"containers-storage:localhost/{image}"]
            _run(["skopeo", "copy", "--quiet", "--insecure-policy", *source, *target], buildah.environment)
            return digest.read().strip()

    def _noted(self) -> dict[str, Any]:
        return json.loads(self._note.read_text()) if self._note.exists() else {}


class Buildah:
    """buildah with a storage of its own in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "storage.conf"
        config.write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/storage"\nrunroot = "{folder}/run"\n'
        )
        self.environment = {
            "BUILDER": "buildah",
            "BUILDAH_ISOLATION": "chroot",
            "CONTAINERS_STORAGE_CONF": str(config),
            "TMPDIR": str(folder),  # layers pass through it, too large for a /tmp in memory
        }

    def run(self, *arguments: str) -> str:
        """What the command prints; raises ClusterError when it fails."""
        return _run(["buildah", *arguments], self.environment)


def all_images(store: Store) -> list[Image]:
    """Every image of a node, the pause image first. What changed is built; raises ClusterError where that fails."""
    recipe = _recipe()
    with _locked(store.folder / "lock"):
        if known := store.known(recipe):
            return known
        _check_disk(store.folder)
        _say("building images: seconds after a change of code, 3 to 10 minutes at first")
        start = time.monotonic()
        store.note(recipe, _build(store))
        store.prune()
        _say(f"built images in {time.monotonic() - start:.0f} s")
        return store.known(recipe) or []


def tag(name: str) -> str:
    """What the image is called where buildah keeps it, and where users build it."""
    version = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    return f"qlora-{_TARGETS[name]}:{version}" if name in _TARGETS else f"qlora-{name}:latest"


def write_layout(images: Iterable[Image], folder: Path, store: Store) -> None:
    """Write an OCI layout that names the images; their layers stay in the store."""
    (folder / "blobs" / "sha256").mkdir(parents=True)
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    index = []
    for image in images:
        for digest in (image.config, image.digest):
            shutil.copy(store.blob(digest), folder / "blobs" / "sha256")
        descriptor = {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": image.digest,
            "size": store.blob(image.digest).stat().st_size,
        }
        for reference in (image.reference, image.pinned_reference):
            index.append({**descriptor, "annotations": {"io.containerd.image.name": reference}})
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": index}))


def _build(store: Store) -> dict[str, str]:
    """The manifests' digests, by the images' names."""
    buildah = Buildah(store.folder / "buildah")
    buildah.run("rm", "--all")  # of a build that was killed: its files fill the disk
    _build_pause(buildah)
    # What the images only copy from, too, so that it has a name and is not pruned.
    script = [str(_REPOSITORY / "images" / "build.sh"), "tools", "backends", *_TARGETS.values()]
    _run(script, {**buildah.environment, "BASE_IMAGE": "debootstrap"})
    digests = {name: store.push(buildah, tag(name), name) for name in ("pause", *_TARGETS)}
    buildah.run("rmi", "--prune")
    return digests


def _build_pause(buildah: Buildah) -> None:
    """The container that holds a pod's network: it sleeps."""
    with tempfile.TemporaryDirectory() as context:
        shutil.copy2(_BUSYBOX, context)
        Path(context, "Dockerfile").write_text(_PAUSE)
        buildah.run("build", "--quiet", "--layers", "--tag", "qlora-pause", context)


def _recipe() -> str:
    """A hash of all that the images are made from."""
    recipe = hashlib.sha256(os.environ.get("TORCH_INDEX_URL", "").encode() + _BUSYBOX.read_bytes())
    for file in _sources():
        content = file.read_bytes()
        recipe.update(f"\0{file.relative_to(_REPOSITORY)}\0{len(content)}\0".encode() + content)
    return recipe.hexdigest()


def _sources() -> Iterator[Path]:
    for name in MADE_FROM:
        path = _REPOSITORY / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (file for file in files if file.is_file() and _LEFT_OUT.isdisjoint(file.parts))


def _check_disk(folder: Path) -> None:
    gigabytes = GIGABYTES_FOR_CPUS if os.environ.get("TORCH_INDEX_URL") else GIGABYTES
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise ClusterError(
            f"building the images and unpacking them on two nodes takes {gigabytes:g} GB and {free:.1f} GB are free "
            f"at {folder}: free space, or set QLORA_CLUSTER_CACHE to a folder on a larger disk"
        )


def _blobs(image: Image) -> Iterator[str]:
    yield image.digest.removeprefix("sha256:")
    yield image.config
    yield from (layer.digest for layer in image.layers)


def _run(command: list[str], environment: Mapping[str, str]) -> str:
    whole = {**os.environ, **environment}
    done = subprocess.run(command, env=whole, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
