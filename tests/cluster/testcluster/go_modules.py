"""Builds programs from Go modules whose versions and checksums are locked in `modules/`."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from testcluster.errors import ClusterError

MODULES = Path(__file__).parent.parent / "modules"
"""One folder per component, with the go.mod and go.sum that lock it."""
PATHS = {
    "kubernetes": "k8s.io/kubernetes",
    "etcd": "go.etcd.io/etcd/server/v3",
    "coredns": "github.com/coredns/coredns",
    "helm": "helm.sh/helm/v4",
    "kserve": "github.com/kserve/kserve",
    "kueue": "sigs.k8s.io/kueue",
    "kwok": "sigs.k8s.io/kwok",
    "registry": "github.com/distribution/distribution/v3",
    "syft": "github.com/anchore/syft",
    "ollama": "github.com/ollama/ollama",
}
"""The Go module of each component."""


def locked_version(component: str) -> str:
    """The version that `modules/` locks, such as 1.36.3."""
    text = (MODULES / component / "go.mod").read_text()
    found = re.search(rf"^require {re.escape(PATHS[component])} v(\S+)$", text, re.MULTILINE)
    assert found, f"modules/{component}/go.mod requires {PATHS[component]}"
    return found[1]


def sources(component: str) -> Path:
    """The folder of the component's own files, in the locked version and with its checksum checked.

    Raises ClusterError when Go is missing, or the module cannot be had.
    """
    downloaded = json.loads(_go(["mod", "download", "-json", PATHS[component]], MODULES / component))
    return Path(downloaded["Dir"])


def build(component: str, version: str, package: str, target: Path) -> None:
    """Compile one package of the component into the file `target`.

    Raises ClusterError when Go is missing or too old, or when it fails.
    """
    flags = ["-trimpath", "-ldflags", f"-s -w {_stamp(component, version)}".strip()]
    with _module(component, version) as folder:
        _go(["build", *flags, "-o", str(target), package], folder)


def _stamp(component: str, version: str) -> str:
    """What a program says of its own version, where it is not read from the module."""
    if component != "kubernetes":
        return ""
    major, minor, _ = version.split(".", 2)
    values = {"gitVersion": f"v{version}", "gitMajor": major, "gitMinor": minor}
    return " ".join(f"-X k8s.io/component-base/version.{key}={value}" for key, value in values.items())


@contextmanager
def _module(component: str, version: str) -> Iterator[Path]:
    """The folder to build in: the locked one, or a copy of it that is rewritten for another version."""
    if version == locked_version(component):
        yield MODULES / component
        return
    with tempfile.TemporaryDirectory(prefix=f"{component}-{version}-") as name:
        folder = Path(name)
        shutil.copy(MODULES / component / "tools.go", folder)
        downloaded = json.loads(_go(["mod", "download", "-json", f"{PATHS[component]}@v{version}"]))
        upstream = Path(downloaded["GoMod"]).read_text()
        (folder / "go.mod").write_text(other_go_mod(component, version, upstream))
        _go(["mod", "tidy"], folder, mode="mod")
        yield folder


def other_go_mod(component: str, version: str, upstream: str) -> str:
    """A go.mod for another version than the locked one; `upstream` is the text of the component's own go.mod.

    What that replaces by folders of its own repository is replaced by what was published from them.
    """
    go = re.search(r"^go (\S+)$", upstream, re.MULTILINE)
    assert go, f"go.mod of {component} {version} names its Go"
    staged = re.findall(r"^\s*(?:replace )?(\S+) => \./staging/", upstream, re.MULTILINE)
    published = f"v0.{version.split('.', 1)[1]}"
    lines = [
        f"module qlora.dev/tests/cluster/{component}",
        f"go {go[1]}",
        f"require {PATHS[component]} v{version}",
        *(f"replace {module} => {module} {published}" for module in staged),
    ]
    return "".join(f"{line}\n" for line in lines)


def _go(arguments: list[str], folder: Path | None = None, mode: str = "readonly") -> str:
    """What the go command prints, run in the folder of a module or in none."""
    go = shutil.which("go")
    if go is None:
        raise ClusterError(
            "Go is not installed: install Go 1.26 or newer (https://go.dev/dl), or set KUBEBUILDER_ASSETS to "
            "a folder with kube-apiserver, etcd and kubectl and put the other programs on PATH"
        )
    flags = f"-buildvcs=false -mod={mode}" if folder else ""  # -mod is refused outside a module
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": flags}
    command = [go, *arguments]
    where = folder or "/"
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(_why(arguments, done.stderr or done.stdout))
    return done.stdout


def _why(arguments: list[str], output: str) -> str:
    if "requires go >=" in output:
        return (
            f"Go is too old: {output.strip()}; install that version or newer (https://go.dev/dl), "
            "or set GOTOOLCHAIN=auto so that Go fetches it itself"
        )
    if "no space left on device" in output:
        return (
            f"the disk filled up in `go {arguments[0]}`: free space, or set GOCACHE, GOTMPDIR and GOMODCACHE "
            "to folders on a larger disk"
        )
    return f"`go {' '.join(arguments)}` failed:\n{output[-4000:].strip()}"
