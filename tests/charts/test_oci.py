"""The chart as it is released: an archive, in a registry."""

import hashlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from testcluster import binaries
from testcluster.chart import CHART, helm
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster

MANIFESTS = Path(__file__).parents[2] / "manifests"


@pytest.fixture(scope="module")
def release() -> Iterator[Any]:
    """The program that makes releases."""
    sys.path.insert(0, str(MANIFESTS))
    spec = importlib.util.spec_from_file_location("release", MANIFESTS / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(MANIFESTS))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """Host and port of an empty registry."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "data")}},
        "http": {"addr": address},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with (tmp_path / "log").open("wb") as log:
        command = [str(binaries.built("registry")), "serve", str(tmp_path / "config.yaml")]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: _listens(address), or_else=lambda: (tmp_path / "log").read_text())
        yield address
    finally:
        process.kill()
        process.wait()


def _listens(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_a_chart_is_the_same_whenever_it_is_packaged(release: Any, tmp_path: Path) -> None:
    """Two checkouts, whose files have other times, make the same archive."""
    program = str(binaries.ensure("api", "helm")["helm"])
    made = []
    for when in (1_000_000_000, 1_500_000_000):
        chart = tmp_path / str(when) / CHART.name
        shutil.copytree(CHART, chart)
        for path in chart.rglob("*"):
            os.utime(path, (when, when))
        assert release.package_chart(program, chart, chart.parent) is None
        made.append(next(chart.parent.glob("*.tgz")).read_bytes())

    assert made[0] == made[1]


def test_a_chart_comes_out_of_a_registry_as_it_went_in(release: Any, registry: str, tmp_path: Path) -> None:
    """Pushed and pulled as an OCI artifact, by version and by the digest that the push says."""
    program = str(binaries.ensure("api", "helm")["helm"])
    for name in ("dist", "by-version", "by-digest"):
        (tmp_path / name).mkdir()
    assert release.package_chart(program, CHART, tmp_path / "dist") is None
    (archive,) = (tmp_path / "dist").iterdir()

    said = helm("push", str(archive), f"oci://{registry}/charts", "--plain-http")
    digest = re.search(r"Digest: (sha256:[0-9a-f]{64})", said)
    assert digest is not None
    named = f"oci://{registry}/charts/{CHART.name}"
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    for name, what in {
        "by-version": [named, "--version", version],
        "by-digest": [f"{named}@{digest[1]}"],
    }.items():
        helm("pull", *what, "--plain-http", "--destination", str(tmp_path / name))
        (pulled,) = (tmp_path / name).iterdir()
        assert hashlib.sha256(pulled.read_bytes()).digest() == hashlib.sha256(archive.read_bytes()).digest()
