"""build.sh picks what builds, and lists what it built."""

import importlib.metadata
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from testcluster import binaries, images
from testcluster.images import Buildah

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "images" / "build.sh"
LOCKS = {
    "operator": {"operator.txt": ".*"},
    "trainer": {"trainer.txt": ".*", "torch.txt": "torch", "backends.txt": "impi-rt|oneccl-cpu-devel|tcmlib"},
}
"""What of each lock file is in the image: of the libraries for GPUs only a part is kept, and of oneCCL its licence."""


def run(environment: Mapping[str, str], *targets: str) -> subprocess.CompletedProcess[str]:
    """What build.sh says."""
    return subprocess.run(
        ["/bin/sh", SCRIPT, *targets], env=dict(environment), capture_output=True, text=True, check=False
    )


def without_builders(folder: Path) -> dict[str, str]:
    """An environment with neither docker, podman nor buildah."""
    for name in ("date", "dirname", "sed"):
        (folder / name).symlink_to(f"/usr/bin/{name}")
    return {"PATH": str(folder), "HOME": str(folder)}


def test_without_a_builder_it_says_what_to_install(tmp_path: Path) -> None:
    """On a machine without docker, podman and buildah the message says so and what to install."""
    done = run(without_builders(tmp_path))

    assert done.returncode == 1
    assert "neither docker, podman nor buildah works here: install one" in done.stderr


def test_a_docker_without_its_daemon_is_passed_over(tmp_path: Path) -> None:
    """A client that reaches no daemon is no builder: the next one is taken."""
    environment = without_builders(tmp_path)
    for name, script in {
        "docker": "exit 1",
        "podman": "exit 1",
        "buildah": 'echo "asked: $*" >&2; exit 7',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    done = run({**environment, "BASE_IMAGE": "some/base:1"})

    assert done.returncode == 7
    assert "asked: build --quiet --build-arg BASE_IMAGE=some/base:1" in done.stderr


@pytest.mark.nodes
@pytest.mark.timeout(900)  # the first compiles syft
@pytest.mark.parametrize("name", ["operator", "trainer"])
def test_the_sbom_lists_what_is_in_the_image(name: str, built) -> None:
    """The SPDX document lists every Python and Debian package of the image with its version, and those locked."""
    with tempfile.TemporaryDirectory(dir=built[name].store.folder) as folder:  # on the layers' own disk
        listed = packages_of(sbom(built[name], Path(folder)))

    site = next(built[name].root.glob("opt/venv/lib/python3*/site-packages"))
    installed = {normal(one.name): one.version for one in importlib.metadata.distributions(path=[str(site)])}
    assert installed.items() <= listed["pypi"].items()
    assert debian(built[name].root).items() <= listed["deb"].items()
    assert installed["qlora-operator"] == images.tag(name).rpartition(":")[2]
    assert locked(name).items() <= installed.items()
    assert listed["pypi"].keys() - installed.keys() <= vendored(site)


@pytest.mark.nodes
def test_build_writes_the_sbom(buildah: Buildah, built) -> None:
    """With SYFT the script leaves the SPDX document of what it built in dist/."""
    environment = {**os.environ, **buildah.environment, "BASE_IMAGE": "debootstrap", "SYFT": syft()}

    done = run(environment, "operator")

    assert done.returncode == 0, done.stderr
    version = images.tag("operator").rpartition(":")[2]
    document = json.loads((REPOSITORY / "dist" / f"qlora-operator-{version}.spdx.json").read_text())
    assert document["spdxVersion"] == "SPDX-2.3"
    assert document["name"] == "qlora-operator"


def syft() -> str:
    """The program, built if need be."""
    return str(binaries.built("syft"))


def sbom(built: Any, folder: Path) -> dict[str, Any]:
    """The image's SPDX document."""
    layout = folder / "layout"
    images.write_layout([built.image], layout, built.store)
    index = json.loads((layout / "index.json").read_text())
    (layout / "index.json").write_text(json.dumps({**index, "manifests": index["manifests"][:1]}))
    for layer in built.image.layers:
        os.link(built.store.blob(layer.digest), layout / "blobs" / "sha256" / layer.digest)
    command = [syft(), "scan", "--quiet", f"oci-dir:{layout}", "--output", f"spdx-json={folder}/sbom.json"]
    subprocess.run(command, env={**os.environ, "TMPDIR": str(folder)}, check=True)
    return json.loads((folder / "sbom.json").read_text())


def packages_of(document: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The versions by name, by the kind of package."""
    assert document["spdxVersion"] == "SPDX-2.3"
    found: dict[str, dict[str, str]] = {"pypi": {}, "deb": {}}
    for package in document["packages"]:
        for reference in package.get("externalRefs", []):
            if kind := re.match(r"pkg:(pypi|deb)/", reference["referenceLocator"]):
                found[kind[1]][normal(package["name"])] = package["versionInfo"]
    return found


def debian(root: Path) -> dict[str, str]:
    """What dpkg has installed."""
    paragraphs = (root / "var/lib/dpkg/status").read_text().strip().split("\n\n")
    fields = [dict(re.findall(r"(?m)^(\S+): (.*)$", paragraph)) for paragraph in paragraphs]
    return {normal(one["Package"]): one["Version"] for one in fields if one["Status"].endswith(" installed")}


def locked(name: str) -> dict[str, str]:
    """What the lock files name for the Python of the image, which is Debian's 3.11 on Linux."""
    lines = [
        line.removesuffix("\\")
        for lock, kept in LOCKS[name].items()
        for line in (REPOSITORY / "requirements" / lock).read_text().splitlines()
        if re.match(rf"(?=[a-z0-9])({kept})==", line)
    ]
    wanted = [Requirement(line) for line in lines]
    image = {"python_version": "3.11", "python_full_version": "3.11.2", "sys_platform": "linux"}
    return {
        normal(one.name): str(one.specifier).removeprefix("==")
        for one in wanted
        if one.marker is None or one.marker.evaluate(image)
    }


def vendored(site: Path) -> set[str]:
    """What installed packages carry copies of."""
    folders = [str(folder) for folder in site.glob("*/_vendor")]
    return {normal(one.name) for one in importlib.metadata.distributions(path=folders)}


def normal(name: str) -> str:
    """The name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
