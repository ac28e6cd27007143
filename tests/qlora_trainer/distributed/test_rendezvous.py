"""Ranks that meet, and those that do not; real stores and sockets."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.distributed import World, rendezvous
from qlora_trainer.errors import RendezvousError

pytestmark = pytest.mark.process


@given(st.sets(st.integers(0, 40)))
def test_ranges_name_exactly_the_given_ranks(ranks: set[int]) -> None:
    """Written as ranges, ranks are neither lost nor invented."""
    named: set[int] = set()
    for part in rendezvous.rank_ranges(ranks).split(", ") if ranks else []:
        low, _, high = part.partition("-")
        named |= set(range(int(low), int(high or low) + 1))

    assert named == ranks


@pytest.mark.parametrize(
    ("came", "expected"),
    [
        pytest.param(
            [0], "rank 0 of 4 came to a:1 within 5 s; ranks 1-3 did not", id="only-rank-0"
        ),
        pytest.param([0, 2, 3], "ranks 0, 2-3 of 4 came to a:1 within 5 s; rank 1 did not", id="one-missing"),
    ],
)  # fmt: skip
def test_the_message_names_who_came_and_who_did_not(came: list[int], expected: str) -> None:
    """The sentence names who came, who did not, where and for how long."""
    assert rendezvous.missing_ranks_message(4, came, "a:1", 5.0).startswith(expected)


def test_ranks_that_all_come_share_a_store(world: Callable[..., World]) -> None:
    """What one rank writes after the meeting, another reads."""
    with ThreadPoolExecutor(3) as pool:
        met = list(pool.map(lambda rank: rendezvous.rendezvous(world(rank, 3), f"h{rank}", 60), range(3)))
    met[2][0].set("k", "v")

    assert met[1][0].get("k") == b"v"


def test_every_rank_that_came_names_the_missing_ones(world: Callable[..., World]) -> None:
    """When two of four ranks come, both say that the other two did not."""

    def meet(rank: int) -> str:
        with pytest.raises(RendezvousError) as caught:
            rendezvous.rendezvous(world(rank, 4), f"h{rank}", 3)
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        sentences = list(pool.map(meet, [0, 2]))

    assert all("ranks 0, 2 of 4 came" in each and "ranks 1, 3 did not" in each for each in sentences)


def test_without_rank_0_the_address_is_named(world: Callable[..., World]) -> None:
    """A rank that finds nobody says for whom it waited, where, and what it met."""
    here = world(1, 2)

    with pytest.raises(RendezvousError, match=rf"rank 0 at 127.0.0.1:{here.master_port}.*refused"):
        rendezvous.rendezvous(here, "h", 0.5)


def test_a_name_may_start_to_resolve_later(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster's name of rank 0 appears only after its pod has: it is asked for again."""
    answers = [socket.gaierror(-2, "Name or service not known")] * 2

    def resolve(host: str, port: int) -> str:
        if answers:
            raise answers.pop()
        return "127.0.0.1"

    monkeypatch.setattr(rendezvous, "resolve", resolve)
    _, address = rendezvous.rendezvous(world(0, 1, "gang-0.ranks"), "h", 60)

    assert address == "127.0.0.1"
    assert not answers


def test_a_taken_port_is_named(world: Callable[..., World]) -> None:
    """Rank 0 says that its port is in use instead of joining whoever has it."""
    here = world(0, 2)
    with (
        socket.create_server(("127.0.0.1", here.master_port)),
        pytest.raises(RendezvousError, match=f"{here.master_port}.*in use.*MASTER_PORT must be free"),
    ):
        rendezvous.rendezvous(here, "h", 5)


def test_a_rank_that_comes_twice_is_refused(world: Callable[..., World]) -> None:
    """The second process of one rank hears of the first, and the others go on without it."""
    with ThreadPoolExecutor(3) as pool:
        first = [pool.submit(rendezvous.rendezvous, world(rank, 3), f"h{rank}", 60) for rank in (0, 1)]
        while not _has_come(world(1, 3)):
            time.sleep(0.05)
        with pytest.raises(RendezvousError, match=r"rank 1 came twice .* from h1 and from other"):
            rendezvous.rendezvous(world(1, 3), "other", 60)
        last = pool.submit(rendezvous.rendezvous, world(2, 3), "h2", 60)

        assert all(each.result() for each in (*first, last))


def _has_come(here: World) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", here.master_port), timeout=5):
            pass
    except OSError:
        return False
    store = rendezvous._open_store(here, "127.0.0.1", timedelta(seconds=60))
    return bool(store.check([rendezvous._rank_key(here.rank)]))
