"""Jobs under random faults end with the bits of an undisturbed one, or say why they cannot go on."""

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from disturbances import RANK_0, Lies, fill, set_link, set_writable, small_disk, two_hosts
from qlora_contract.exit_codes import ExitCode
from qlora_contract.job_folder import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    TRAINING_REPORT,
    finished_report,
    read_manifest,
)
from qlora_trainer.distributed.backends import registry
from qlora_trainer.launch.environment import allocator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FIRST_SEED = int(os.environ.get("SOAK_SEED", "0"))
"""`make soak` draws one, and shows it in the tests' names."""
JOBS = 40
FAULTS = 5
"""Of each job: 200 in the soak."""
TABLE = os.environ.get("SOAK_TABLE")
"""A file that gets a line for each fault: what, when, and how the pods ended."""
TIMEOUT_SECONDS = 12
"""After which ranks miss a peer."""
LAST_STEP = 24

GONE = {ExitCode.LOST_PEER, ExitCode.COLLECTIVE_TIMEOUT, ExitCode.RENDEZVOUS_FAILED}
"""What a pod says when a rank of another one is gone."""
KILLED = {128 + 9, -9}


@dataclass
class Game:
    """One job, and what is done to it."""

    job: Any
    ranks: int
    pods: int
    hosts: list[list[str]]
    """Of each pod; empty: all on this one."""
    lies: Lies
    random: random.Random
    seed: str
    attempt: Any = None
    heal: list[Callable[[], object]] = field(default_factory=list)
    """What makes the world right again, once the attempt has ended."""

    def one_rank(self) -> psutil.Process:
        """Any rank, once all have been started."""
        self.attempt.until(lambda: len(self.attempt.ranks()) == self.ranks)
        ranks: dict[int, psutil.Process] = self.attempt.ranks()
        return ranks[self.random.choice(sorted(ranks))]

    def one_launcher(self) -> Any:
        """Of any pod."""
        return self.random.choice(self.attempt.launchers)

    def is_over(self) -> bool:
        """Whether a pod of the attempt has ended."""
        return any(launcher.poll() is not None for launcher in self.attempt.launchers)

    def wait(self, happened: Callable[[], bool], seconds: float = 240) -> bool:
        """Wait for that, or the end of a pod; whether it happened."""
        deadline = time.monotonic() + seconds
        while not happened():
            if self.is_over() or time.monotonic() > deadline:
                return False
            time.sleep(0.003)
        return True

    def moment(self) -> tuple[str, bool]:
        """Wait for a random moment of the attempt; what it is, and whether the attempt still runs then."""
        known = self.job.last_step()
        kind = self.random.choice(["start", "step", "step", "end"])
        if kind == "start" or known >= LAST_STEP:  # all steps are done: this attempt only has to publish
            seconds = self.random.uniform(0, 15)
            self.wait(lambda: False, seconds)
            return f"{seconds:.0f} s later", not self.is_over()
        if kind == "end":
            seconds = self.random.uniform(0, 1.5)
            there = self.wait(lambda: LAST_STEP in self.job.checkpoints())
            self.wait(lambda: False, seconds)
            return f"{seconds:.1f} s after the last step", there and not self.is_over()
        step = self.random.randint(known + 1, LAST_STEP)
        return f"at step {step}", self.wait(lambda: self.job.last_step() >= step)


# --- faults


def kill_a_rank(game: Game) -> None:
    """As the kernel does when memory runs out."""
    game.one_rank().kill()


def kill_a_launcher(game: Game) -> None:
    """As the machine does when it loses its power: its ranks die with it."""
    game.one_launcher().kill()


def ask_a_pod_to_stop(game: Game) -> None:
    """As a drain does."""
    game.one_launcher().terminate()


def kill_a_launcher_and_damage_the_newest_checkpoint(game: Game) -> None:
    """As a crash of the storage does: a file is cut, or a bit of it flipped."""
    game.one_launcher().kill()

    def damage() -> None:
        checkpoints = game.job.checkpoints()
        if checkpoints:
            folder = game.job.folder / "checkpoints" / f"step-{checkpoints[-1]:08d}"
            file = game.random.choice(sorted(folder.iterdir()))
            whole = bytearray(file.read_bytes())
            if game.random.random() < 0.5:
                del whole[game.random.randrange(len(whole)) :]
            else:
                whole[game.random.randrange(len(whole))] ^= 1 << game.random.randrange(8)
            file.write_bytes(whole)

    game.heal.append(damage)


def stop_a_rank_for_a_moment(game: Game) -> None:
    """As swapping does."""
    rank = game.one_rank()
    rank.suspend()
    time.sleep(game.random.uniform(0.1, TIMEOUT_SECONDS / 3))
    rank.resume()


def stop_a_rank_for_long(game: Game) -> None:
    """Until its peers have left; then it hears of that."""
    rank = game.one_rank()
    rank.suspend()
    others = [process for process in game.attempt.ranks().values() if process != rank]
    psutil.wait_procs(others, timeout=TIMEOUT_SECONDS * 5)
    rank.resume()


def break_the_link_for_a_moment(game: Game) -> None:
    """As a switch that starts anew does."""
    set_link(game.hosts[0], "down")
    time.sleep(game.random.uniform(0.1, TIMEOUT_SECONDS / 4))
    set_link(game.hosts[0], "up")


def break_the_link(game: Game) -> None:
    """As long as the attempt lasts."""
    set_link(game.hosts[0], "down")
    game.heal.append(lambda: set_link(game.hosts[0], "up"))


def fill_the_disk(game: Game) -> None:
    """But for a few bytes."""
    filler = fill(game.job.root, game.random.choice([0, 0, 4_096, 65_536, 500_000]))
    game.heal.append(filler.unlink)


def make_the_disk_read_only(game: Game) -> None:
    """As a file system with errors is made."""
    # A file that is open for writing is in the way, and is none for long.
    game.wait(lambda: set_writable(game.job.root, writable=False), 10)
    game.heal.append(lambda: set_writable(game.job.root, writable=True))


def step_the_clock(game: Game) -> None:
    """As a time server does that was wrong."""
    day = 86_400
    game.lies.tell(clock_seconds=game.random.choice([-400 * day, -3_600, -30, 30, 3_600, 400 * day]))


def slow_the_disk_down(game: Game) -> None:
    """As a network file system under load is."""
    game.lies.tell(sync_milliseconds=game.random.randint(100, 1_500))


ENDING: dict[Callable[[Game], None], set[int]] = {
    kill_a_rank: KILLED | GONE,
    kill_a_launcher: KILLED | GONE,
    kill_a_launcher_and_damage_the_newest_checkpoint: KILLED | GONE,
    ask_a_pod_to_stop: {ExitCode.TERMINATED} | GONE,
    stop_a_rank_for_long: GONE,
    break_the_link: GONE,
    fill_the_disk: {ExitCode.STORAGE_FULL} | GONE,
    make_the_disk_read_only: {ExitCode.INVALID_CONFIGURATION} | GONE,
}
"""Faults that end an attempt, and the codes that its pods may end with; with 0 those that come too late."""
PASSING = (stop_a_rank_for_a_moment, break_the_link_for_a_moment, step_the_clock, slow_the_disk_down)
"""Faults that an attempt outlives."""
BETWEEN_HOSTS = {break_the_link, break_the_link_for_a_moment}


def play(game: Game, faults: int, check: Callable[[], None]) -> int:
    """One attempt under up to so many faults; how many there were. `check` looks at what is published."""
    known = [f for f in (*ENDING, *PASSING) if game.hosts or f not in BETWEEN_HOSTS]
    allowed: set[int] = {0}
    struck: list[str] = []
    game.lies.tell()
    with game.job.start(game.ranks, game.pods) as game.attempt:
        try:
            while len(struck) < faults:
                when, runs = game.moment()
                if not runs:
                    break
                fault = game.random.choice(known)
                struck.append(f"{fault.__name__.replace('_', ' ')} {when}")
                fault(game)
                check()
                allowed |= ENDING.get(fault, set())
                if fault in ENDING:
                    break
            ends = game.attempt.wait()
        finally:
            for heal in game.heal:
                heal()
            game.heal.clear()
    codes = [end.code for end in ends]
    note(f"{game.seed}: {', '.join(struck) or 'nothing'}: {codes}", len(struck))
    logs = "\n".join(end.log for end in ends)
    assert set(codes) <= allowed, f"{struck} ended with {codes}:\n{logs}"
    for end in ends:
        if end.code > 0 and end.code not in KILLED:
            assert end.report.cause, "an end says why"
    check()
    return len(struck)


def note(line: str, faults: int) -> None:
    """Add a line to the soak's table."""
    print(line)
    if TABLE and faults:
        with Path(TABLE).open("a") as stream:
            stream.write(line + "\n")


@pytest.fixture(scope="session")
def references() -> dict[tuple[str, int, int], Any]:
    """Undisturbed jobs that have been run, by backend, ranks and pods."""
    return {}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Holds what lasts as long as the test."""
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(
    "seed",
    [
        0,
        *(
            pytest.param(seed, marks=pytest.mark.soak)
            for seed in range(FIRST_SEED + 1, FIRST_SEED + 1 + JOBS)
        ),
    ],
)
def test_a_job_under_random_faults_ends_as_if_nothing_had_been(
    seed: int,
    make_job: Callable[..., Any],
    references: dict[tuple[str, int, int], Any],
    stack: ExitStack,
    tmp_path: Path,
    assert_same_bits: Callable[..., None],
) -> None:
    """Whatever happens whenever: what is published is verified, whole, and the undisturbed job's, and stays so."""
    chosen = random.Random(seed)
    backend = chosen.choice(["gloo", "ccl", "mpi"])
    ranks, pods = chosen.choice([(2, 1), (3, 1), (4, 1), (2, 2), (4, 2)])
    registry.prepare(backend)
    hosts = stack.enter_context(two_hosts()) if pods > 1 else []
    master = {"MASTER_ADDR": RANK_0["ipv4"]} if hosts else {}
    settings = {"distributed": {
        "backend": backend, "timeoutSeconds": TIMEOUT_SECONDS, "rendezvousTimeoutSeconds": 60}}  # fmt: skip

    def new_job(**where: Any) -> Any:
        job = make_job(**settings, **where)
        job.hosts, job.extra_environ = hosts, dict(master)
        return job

    layout = (backend, ranks, pods)
    if layout not in references:
        reference = new_job()
        with reference.start(ranks, pods) as attempt:
            ends = attempt.wait()
        assert {end.code for end in ends} == {0}, ends[0].log
        references[layout] = reference
    reference = references[layout]
    job = new_job(root=stack.enter_context(small_disk(tmp_path / "work", "48m")))
    lies = Lies(tmp_path, allocator())
    job.extra_environ |= lies.environ
    final: dict[str, Any] = {}

    def check_published() -> None:
        adapter = job.folder / ADAPTER
        if adapter.exists():
            # While it takes the place of one that is not finished it may be away for a moment.
            assert read_manifest(adapter) is not None or not adapter.exists()
            assert (adapter / ADAPTER_WEIGHTS).read_bytes() == reference.adapter_bytes()
        if finished_report(job.folder) is not None:
            files = {n: f for n, f in job.files().items() if n.startswith(ADAPTER) or n == TRAINING_REPORT}
            assert final.setdefault("files", files) == files, "a finished job is not published again"

    name = f"seed {seed}: {backend}, {ranks} ranks, {pods} pods"
    game = Game(job, ranks, pods, hosts, lies, chosen, name)
    left = FAULTS
    while left > 0:
        left -= play(game, left, check_published)
        if left > 0 and finished_report(job.folder) is not None:
            assert_same_bits(job, reference)
            for path in job.root.iterdir():  # from its beginning, with what is left to happen
                shutil.rmtree(path)
            final.clear()

    play(game, 0, check_published)

    assert_same_bits(job, reference)
    assert job.report()["not_bit_exact"] is None
    assert job.leftovers() == []
