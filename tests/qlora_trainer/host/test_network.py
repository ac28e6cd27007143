"""Interfaces of the machine that runs the tests."""

import ipaddress
import socket

import psutil
import pytest

from qlora_trainer.host import network

IF_INET6 = """\
fe80000000000000505400fffe123456 02 40 20 80     eth0
00000000000000000000000000000001 01 80 10 80       lo
fd000000000000000000000000000002 04 40 00 82     eth1
"""


def first_addresses(family: socket.AddressFamily) -> list[tuple[str, str]]:
    """Interface and address, for each interface that has one of this family."""
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        own = [entry.address.partition("%")[0] for entry in addresses if entry.family == family]
        found += [(name, own[0])] if own else []
    return found


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_each_address_leads_to_its_interface(family: socket.AddressFamily) -> None:
    """An address of this machine is found on the interface that has it."""
    addresses = first_addresses(family)

    assert addresses == [(network.interface_of(address), address) for _, address in addresses]


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1"])
def test_loopback_addresses_lead_to_the_loopback_interface(address: str) -> None:
    """All of 127.0.0.0/8 is reached over loopback, though it has one address only."""
    expected = next(name for name, own in first_addresses(socket.AF_INET) if own.startswith("127."))

    assert network.interface_towards(address) == expected


@pytest.mark.parametrize("address", ["203.0.113.77", "2001:db8::77"])
def test_a_foreign_address_has_no_interface(address: str) -> None:
    """An address that is not ours is on no interface."""
    assert network.interface_of(address) is None


def test_our_own_address_is_its_own_route() -> None:
    """Rank 0 finds its interface by the route to itself."""
    assert network.local_address("127.0.0.1") == "127.0.0.1"


def test_if_inet6_is_read() -> None:
    """The kernel's table of IPv6 addresses gives each address its interface."""
    assert network.parse_if_inet6(IF_INET6) == {
        ipaddress.IPv6Address("fe80::5054:ff:fe12:3456"): "eth0",
        ipaddress.IPv6Address("::1"): "lo",
        ipaddress.IPv6Address("fd00::2"): "eth1",
    }


def test_a_loopback_listener_is_not_reachable_from_outside() -> None:
    """On one machine nothing is opened to the network."""
    with network.listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_another_listener_is_reachable_by_every_address() -> None:
    """Between hosts rank 0 listens on every address, IPv4 included."""
    with network.listen("203.0.113.77", 0) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            assert client.getpeername()[1] == port


def test_a_connection_does_not_meet_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody listens on an ephemeral port, TCP may connect a socket to itself; that counts as refused."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])

    def to_itself(address: tuple[str, int], timeout: float) -> socket.socket:
        sock = socket.socket()
        sock.bind(address)
        sock.connect(address)
        return sock

    monkeypatch.setattr(socket, "create_connection", to_itself)
    with pytest.raises(ConnectionRefusedError, match="refused"):
        network.connect("127.0.0.1", port, 5)


def test_a_connection_reaches_a_listener() -> None:
    """Whoever listens is connected to, by name."""
    with network.listen("127.0.0.1", 0) as listener:
        port = int(listener.getsockname()[1])
        with network.connect("localhost", port, 10) as sock:
            assert sock.getpeername()[1] == port
