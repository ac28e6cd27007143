"""Addresses and routes of the nodes, and breaking the link between their pods."""

import ipaddress
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from testcluster import cgroups
from testcluster.errors import ClusterError
from testcluster.node import Node, spawn

HOST_BRIDGE = "qlora0"
HOST_ADDRESS = "10.77.0.1"
"""Of the API server and of DNS; the machine's own, reachable from every pod."""
DELAY_DEVICE = "qlora-delay"
DELAY_GROUP = "delay"
_TABLE = "qlora-nodes"
"""The nft table of the cut link."""
_ROUTES = "7707"
"""The routing table of the delayed link, and the preference of its rules."""
_FORWARD = ["FORWARD", "-i", "qlora+", "-j", "ACCEPT"]
_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


def up(nodes: Sequence[Node]) -> None:
    """Make the bridges and give the machine the nodes' addresses."""
    _ip("link", "add", HOST_BRIDGE, "type", "bridge")
    for address in (HOST_ADDRESS, *(node.address for node in nodes)):
        _ip("address", "add", f"{address}/32", "dev", HOST_BRIDGE)
    _ip("link", "set", HOST_BRIDGE, "up")
    for node in nodes:
        subnet = ipaddress.ip_network(node.subnet)
        _ip("link", "add", node.bridge, "type", "bridge")
        _ip("address", "add", f"{subnet[1]}/{subnet.prefixlen}", "dev", node.bridge)
        _ip("link", "set", node.bridge, "up")
    _FORWARDING.write_text("1")
    if "filter" in _nft_tables():  # Docker, for one, forbids what it does not know
        _run("iptables", "-I", *_FORWARD)


def forwarding() -> str:
    """Whether the machine forwards packets: "1" or "0"."""
    return _FORWARDING.read_text().strip()


def down(nodes: Sequence[Node], forwarding_before: str) -> None:
    """Remove every trace of `up`, of the pods, and of a broken link."""
    heal(nodes)
    for device in (HOST_BRIDGE, *(node.bridge for node in nodes)):
        _ip("link", "delete", device, check=False)
    if "filter" in _nft_tables():
        _run("iptables", "-D", *_FORWARD, check=False)
    _FORWARDING.write_text(forwarding_before)


def cut(a: Node, b: Node) -> None:
    """Drop every packet between the pods of the two nodes, both ways, established connections too."""
    chain = f"add chain ip {_TABLE} forward {{ type filter hook forward priority -10; }}"
    rules = [
        f"add rule ip {_TABLE} forward ip saddr {x.subnet} ip daddr {y.subnet} drop"
        for x, y in ((a, b), (b, a))
    ]
    script = "\n".join([f"add table ip {_TABLE}", f"flush table ip {_TABLE}", chain, *rules])
    _run("nft", script)


def delay(a: Node, b: Node, milliseconds: float, log: Path) -> None:
    """Hold every packet between the pods of the two nodes for so long, each way."""
    heal((a, b))
    _ip("tuntap", "add", DELAY_DEVICE, "mode", "tun")
    # Packets come back out of this device with the addresses of pods behind others.
    Path(f"/proc/sys/net/ipv4/conf/{DELAY_DEVICE}/rp_filter").write_text("2")
    _ip("link", "set", DELAY_DEVICE, "mtu", "1500", "up")
    program = Path(__file__).with_name("delay.py")
    spawn([sys.executable, "-I", "-S", str(program), DELAY_DEVICE, str(milliseconds)], DELAY_GROUP, log)
    _ip("route", "add", "default", "dev", DELAY_DEVICE, "table", _ROUTES)
    for x, y in ((a, b), (b, a)):
        _ip("rule", "add", "pref", _ROUTES, "iif", x.bridge, "to", y.subnet, "table", _ROUTES)


def heal(nodes: Sequence[Node]) -> None:
    """End what `cut` and `delay` do."""
    if _TABLE in _nft_tables():
        _run("nft", f"delete table ip {_TABLE}")
    for _ in nodes:
        _ip("rule", "delete", "pref", _ROUTES, check=False)
    cgroups.kill(DELAY_GROUP)
    _ip("link", "delete", DELAY_DEVICE, check=False)


def _nft_tables() -> set[str]:
    """The names of the tables for IPv4."""
    listing = subprocess.run(
        ["nft", "--json", "list", "tables", "ip"], capture_output=True, text=True, check=False
    )
    if listing.returncode != 0:
        raise ClusterError(f"nft list tables failed: {listing.stderr.strip()}")
    return {entry["table"]["name"] for entry in json.loads(listing.stdout)["nftables"] if "table" in entry}


def _ip(*words: str, check: bool = True) -> bool:
    return _run("ip", *words, check=check)


def _run(program: str, *words: str, check: bool = True) -> bool:
    """Whether the command succeeded; with `check`, it must."""
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise ClusterError(f"{program} {' '.join(words)} failed: {done.stderr.strip()}")
    return done.returncode == 0
