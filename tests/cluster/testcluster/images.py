"""Container images made on this machine, without a registry: layers, and an OCI layout of them.

Layers are uncompressed tar files in a store outside the tree, each known by the
hash of what it is made from: what did not change is not made again. The
project's own code is the last layer and takes a second.
"""

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
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
VENV = "opt/venv"
"""Where the images hold the Python environment, below the root."""
_REPOSITORY = Path(__file__).parents[3]
_SITE = f"{VENV}/lib/python3.11/site-packages"
_RELEASE = "bookworm"  # its Python is 3.11, the oldest that the project supports
_INCLUDE = "python3,python3-venv,libgomp1,ca-certificates"
_METHOD = 2
"""To be counted up when layers are filled in another way: then all are made anew."""
_VALID = ("--invalidation-mode", "unchecked-hash")
"""Compiled files are valid whatever the time of their source, which a layer does not keep."""
_SHEBANG = re.compile(r"\A#!(?:/bin/sh\n'''exec' .*\n' '''|.*)\n")
"""The first line of a command, or three where the path of its Python is too long for one."""
_UNUSED = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man")


@dataclass(frozen=True)
class Layer:
    """An uncompressed tar file in the store."""

    digest: str
    """sha256 in hexadecimal; also the file's name."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Image:
    """An image: its layers, lowest first, and how its containers start."""

    name: str
    layers: tuple[Layer, ...]
    command: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    user: str = "0:0"

    @property
    def reference(self) -> str:
        """What a pod's `image` says."""
        return f"{REGISTRY}/{self.name}:{TAG}"

    @property
    def digest(self) -> str:
        """The manifest's digest, such as sha256:012..."""
        return f"sha256:{_digest(self.manifest())}"

    @property
    def pinned_reference(self) -> str:
        """The same image by its content."""
        return f"{REGISTRY}/{self.name}@{self.digest}"

    def configuration(self) -> bytes:
        """The image's OCI configuration."""
        return _json(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": {"Entrypoint": self.command, "Env": self.environment, "User": self.user},
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.digest}" for layer in self.layers]},
            }
        )

    def manifest(self) -> bytes:
        """The image's OCI manifest."""
        return _json(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": _descriptor("application/vnd.oci.image.config.v1+json", self.configuration()),
                "layers": [
                    {
                        "mediaType": "application/vnd.oci.image.layer.v1.tar",
                        "digest": f"sha256:{layer.digest}",
                        "size": layer.size,
                    }
                    for layer in self.layers
                ],
            }
        )


def write_layout(images: Iterable[Image], folder: Path) -> None:
    """Write an OCI layout that names the images; their layers stay in the store."""
    (folder / "blobs" / "sha256").mkdir(parents=True)
    (folder / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
    index = []
    for image in images:
        for blob in (image.configuration(), image.manifest()):
            (folder / "blobs" / "sha256" / _digest(blob)).write_bytes(blob)
        descriptor = _descriptor("application/vnd.oci.image.manifest.v1+json", image.manifest())
        for reference in (image.reference, image.pinned_reference):
            index.append({**descriptor, "annotations": {"io.containerd.image.name": reference}})
    (folder / "index.json").write_bytes(_json({"schemaVersion": 2, "manifests": index}))


class Store:
    """The layers on this machine, in a folder: blobs by digest, and which recipe made which."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or binaries.cache() / "images"
        (self.folder / "recipes").mkdir(parents=True, exist_ok=True)
        (self.folder / "blobs").mkdir(exist_ok=True)

    def blob(self, layer: Layer) -> Path:
        """The layer's tar file."""
        return self.folder / "blobs" / layer.digest

    def layer(
        self, name: str, recipe: str, fill: Callable[[Path], None], *, says: str, gigabytes: float
    ) -> Layer:
        """The layer of the recipe; when the store lacks it, `fill` writes its files into a folder.

        That takes the gigabytes, the copies that two nodes unpack included.
        Raises ClusterError when they are not free.
        """
        note = self.folder / "recipes" / name
        recipe = f"{_METHOD} {recipe}"
        with _locked(self.folder / f"{name}.lock"):
            if not (layer := self._known(note, recipe)):
                self._check_disk(name, gigabytes)
                _say(f"making image layer {name}: {says}")
                start = time.monotonic()
                layer = self._make(name, fill)
                note.write_text(json.dumps({"recipe": recipe, "digest": layer.digest, "size": layer.size}))
                _say(
                    f"made image layer {name} in {time.monotonic() - start:.0f} s, {layer.size / 1e6:.0f} MB"
                )
        return layer

    def prune(self) -> None:
        """Remove the layers that were made anew since."""
        noted = {json.loads(note.read_text())["digest"] for note in (self.folder / "recipes").iterdir()}
        for blob in (self.folder / "blobs").iterdir():
            if blob.name not in noted:
                blob.unlink()

    def _known(self, note: Path, recipe: str) -> Layer | None:
        if not note.exists():
            return None
        made = json.loads(note.read_text())
        layer = Layer(made["digest"], made["size"])
        return layer if made["recipe"] == recipe and self.blob(layer).exists() else None

    def _check_disk(self, name: str, gigabytes: float) -> None:
        free = shutil.disk_usage(self.folder).free / 1e9
        if free < gigabytes:
            raise ClusterError(
                f"image layer {name} takes {gigabytes:g} GB on two nodes and {free:.1f} GB are free at {self.folder}: "
                "free space, or set QLORA_CLUSTER_CACHE to a folder on a larger disk"
            )

    def _make(self, name: str, fill: Callable[[Path], None]) -> Layer:
        scratch = self.folder / f"making-{name}"
        shutil.rmtree(scratch, ignore_errors=True)  # of a program that was killed
        try:
            root = scratch / "root"
            root.mkdir(parents=True)
            fill(root)
            return self._packed(root, scratch / "layer.tar")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _packed(self, root: Path, tar: Path) -> Layer:
        """The folder as a layer; equal files are equal layers, whenever they were written."""
        plain = ["--sort=name", "--mtime=@0", "--numeric-owner", "--hard-dereference", "--format=gnu"]
        _run(["tar", "--create", "--file", str(tar), "--directory", str(root), *plain, "."])
        with tar.open("rb") as file:
            layer = Layer(hashlib.file_digest(file, "sha256").hexdigest(), tar.stat().st_size)
        tar.replace(self.blob(layer))
        return layer


def pause(store: Store) -> Image:
    """The container that holds a pod's network: it sleeps."""
    layer = store.layer("pause", "busybox", _fill_pause, says="seconds", gigabytes=0.1)
    return Image("pause", (layer,), command=("/bin/busybox", "sleep", "2147483647"), user="65535:65535")


def python(store: Store) -> Image:
    """Debian and Python, nothing of the project: for tests of the cluster itself."""
    return Image("python", (base_layer(store),), environment=_environment())


def operator(store: Store) -> Image:
    """The operator with what it needs."""
    locks = [_REPOSITORY / "requirements" / "operator.txt"]
    layers = (base_layer(store), dependency_layer(store, "operator", locks, gigabytes=1), code_layer(store))
    return Image("operator", layers, environment=_environment(), user="1000:1000")


def trainer(store: Store) -> Image:
    """The trainer with what it needs."""
    locks = [_REPOSITORY / "requirements" / name for name in ("trainer.txt", "torch.txt")]
    gigabytes = 5 if os.environ.get("TORCH_INDEX_URL") else 16  # with CUDA libraries, or without
    dependencies = dependency_layer(store, "trainer", locks, gigabytes=gigabytes)
    layers = (base_layer(store), dependencies, code_layer(store))
    return Image("trainer", layers, environment=_environment(), user="1000:1000")


def all_images(store: Store) -> list[Image]:
    """Every image of a node, the pause image first."""
    return [pause(store), python(store), operator(store), trainer(store)]


def base_layer(store: Store) -> Layer:
    """Debian with Python and an empty virtual environment."""
    return store.layer(
        "base", f"{_RELEASE} {_INCLUDE} {VENV} {_UNUSED}", _fill_base, says="1 to 3 minutes", gigabytes=1
    )


def dependency_layer(store: Store, name: str, locks: list[Path], *, gigabytes: float) -> Layer:
    """The packages of the lock files, their hashes checked."""
    base = base_layer(store)
    index = os.environ.get("TORCH_INDEX_URL", "")
    recipe = hashlib.sha256(b"".join(lock.read_bytes() for lock in locks) + index.encode()).hexdigest()

    def fill(root: Path) -> None:
        _install(root / _SITE, locks, index)
        _place_scripts(root)
        _finish(store.blob(base), root)

    return store.layer(
        f"{name}-dependencies",
        recipe,
        fill,
        says="1 to 5 minutes, more when wheels are fetched",
        gigabytes=gigabytes,
    )


def code_layer(store: Store) -> Layer:
    """The project's own wheel, from the working tree."""
    files = sorted(path for path in _sources() if path.is_file() and path.suffix != ".pyc")
    recipe = hashlib.sha256()
    for file in files:
        recipe.update(
            f"{file.relative_to(_REPOSITORY)}\0{file.stat().st_size}\0".encode() + file.read_bytes()
        )

    def fill(root: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            _run(
                [
                    _uv(),
                    "build",
                    "--quiet",
                    "--wheel",
                    "--no-build-isolation",
                    "--python",
                    sys.executable,
                    "--out-dir",
                    scratch,
                    str(_REPOSITORY),
                ]
            )
            wheel = next(Path(scratch).glob("*.whl"))
            _run([*_uv_install(root / _SITE), "--no-deps", str(wheel)])
        _place_scripts(root)

    return store.layer("code", recipe.hexdigest(), fill, says="seconds", gigabytes=0.1)


def _sources() -> Iterator[Path]:
    yield from (_REPOSITORY / name for name in ("pyproject.toml", "README.md", "LICENSE"))
    for folder in ("operator", "trainer"):
        yield from (_REPOSITORY / folder).rglob("*")


def _environment() -> tuple[str, ...]:
    return (
        f"PATH=/{VENV}/bin:/usr/local/bin:/usr/bin:/bin",
        "PYTHONUNBUFFERED=1",
        "PYTHONDONTWRITEBYTECODE=1",
        "LANG=C.UTF-8",
    )


def _fill_pause(root: Path) -> None:
    (root / "bin").mkdir()
    shutil.copy2("/bin/busybox", root / "bin" / "busybox")


def _fill_base(root: Path) -> None:
    _run(["debootstrap", "--variant=minbase", f"--include={_INCLUDE}", _RELEASE, str(root)])
    _run(["chroot", str(root), "python3", "-m", "venv", "--without-pip", f"/{VENV}"])
    for folder in _UNUSED:
        shutil.rmtree(root / folder, ignore_errors=True)


def _install(site: Path, locks: list[Path], torch_index: str) -> None:
    """Install the lock files; torch from another index when one is set, which has other hashes."""
    command = [*_uv_install(site), "--no-deps"]
    from_lock = [lock for lock in locks if not (torch_index and lock.name == "torch.txt")]
    _run([*command, "--require-hashes", *(word for lock in from_lock for word in ("-r", str(lock)))])
    for lock in set(locks) - set(from_lock):
        pin = next(line.split()[0] for line in lock.read_text().splitlines() if line.startswith("torch=="))
        _run([*command, "--index-url", torch_index, pin])


def _uv_install(site: Path) -> list[str]:
    # Links into uv's own cache, which `make setup` has filled: seconds instead of gigabytes fetched.
    return [
        _uv(),
        "pip",
        "install",
        "--quiet",
        "--target",
        str(site),
        "--python-version",
        "3.11",
        "--python-platform",
        "x86_64-manylinux_2_36",
        "--link-mode",
        "hardlink",
    ]


def _place_scripts(root: Path) -> None:
    """Move commands to where the environment has them, and let them start its Python."""
    target = root / VENV / "bin"
    target.mkdir(parents=True)
    for script in (root / _SITE / "bin").iterdir():
        text = _SHEBANG.sub(f"#!/{VENV}/bin/python\n", script.read_text(), count=1)
        (target / script.name).write_text(text)
        (target / script.name).chmod(0o755)
    shutil.rmtree(root / _SITE / "bin")


def _finish(base: Path, root: Path) -> None:
    """Drop what a CPU never loads, and compile the rest, with the very Python that will run it."""
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        _run(["tar", "--extract", "--file", str(base), "--directory", scratch])
        for path in (root / _SITE).iterdir():
            path.rename(Path(scratch, _SITE, path.name))
        chroot = ["chroot", scratch, f"/{VENV}/bin/python"]
        if Path(scratch, _SITE, "torch").exists():
            _drop_unloaded(Path(scratch), chroot)
        # Unchecked, since some packages bring templates that are no Python.
        _run([*chroot, "-m", "compileall", "-q", "-j", "0", *_VALID, f"/{_SITE}"], check=False)
        for path in Path(scratch, _SITE).iterdir():
            path.rename(root / _SITE / path.name)


_LOADED = (
    "import torch, torch.distributed; print(*{line.split()[-1] for line in open('/proc/self/maps') "
    "if '/nvidia/' in line}, sep='\\n')"
)


def _drop_unloaded(root: Path, chroot: list[str]) -> None:
    """Of the CUDA libraries (4 GB), keep those that `import torch` cannot do without.

    torch from the usual index is linked against them. A build for CPUs needs none.
    """
    # In a mount namespace of its own, so that no mount is left behind.
    see = (
        f"mount --bind /proc {shlex.quote(str(root / 'proc'))} && exec {shlex.join([*chroot, '-c', _LOADED])}"
    )
    loaded = set(_run(["unshare", "--mount", "sh", "-c", see]).split())
    for library in (root / _SITE / "nvidia").rglob("*"):
        if library.is_file() and f"/{library.relative_to(root)}" not in loaded:
            library.unlink()
    shutil.rmtree(root / _SITE / "triton", ignore_errors=True)  # compiles for GPUs; 1 GB


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if not found:
        raise ClusterError(f"images need uv, and {beside} is not there: run `make setup`")
    return found


def _run(command: list[str], *, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise ClusterError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def _descriptor(kind: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "digest": f"sha256:{_digest(blob)}", "size": len(blob)}


def _digest(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
