"""What ranks tell each other through the store."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import FileStore, HashStore, PrefixStore, TCPStore

from qlora_trainer.distributed import nodes


def test_every_rank_learns_all_values() -> None:
    """The values come in rank order, whoever is late."""
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(lambda rank: nodes.exchange(store, "k", rank, 3, f"v{rank}"), (2, 0, 1)))

    assert said == [["v0", "v1", "v2"]] * 3


def test_a_second_group_of_one_name_reads_nothing_of_the_first() -> None:
    """A process that leaves its group and makes it again starts with an empty store."""
    store = HashStore()
    first = nodes.fresh(store, "a group of this test")
    first.set("k", "old")
    second = nodes.fresh(store, "a group of this test")

    assert first.check(["k"])
    assert not second.check(["k"])


@pytest.mark.parametrize(
    ("names", "rank", "place"),
    [
        pytest.param(["a"], 0, (0, 1), id="alone"),
        pytest.param(["a", "a", "b"], 1, (1, 2), id="second-of-two"),
        pytest.param(["a", "b", "a"], 2, (1, 2), id="in-turn"),
        pytest.param(["a", "b", "a"], 1, (0, 1), id="alone-on-its-node"),
    ],
)
def test_local_place(names: list[str], rank: int, place: tuple[int, int]) -> None:
    """A rank's number on its node counts those before it there."""
    assert nodes.local_place(names, rank) == place


def test_processes_of_one_host_have_one_name() -> None:
    """The name says nothing about the process."""
    assert nodes.node_name() == nodes.node_name() != ""


def test_a_store_without_a_host_is_here(tmp_path: object) -> None:
    """Files and memory are reached on this host only, through any number of prefixes."""
    assert nodes.store_host(PrefixStore("a", PrefixStore("b", HashStore())), {}) == "127.0.0.1"
    assert nodes.store_host(FileStore(f"{tmp_path}/store", 1), {}) == "127.0.0.1"


def test_the_server_of_a_store_goes_by_what_others_call_it() -> None:
    """Rank 0 reaches its own store over loopback; the others need its address."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    assert nodes.store_host(PrefixStore("a", store), {"MASTER_ADDR": "gang-0.ranks"}) == "gang-0.ranks"
    assert nodes.store_host(store, {}) == "127.0.0.1"
