"""One file onto the disk, whatever the server does."""

import hashlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_trainer.errors import StorageFull, TransferFailed
from qlora_trainer.transfer.download import Downloader
from qlora_trainer.transfer.remote_files import Digest, RemoteFile, Selection
from qlora_trainer.transfer.retry import Retrier, TransientError

DATA = bytes(range(256)) * 16
FILE = RemoteFile("sub/x", len(DATA), Digest("sha256", hashlib.sha256(DATA).hexdigest()))

Answer = Callable[[bytes], Iterable[bytes]]


@dataclass
class Server:
    """Answers each request in its own way, the last way for all that follow."""

    answers: list[Answer]
    offsets: list[int] = field(default_factory=list)

    def list_files(self, revision: str, choose: Selection) -> tuple[str, list[RemoteFile]]:
        """Not asked for here."""
        raise NotImplementedError

    def read(self, revision: str, file: RemoteFile, offset: int) -> Generator[bytes]:
        """What the turn's way makes of the rest of the file."""
        self.offsets.append(offset)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        yield from answer(DATA[offset:])


def whole(rest: bytes) -> Iterable[bytes]:
    """All of it, in pieces."""
    return [rest[i : i + 1000] for i in range(0, len(rest), 1000)]


def broken(after: int) -> Answer:
    """So many bytes, then the connection breaks."""

    def answer(rest: bytes) -> Iterable[bytes]:
        yield rest[:after]
        raise TransientError("broke off")

    return answer


def short(rest: bytes) -> Iterable[bytes]:
    """One byte, as if there were no more."""
    return [rest[:1]]


def wrong(rest: bytes) -> Iterable[bytes]:
    """As many bytes, but others."""
    return [bytes(len(rest))]


def endless(rest: bytes) -> Iterable[bytes]:
    """It never ends."""
    while True:
        yield rest


@dataclass
class Place:
    """A folder to download into."""

    folder: Path
    arrived: int = 0

    @property
    def part(self) -> Path:
        """Where it is until it is whole."""
        return self.folder / "part"

    @property
    def target(self) -> Path:
        """Where it is then."""
        return self.folder / "to/sub/x"

    def count(self, number: int) -> None:
        """Count what has arrived."""
        self.arrived += number

    def fetch(self, server: Server, file: RemoteFile = FILE) -> str:
        """Download the file, by a clock that only waiting moves."""
        now = [0.0]

        def sleep(seconds: float) -> None:
            now[0] += seconds

        retrier = Retrier(10, lambda: now[0], sleep)
        return Downloader("hf://org/name", "main", server, retrier, self.count).fetch(
            file, self.part, self.target
        )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A folder of the test's own."""
    return Place(tmp_path)


def test_a_file_arrives(place: Place) -> None:
    """Under its name, with nothing beside it, and its hash is told."""
    assert place.fetch(Server([whole])) == FILE.digest.value  # type: ignore[union-attr]
    assert place.target.read_bytes() == DATA
    assert not place.part.exists()
    assert place.arrived == len(DATA)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.integers(1, 2000), max_size=8))
def test_it_goes_on_where_it_broke_off(place: Place, breaks: list[int]) -> None:
    """No byte is asked for twice, however often it breaks."""
    place.arrived = 0
    server = Server([*[broken(after) for after in breaks], whole])
    place.fetch(server)

    assert place.target.read_bytes() == DATA
    assert place.arrived == len(DATA)
    assert server.offsets == sorted(set(server.offsets))


def test_what_a_dead_one_left_is_gone_on_from(place: Place) -> None:
    """A process that was killed has left a part: only the rest is asked for."""
    place.part.write_bytes(DATA[:1500])
    server = Server([whole])
    place.fetch(server)

    assert server.offsets == [1500]
    assert place.target.read_bytes() == DATA


def test_a_part_that_is_all_needs_no_server(place: Place) -> None:
    """It was killed between the last byte and the renaming."""
    place.part.write_bytes(DATA)
    server = Server([whole])
    place.fetch(server)

    assert server.offsets == []


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(bytes(1500), id="wrong"),
        pytest.param(DATA + b"x", id="too-long"),
        pytest.param(bytes(len(DATA)), id="whole"),
    ],
)
def test_a_spoilt_part_is_fetched_anew(place: Place, part: bytes) -> None:
    """Once its hash tells that it is none of ours."""
    place.part.write_bytes(part)
    place.fetch(Server([whole]))

    assert place.target.read_bytes() == DATA


def test_wrong_bytes_once_are_fetched_anew(place: Place) -> None:
    """A cache on the way may have spoilt them."""
    server = Server([wrong, whole])
    place.fetch(server)

    assert server.offsets == [0, 0]
    assert place.target.read_bytes() == DATA
    assert place.arrived == len(DATA)


def test_wrong_bytes_twice_are_an_error(place: Place) -> None:
    """The sentence names the file, both hashes, and nothing is left that could be taken for it."""
    with pytest.raises(TransferFailed) as failed:
        place.fetch(Server([wrong]))

    assert "sub/x of hf://org/name (revision main) was downloaded 2 times and never matched" in str(
        failed.value
    )
    assert f"its sha256 is {hashlib.sha256(bytes(len(DATA))).hexdigest()}, not {FILE.digest.value}" in str(
        failed.value
    )  # type: ignore[union-attr]
    assert not place.part.exists()
    assert not place.target.exists()


def test_more_than_there_should_be_is_cut_off(place: Place) -> None:
    """A server that never stops does not fill the disk."""
    with pytest.raises(TransferFailed, match="it is longer than 4,096 bytes"):
        place.fetch(Server([endless]))

    assert not place.target.exists()


def test_a_server_that_stops_early_again_and_again_is_an_error(place: Place) -> None:
    """Even if it says nothing of it; what has arrived is kept for the next attempt."""
    nothing: Answer = lambda rest: []  # noqa: E731
    with pytest.raises(TransferFailed, match=r"broke off after 1 of 4,096 bytes; gave up"):
        place.fetch(Server([short, nothing]))

    assert place.part.read_bytes() == DATA[:1]


@pytest.mark.parametrize("before", [0, 1000, len(DATA)], ids=["begun", "half", "all"])
def test_two_at_once_both_end_well(place: Place, before: int) -> None:
    """One was stopped for so long that another took its lease over and finished the same part."""
    other = Place(place.folder)

    def overtaken(rest: bytes) -> Iterable[bytes]:
        yield rest[:before]
        other.fetch(Server([whole]))
        yield rest[before:]

    assert place.fetch(Server([overtaken])) == FILE.digest.value  # type: ignore[union-attr]
    assert place.target.read_bytes() == other.target.read_bytes() == DATA


def test_an_empty_file_needs_no_server(place: Place) -> None:
    """There is no range of it to ask for."""
    server = Server([whole])
    place.fetch(server, RemoteFile("empty", 0, Digest("md5", hashlib.md5(b"").hexdigest())))

    assert place.target.read_bytes() == b""
    assert server.offsets == []


def test_without_a_hash_the_size_must_do(place: Place) -> None:
    """S3 keeps no hash of what was sent in parts."""
    place.fetch(Server([whole]), RemoteFile("x", len(DATA)))
    assert place.target.read_bytes() == DATA


def test_a_full_disk_leaves_no_part(place: Place) -> None:
    """What cannot be finished would only keep others from their work."""

    def full(rest: bytes) -> Iterable[bytes]:
        yield rest[:10]
        raise OSError(28, "No space left on device", "part")

    with pytest.raises(StorageFull, match="no space left while fetching sub/x of hf://org/name"):
        place.fetch(Server([full]))

    assert not place.part.exists()
