"""What ranks tell each other through the store."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import FileStore, HashStore, PrefixStore, TCPStore

from qlora_trainer.distributed.backends import hosts

pytestmark = pytest.mark.process


def test_every_rank_learns_all_values() -> None:
    """The values come in rank order, whoever is late."""
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(lambda rank: hosts.store_all_gather(store, "k", rank, 3, f"v{rank}"), (2, 0, 1)))

    assert said == [["v0", "v1", "v2"]] * 3


def test_a_second_group_of_one_name_reads_nothing_of_the_first() -> None:
    """A process that leaves its group and makes it again starts with an empty store."""
    store = HashStore()
    first = hosts.unique_store(store, "a group of this test")
    first.set("k", "old")
    second = hosts.unique_store(store, "a group of this test")

    assert first.check(["k"])
    assert not second.check(["k"])


@pytest.mark.parametrize(
    ("host_ids", "rank", "expected"),
    [
        pytest.param(["a"], 0, (0, 1), id="alone"),
        pytest.param(["a", "a", "b"], 1, (1, 2), id="second-of-two"),
        pytest.param(["a", "b", "a"], 2, (1, 2), id="in-turn"),
        pytest.param(["a", "b", "a"], 1, (0, 1), id="alone-on-its-host"),
    ],
)
def test_a_rank_is_counted_among_those_of_its_host(
    host_ids: list[str], rank: int, expected: tuple[int, int]
) -> None:
    """A rank's number on its host counts those before it there."""
    assert hosts.local_rank_and_size(host_ids, rank) == expected


def test_processes_of_one_host_have_one_id() -> None:
    """The id says nothing about the process."""
    assert hosts.host_id() == hosts.host_id() != ""


def test_a_store_without_a_host_is_here(tmp_path: object) -> None:
    """Files and memory are reached on this host only, through any number of prefixes."""
    assert hosts.store_host(PrefixStore("a", PrefixStore("b", HashStore())), {}) == "127.0.0.1"
    assert hosts.store_host(FileStore(f"{tmp_path}/store", 1), {}) == "127.0.0.1"


def test_the_server_of_a_store_goes_by_what_others_call_it() -> None:
    """Rank 0 reaches its own store over loopback; the others need its address."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    assert hosts.store_host(PrefixStore("a", store), {"MASTER_ADDR": "gang-0.ranks"}) == "gang-0.ranks"
    assert hosts.store_host(store, {}) == "127.0.0.1"
