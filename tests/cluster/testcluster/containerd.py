"""A node's container runtime, and the images in it."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from testcluster import cgroups, images
from testcluster.errors import ClusterError
from testcluster.node import Node

SOCKET = "/run/containerd/containerd.sock"
_CTR = ["ctr", "--namespace", "k8s.io"]
_CONTENT = "io.containerd.content.v1.content/blobs/sha256"
_PINNED = "io.cri-containerd.pinned=pinned"
"""Of the pause image, which the kubelet's garbage collection takes for unused when no pod runs."""


def prepare(node: Node, wanted: Sequence[images.Image], store: images.Store) -> None:
    """Start it for a new cluster: with the wanted images, the first of which is the pause image, and no containers."""
    for folder in (node.folder, node.containerd_root):
        folder.mkdir(parents=True, exist_ok=True)
    (node.folder / "containerd.toml").write_text(_config(node, wanted[0]))
    _write_cni(node)
    start(node)
    if _forget_containers(node):  # it has read its own books of them already
        cgroups.kill(node.service_group("containerd"))
        start(node)
    _load(node, wanted, store)


def start(node: Node, *, seconds: float = 30) -> None:
    """Start it as it was before, and wait until it answers."""
    node.boot(["containerd", "--config", str(node.folder / "containerd.toml")])
    deadline = time.monotonic() + seconds
    while not _answers(node):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"containerd of {node.name} does not answer after {seconds:.0f} s: {_end(node)}"
            )
        time.sleep(0.05)


def _forget_containers(node: Node) -> bool:
    """Remove the records of an earlier cluster's containers, none of which runs; whether there were any."""
    containers = node.run([*_CTR, "containers", "list", "--quiet"]).split()
    if containers:
        node.run([*_CTR, "containers", "delete", *containers])
    shutil.rmtree(node.containerd_root / "io.containerd.grpc.v1.cri", ignore_errors=True)
    return bool(containers)


def _load(node: Node, wanted: Sequence[images.Image], store: images.Store) -> None:
    """Bring the images into the node, and remove those of an earlier cluster."""
    digests = {image.digest for image in wanted}
    present = _complete(node)
    new = [image for image in wanted if present.get(image.reference) != image.digest]
    for layer in {layer for image in new for layer in image.layers}:
        _ingest(node, layer, store)
    if new:
        _import(node, new, store)
    node.run([*_CTR, "images", "label", wanted[0].reference, _PINNED])
    if outdated := [name for name, digest in _listed(node).items() if digest not in digests]:
        node.run([*_CTR, "images", "remove", "--sync", *outdated])  # their layers, too


def _listed(node: Node) -> dict[str, str]:
    """The digest of each image in the node, by name."""
    lines = node.run([*_CTR, "images", "list"]).splitlines()[1:]
    return {words[0]: words[2] for words in map(str.split, lines)}


def _complete(node: Node) -> dict[str, str]:
    """Of these, the ones that are whole and unpacked."""
    snapshotter = f"--snapshotter={_snapshotter(node.containerd_root)}"
    lines = node.run([*_CTR, "images", "check", snapshotter]).splitlines()[1:]
    rows = map(str.split, lines)
    return {words[0]: words[2] for words in rows if words[3] == "complete" and words[-1] == "true"}


def _ingest(node: Node, layer: images.Layer, store: images.Store) -> None:
    """Give the node a layer, by a hard link where the disk is the same."""
    blob = store.blob(layer.digest)
    target = node.containerd_root / _CONTENT / layer.digest
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() and target.parent.stat().st_dev == blob.stat().st_dev:
        os.link(blob, target)
    node.run(
        [
            *_CTR,
            "content",
            "ingest",
            f"--expected-digest=sha256:{layer.digest}",
            f"--expected-size={layer.size}",
            f"layer-{layer.digest}",
        ],
        stdin=blob,
    )


def _import(node: Node, new: list[images.Image], store: images.Store) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        images.write_layout(new, Path(scratch, "layout"), store)
        tar = Path(scratch, "layout.tar")
        subprocess.run(["tar", "-cf", tar, "-C", Path(scratch, "layout"), "."], check=True)
        node.run([*_CTR, "images", "import", f"--snapshotter={_snapshotter(node.containerd_root)}", str(tar)])


def _answers(node: Node) -> bool:
    try:
        node.run(["ctr", "version"])
    except ClusterError:
        return False
    return True


def _end(node: Node) -> str:
    return node.log("containerd").read_text(errors="replace")[-2000:]


def _snapshotter(root: Path) -> str:
    """overlayfs, or copies of whole layers where the disk cannot carry an overlay."""
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        for name in ("lower", "upper", "work", "merged"):
            Path(scratch, name).mkdir()
        options = f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work"
        trial = ["mount", "-t", "overlay", "overlay", "-o", options, f"{scratch}/merged"]
        done = subprocess.run(["unshare", "--mount", *trial], capture_output=True, check=False)
    return "overlayfs" if done.returncode == 0 else "native"


def _config(node: Node, pause: images.Image) -> str:
    # startup_delay: else the first collection takes layers whose images are not named yet.
    # restrict_oom_score_adj: where root lacks CAP_SYS_RESOURCE, every pod fails without it.
    return f"""\
version = 2
[plugins."io.containerd.gc.v1.scheduler"]
  startup_delay = "1h"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause.reference}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  disable_apparmor = {str(not Path("/sys/module/apparmor/parameters/enabled").exists()).lower()}
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "{_snapshotter(node.containerd_root)}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  BinaryName = "/usr/sbin/runc"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "{node.folder / "cni-config"}"
"""


def _write_cni(node: Node) -> None:
    """Pods hang on the node's bridge; the machine routes between the bridges."""
    folder = node.folder / "cni-config"
    folder.mkdir(exist_ok=True)
    bridge = {
        "type": "bridge",
        "bridge": node.bridge,
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": node.subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    port_map = {"type": "portmap", "capabilities": {"portMappings": True}}
    config = {"cniVersion": "0.4.0", "name": node.name, "plugins": [bridge, port_map]}
    (folder / "10-bridge.conflist").write_text(json.dumps(config, indent=1))
