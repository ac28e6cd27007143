"""TCP sockets between launchers or ranks, and which of our network interfaces leads to another host.

gloo by itself binds the address that the host's own name resolves to, which is 127.0.0.1 on many hosts; so we name
the interface, by the route to rank 0.
"""

import errno
import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
_IF_INET6 = Path("/proc/net/if_inet6")
_DISCARD_PORT = 9


def resolve(host: str, port: int) -> str:
    """The first address of a host. Raises OSError while the name does not resolve, as that of a new pod."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return str(found[0][4][0])


def is_loopback(address: str) -> bool:
    """Whether the address can be reached from this host only."""
    return ipaddress.ip_address(address).is_loopback


def local_address(remote: str) -> str:
    """Our address on the route to a remote address; the remote itself when it is ours. Sends nothing.

    Raises:
        OSError: there is no route.
    """
    family = socket.AF_INET6 if ":" in remote else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((remote, _DISCARD_PORT))  # of a datagram socket: only asks the kernel for the route
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The name of the interface that has an address; None when none has it."""
    if ":" in address:
        addresses = parse_if_inet6(_IF_INET6.read_text()) if _IF_INET6.exists() else {}
        return addresses.get(ipaddress.IPv6Address(address.partition("%")[0]))
    own = {name: _ipv4_of(name) or "" for _, name in socket.if_nameindex()}
    if is_loopback(address):
        # All of 127.0.0.0/8 belongs to the loopback interface, though it has only one address.
        return next((name for name, ipv4 in own.items() if ipv4.startswith("127.")), None)
    return next((name for name, ipv4 in own.items() if ipv4 == address), None)


def parse_if_inet6(text: str) -> dict[ipaddress.IPv6Address, str]:
    """Address -> interface name, from the text of /proc/net/if_inet6."""
    rows = [line.split() for line in text.splitlines()]
    return {ipaddress.IPv6Address(bytes.fromhex(row[0])): row[-1] for row in rows if row}


def interface_towards(remote: str) -> str:
    """The name of the interface that leads to a remote address.

    Raises:
        OSError: there is no route, or no interface has our address on it; the text names both addresses.
    """
    address = local_address(remote)
    if name := interface_of(address):
        return name
    raise OSError(f"no network interface has {address}, our address on the route to {remote}")


def listen(address: str, port: int) -> socket.socket:
    """A listening TCP socket: on loopback only when `address` is loopback, else on every address.

    Every address, because a pod's host name may stand for one that is translated on the way. Port 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """
    if is_loopback(address):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """A TCP connection to a host that listens.

    Raises:
        OSError: the name does not resolve, nothing listens, or nothing answers within `timeout` seconds.
    """
    sock = socket.create_connection((host, port), timeout=timeout)
    # While nothing listens on an ephemeral port, a connection to it can connect to itself.
    if sock.getsockname()[:2] == sock.getpeername()[:2]:
        sock.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return sock


def _ipv4_of(interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
        except OSError:  # an interface without an IPv4 address
            return None
    return socket.inet_ntoa(answer[20:24])
