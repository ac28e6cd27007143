"""Clusters for hand work: `python -m testcluster up --tier api`, `env`, `volume`, `down`."""

import argparse
import sys
import time
from pathlib import Path

from testcluster import control_plane, volumes
from testcluster.binaries import PROGRAMS, TIERS, ensure
from testcluster.client import Client
from testcluster.control_plane import ControlPlane
from testcluster.errors import ClusterError
from testcluster.fleet import Fleet

CLUSTERS = Path(__file__).parents[3] / ".cache" / "cluster"
"""One folder per cluster, by its name, and beside it a file <name>.tier."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    options = _parser().parse_args(arguments)
    folder = CLUSTERS / options.name
    try:
        if options.command == "up":
            _up(folder, options)
        elif options.command == "down":
            _down(folder)
        elif options.command == "build":
            _build(options.tier, options.program)
        elif options.command == "volume":
            _volume(folder, options.namespace, options.claim)
        else:
            _env(folder)
    except ClusterError as error:
        print(f"testcluster: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="testcluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster, anew if it runs")
    up.add_argument("--tier", choices=TIERS, default="api")
    up.add_argument("--nodes", type=int, default=50, help="tier fleet: how many nodes (50)")
    up.add_argument(
        "--label", action="append", default=[], metavar="KEY=VALUE", help="tier fleet: of every node"
    )
    up.add_argument("--cpu", default="32", help="tier fleet: of every node (32)")
    up.add_argument("--memory", default="256Gi", help="tier fleet: of every node (256Gi)")
    up.add_argument("--audit", action="store_true", help="write <folder>/audit.log")
    build = commands.add_parser("build", help="build what a tier needs, and start nothing")
    build.add_argument("--tier", choices=TIERS, default="api")
    build.add_argument(
        "--program", choices=PROGRAMS, action="append", default=[], help="and this one; may be repeated"
    )
    down = commands.add_parser("down", help="end a cluster and remove every trace of it")
    env = commands.add_parser("env", help="print what to export so that kubectl reaches it")
    volume = commands.add_parser(
        "volume", help="tier nodes: make a namespace and, in it, a claim that all its pods share"
    )
    volume.add_argument("namespace")
    volume.add_argument("claim")
    for command in (up, build, down, env, volume):
        command.add_argument("--name", default="default", help="of the cluster (default)")
    return parser


def _up(folder: Path, options: argparse.Namespace) -> None:
    _down(folder)
    ensure(options.tier, "helm")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _tier_file(folder).write_text(options.tier)
    start = time.monotonic()
    if options.tier == "nodes":
        from testcluster import nodes  # needs root and Linux

        nodes.up(folder, audit=options.audit, detached=True)
    else:
        _up_without_nodes(folder, options)
    seconds = time.monotonic() - start
    again = "" if options.name == "default" else f" --name {options.name}"
    print(f'ready in {seconds:.1f} s: {folder}\nto use it: eval "$(python -m testcluster env{again})"')


def _build(tier: str, programs: list[str]) -> None:
    ensure(tier, "helm", *programs)
    if tier == "nodes":
        from testcluster import images, packages

        packages.ensure()
        images.all_images(images.Store())


def _up_without_nodes(folder: Path, options: argparse.Namespace) -> None:
    cluster = ControlPlane.start(folder, audit=options.audit, detached=True)
    if options.tier == "fleet":
        labels = dict(label.partition("=")[::2] for label in options.label)
        fleet = Fleet.start(cluster)
        fleet.add_nodes(options.nodes, labels=labels, cpu=options.cpu, memory=options.memory)
    cluster.let_go()


def _down(folder: Path) -> None:
    tier = _tier_file(folder)
    if tier.is_file() and tier.read_text() == "nodes":
        from testcluster import nodes

        nodes.down(folder)
    control_plane.down(folder)
    tier.unlink(missing_ok=True)


def _env(folder: Path) -> None:
    print(f"export KUBECONFIG={_kubeconfig(folder)}")
    programs = ensure("api", "helm")
    folders = dict.fromkeys(str(programs[name].parent) for name in ("kubectl", "helm"))
    print(f"export PATH={':'.join(folders)}:$PATH")
    if _tier_file(folder).read_text() == "nodes":
        from testcluster import images

        for image in images.all_images(images.Store()):
            print(f"export QLORA_{image.name.upper()}_IMAGE={image.reference}")


def _kubeconfig(folder: Path) -> Path:
    places = (folder, folder / "control-plane")  # the second is the nodes tier's
    found = next((file for place in places if (file := place / "admin.kubeconfig").is_file()), None)
    if found is None:
        raise ClusterError(f"there is no cluster in {folder}: start one with `make cluster-up`")
    return found


def _volume(folder: Path, namespace: str, claim: str) -> None:
    client = Client(_kubeconfig(folder))
    try:
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        client.post("/api/v1/namespaces", {"metadata": {"name": namespace, "labels": labels}})
        print(volumes.shared_volume(client, folder / "volumes", namespace, claim))
    finally:
        client.close()


def _tier_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.tier")


if __name__ == "__main__":
    sys.exit(main())
