"""What gloo reads from the environment, and what its errors mean."""

import re
from collections.abc import Mapping

from qlora_trainer.errors import CollectiveError, CollectiveTimeout, PeerLost, RendezvousError
from qlora_trainer.host.network import interface_towards

INTERFACE_ENV = "GLOO_SOCKET_IFNAME"
LAZY_ENV = "TORCH_GLOO_LAZY_INIT"
LAZY_ABOVE = 32
"""World size above which pairs of ranks connect only when they first talk: full meshes of more than
about 60 nodes have been seen to fail."""

_TIMED_OUT = re.compile(r"tim(?:ed?|ing)[ -]?out", re.IGNORECASE)
_BROKEN = re.compile(
    r"connection (?:closed|reset|refused)|broken pipe|reset by peer|socket closed", re.IGNORECASE
)


def settings(interface: str, size: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables to set before the group is made; what the user set is kept."""
    wanted = {INTERFACE_ENV: interface}
    if size > LAZY_ABOVE:
        wanted[LAZY_ENV] = "1"
    return {name: value for name, value in wanted.items() if not environ.get(name)}


def settings_towards(address: str, size: int, environ: Mapping[str, str]) -> dict[str, str]:
    """`settings` with the interface on the route to an address. Raises RendezvousError when there is none."""
    if environ.get(INTERFACE_ENV):
        return settings("", size, environ)
    try:
        return settings(interface_towards(address), size, environ)
    except OSError as error:
        raise RendezvousError(f"{error}: set {INTERFACE_ENV} to the name of one that all ranks use") from None


def collective_error(operation: str, text: str) -> CollectiveError:
    """The error that a backend's text stands for: a peer that is gone, or one that does not answer."""
    line = one_line(text)
    if _TIMED_OUT.search(line):
        return CollectiveTimeout(f"{operation} timed out: {line}")
    if _BROKEN.search(line):
        return PeerLost(f"{operation} lost a peer: {line}")
    return CollectiveError(f"{operation} failed: {line}")


def one_line(text: str) -> str:
    """A C++ exception's text in one line, without its source path, stack and general advice."""
    message = re.split(r"\nException raised from|\. This is typically", text.strip())[0]
    message = re.sub(r"^\[[^\]]*\.(?:cc|cpp|h|hpp):\d+\]\s*", "", message)
    return " ".join(message.split())
