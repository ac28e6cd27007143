"""The Debian packages under the nodes: which are missing, and installing them."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from testcluster.errors import ClusterError

PACKAGES = {
    "containerd": "/usr/bin/containerd",
    "runc": "/usr/sbin/runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iproute2": "/sbin/ip",
    "iptables": "/usr/sbin/iptables",
    "nftables": "/usr/sbin/nft",
    "buildah": "/usr/bin/buildah",
    "skopeo": "/usr/bin/skopeo",
    "debootstrap": "/usr/sbin/debootstrap",
    "busybox-static": "/bin/busybox",
}
"""Each package with a file of it, by which it is known to be there."""
_POLICY = Path("/usr/sbin/policy-rc.d")


def missing() -> list[str]:
    """The packages that this machine lacks."""
    return [package for package, file in PACKAGES.items() if not Path(file).exists()]


def ensure() -> None:
    """Install what is missing. Raises ClusterError with what to install where that cannot be done."""
    wanted = missing()
    if not wanted:
        return
    by_hand = f"install them by hand: apt-get install --no-install-recommends {' '.join(wanted)}"
    if not shutil.which("apt-get"):
        raise ClusterError(
            f"the nodes need {', '.join(wanted)}, and this is no Debian: install what holds "
            f"{', '.join(PACKAGES[package] for package in wanted)}"
        )
    if os.geteuid() != 0:
        raise ClusterError(f"the nodes need {', '.join(wanted)} and only root can install them; {by_hand}")
    print(f"installing {', '.join(wanted)} (up to a minute)", file=sys.stderr, flush=True)
    with _services_stay_off():
        _apt(["apt-get", "update", "-qq"], by_hand)
        _apt(["apt-get", "install", "-qq", "--no-install-recommends", *wanted], by_hand)
    if still := missing():
        raise ClusterError(f"apt-get ended well but {', '.join(still)} are not there; {by_hand}")


def _apt(command: list[str], by_hand: str) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)} failed: {done.stderr.strip()[-1000:]}; {by_hand}")


@contextlib.contextmanager
def _services_stay_off() -> Iterator[None]:
    """Keep the packages from starting their services: the nodes start containerds of their own."""
    if _POLICY.exists():  # the machine has its own policy
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()
