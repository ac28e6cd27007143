"""gloo's settings and its error texts."""

import pytest

from qlora_trainer.distributed.backends import gloo
from qlora_trainer.errors import CollectiveError, CollectiveTimeout, PeerLost, RendezvousError

pytestmark = pytest.mark.process

CLOSED = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:13442. "
    "This is typically caused by a remote worker crashing. Check the logs."
)
RESET = "[/pytorch/gloo/transport/tcp/pair.cc:560] Read error [10.0.0.3]:33672: Connection reset by peer"
TIMED_OUT = "[/pytorch/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation to complete"
PAIR_CLOSED = "Application timeout caused pair closure"
INVALID = "Invalid scalar type\nException raised from allreduce at x.cpp:1\nframe #0: c10::Error"


@pytest.mark.parametrize(
    ("size", "environ", "expected"),
    [
        pytest.param(2, {}, {"GLOO_SOCKET_IFNAME": "eth0"}, id="small"),
        pytest.param(2, {"GLOO_SOCKET_IFNAME": "ib0"}, {}, id="the-user's-stays"),
        pytest.param(
            64,
            {},
            {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_GLOO_LAZY_INIT": "1"},
            id="large-worlds-connect-late",
        ),
        pytest.param(
            64, {"TORCH_GLOO_LAZY_INIT": "0"}, {"GLOO_SOCKET_IFNAME": "eth0"}, id="unless-told-not-to"
        ),
    ],
)
def test_settings(size: int, environ: dict[str, str], expected: dict[str, str]) -> None:
    """One concrete interface is named, and large worlds connect lazily, unless the user said otherwise."""
    assert gloo.settings("eth0", size, environ) == expected


def test_a_host_without_a_route_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no interface leads to rank 0, the sentence says what to set; who has set it is not asked for a route."""

    def unreachable(address: str) -> str:
        raise OSError(f"no network interface has {address}")

    monkeypatch.setattr(gloo, "interface_towards", unreachable)

    assert gloo.settings_towards("192.0.2.1", 2, {"GLOO_SOCKET_IFNAME": "ib0"}) == {}
    with pytest.raises(RendezvousError, match=r"192\.0\.2\.1: set GLOO_SOCKET_IFNAME to the name"):
        gloo.settings_towards("192.0.2.1", 2, {})


@pytest.mark.parametrize(
    ("text", "kind", "sentence"),
    [
        pytest.param(
            CLOSED,
            PeerLost,
            "all-reduce lost a peer: Connection closed by peer [127.0.0.1]:13442",
            id="closed",
        ),
        pytest.param(
            RESET,
            PeerLost,
            "all-reduce lost a peer: Read error [10.0.0.3]:33672: Connection reset by peer",
            id="reset",
        ),
        pytest.param(
            TIMED_OUT,
            CollectiveTimeout,
            "all-reduce timed out: Timed out waiting 5000ms for recv operation to complete",
            id="timed-out",
        ),
        pytest.param(
            PAIR_CLOSED, CollectiveTimeout, f"all-reduce timed out: {PAIR_CLOSED}", id="pair-closed"
        ),
        pytest.param(INVALID, CollectiveError, "all-reduce failed: Invalid scalar type", id="neither"),
    ],
)
def test_a_lost_peer_is_told_from_a_silent_one(text: str, kind: type[CollectiveError], sentence: str) -> None:
    """A backend's text becomes one line of the right kind, without stack or source path."""
    error = gloo.collective_error("all-reduce", text)

    assert (type(error), str(error)) == (kind, sentence)
