"""One per pod: start the ranks with their CPUs, pass signals on, fold their ends into one.

    python -m qlora_trainer.launch

Nothing here imports torch: thread counts and affinity must be set before it is.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from qlora_contract.cpus import format_cpu_list
from qlora_contract.exit_codes import ExitCode
from qlora_contract.places import (
    COMPLETION_INDEX_ENV,
    CPUS_ENV,
    PARENT_DEATH_ENV,
    RANKS_ENV,
    RENDEZVOUS_PORT,
    RUN_CONFIG_ENV,
    RUN_CONFIG_PATH,
)
from qlora_contract.progress import TerminationReport
from qlora_contract.run import MAX_RANKS, RUN_CONFIG_VERSION, RunConfig
from qlora_trainer import cpu, report
from qlora_trainer.births import BirthError
from qlora_trainer.supervise import Stop, die_with_parent, limits_of, say, start_ranks, watch
from qlora_trainer.topology import machine, memory
from qlora_trainer.topology.agreement import AgreementError, Hello, Stopped, agree
from qlora_trainer.topology.environment import allocator, memory_settings, thread_settings
from qlora_trainer.topology.layout import Layout, RankPlace, Share, Wish, layout
from qlora_trainer.verdict import conclude, end_of

RANK_COMMAND = (sys.executable, "-m", "qlora_trainer")


class LaunchError(Exception):
    """The ranks were not started; `code` says what kind of reason it was."""

    def __init__(self, code: ExitCode, cause: str) -> None:
        super().__init__(cause)
        self.code = code


# --- before the ranks


def load_run(path: Path) -> RunConfig:
    """run.json. Raises LaunchError when it is missing, malformed or of another version."""
    try:
        text = path.read_text()
        version = json.loads(text)["version"]
    except OSError as error:
        raise _invalid(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _invalid(f"{path} is not a JSON object with a version: {error!r}") from error
    if version != RUN_CONFIG_VERSION:
        raise _invalid(
            f"{path} has version {version!r} and this trainer reads version {RUN_CONFIG_VERSION}: "
            "operator and trainer image must be of the same release"
        )
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the object as a whole"
        raise _invalid(f"{path} is malformed at {where}: {first['msg']}") from error


def settled(run: RunConfig, counts: Sequence[int]) -> RunConfig:
    """The job once each pod's number of ranks is known."""
    return run.model_copy(update={"layout": run.layout.settled(counts)})


def _invalid(cause: str) -> LaunchError:
    return LaunchError(ExitCode.INVALID_CONFIGURATION, cause)


def pod_index(run: RunConfig, environ: Mapping[str, str]) -> int:
    """This pod's completion index; 0 when there is one pod and nobody says."""
    text = environ.get(COMPLETION_INDEX_ENV, "0" if run.layout.pods == 1 else "")
    if not (text.isascii() and text.isdigit() and int(text) < run.layout.pods):
        raise _invalid(f"{COMPLETION_INDEX_ENV} is {text!r} and must be 0 to {run.layout.pods - 1}")
    return int(text)


def check_isa(run: RunConfig, found: cpu.Isa) -> None:
    """Raise LaunchError, naming what is missing, when this processor is below the attempt's tier."""
    if lacking := found.lacks(run.isa):
        raise LaunchError(
            ExitCode.ISA_BELOW_TIER,
            f"this node is below ISA tier {run.isa}: it lacks {', '.join(lacking)}; "
            "a node that has them is needed",
        )


def share_of(environ: Mapping[str, str], root: Path = cpu.ROOT) -> Share:
    """What this launcher was given of its machine."""
    allowed, quota = cpu.available_cpus(root)
    named = environ.get(CPUS_ENV)
    cpus = cpu.parse_cpu_list(named) if named else allowed
    if missing := sorted(set(cpus) - set(allowed)):
        raise _invalid(
            f"{CPUS_ENV} names CPUs {format_cpu_list(missing)}, which this process may not use; "
            f"it may use {format_cpu_list(allowed)}"
        )
    return Share(tuple(cpus), quota, bool(named), memory.allowed_nodes(root), memory.may_place())


def wish_of(run: RunConfig) -> Wish:
    """What the job asks for in each pod."""
    asked = run.layout
    return Wish(asked.ranks_per_pod, asked.pod_cpus, asked.pinning, asked.memory_tier)


def place_ranks(run: RunConfig, environ: Mapping[str, str], root: Path = cpu.ROOT) -> Layout:
    """Where each local rank runs. Raises LaunchError when they do not fit."""
    try:
        return layout(machine.read(root), share_of(environ, root), wish_of(run))
    except cpu.CpuError as error:
        raise _invalid(str(error)) from error


def master(run: RunConfig, environ: Mapping[str, str]) -> tuple[str, int]:
    """Host name or address of pod 0, and the port where rank 0 serves its store."""
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if run.layout.pods == 1 else "")
    if not address:
        raise _invalid(f"MASTER_ADDR is not set, and {run.layout.pods} pods need the host name of rank 0")
    port = environ.get("MASTER_PORT") or str(RENDEZVOUS_PORT)
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise _invalid(f"MASTER_PORT is {port!r}; it must be a whole number from 1 to 65535")
    return address, int(port)


def ranks_of_pods(run: RunConfig, index: int, own: int, environ: Mapping[str, str], stop: Stop) -> list[int]:
    """How many ranks each pod has: as the job says, or as the launchers tell one another.

    Raises:
        LaunchError: a pod did not come in time, or one is of another job.
    """
    pods = run.layout.pods
    if run.layout.ranks_per_pod != "auto":
        return [own] * pods
    hello = Hello(job=run.job.uid, attempt=run.job.attempt, pods=pods, pod=index, ranks=own)
    try:
        counts = agree(
            hello,
            *master(run, environ),
            run.distributed.rendezvous_timeout_seconds,
            lambda: stop.at is not None,
        )
    except AgreementError as error:
        raise LaunchError(ExitCode.RENDEZVOUS_FAILED, str(error)) from error
    except Stopped as error:
        raise _stopped() from error
    if sum(counts) > MAX_RANKS:
        raise _invalid(
            f"topology.ranksPerPod auto makes {sum(counts)} ranks of {pods} pods, and {MAX_RANKS} is the most: "
            "set it to a number, or lower topology.pods"
        )
    return counts


def _stopped() -> LaunchError:
    return LaunchError(ExitCode.TERMINATED, "told to stop before the ranks were started")


def rank_environment(
    run: RunConfig,
    counts: Sequence[int],
    index: int,
    local: int,
    place: RankPlace,
    environ: Mapping[str, str],
) -> dict[str, str]:
    """The whole environment of local rank `local` of pod `index`, after torchrun's conventions.

    `counts` are the ranks of each pod; rank numbers count over the pods in their order.
    """
    address, port = master(run, environ)
    return {
        **environ,
        "RANK": str(sum(counts[:index]) + local),
        "WORLD_SIZE": str(sum(counts)),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(counts[index]),
        "NODE_RANK": str(index),
        "GROUP_RANK": str(index),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "PET_NNODES": str(len(counts)),
        "PET_NPROC_PER_NODE": str(counts[index]),
        "PET_NODE_RANK": str(index),
        "PET_MASTER_ADDR": address,
        "PET_MASTER_PORT": str(port),
        RANKS_ENV: ",".join(map(str, counts)),
        **thread_settings(place, environ),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


# --- the whole


def launch(command: Sequence[str], environ: Mapping[str, str], stop: Stop) -> TerminationReport:
    """Start the ranks of this pod, see them end, and tell how. Raises LaunchError before the start."""
    run = load_run(Path(environ.get(RUN_CONFIG_ENV) or RUN_CONFIG_PATH))
    check_isa(run, cpu.probe())
    return run_pod(run, command, environ, stop)


def run_pod(
    run: RunConfig, command: Sequence[str], environ: Mapping[str, str], stop: Stop
) -> TerminationReport:
    """`launch` of a job that is read and may run on this processor."""
    index, found = pod_index(run, environ), place_ranks(run, environ)
    for line in found.lines():
        say(line)
    counts = ranks_of_pods(run, index, len(found.ranks), environ, stop)
    settled = {**environ, **memory_settings(environ, machine.huge_pages(), allocator())}
    environments = [
        rank_environment(run, counts, index, local, place, settled) for local, place in enumerate(found.ranks)
    ]
    if stop.at is not None:
        raise _stopped()
    kills_before = cpu.oom_kills()
    with tempfile.TemporaryDirectory(prefix="qlora-launch-") as folder:
        try:
            ranks = start_ranks(command, environments, found.ranks, Path(folder), stop)
        except BirthError as error:
            if stop.at is not None:
                raise _stopped() from error
            raise LaunchError(ExitCode.UNEXPECTED, f"a rank could not be started: {error}") from error
        ends = [end_of(rank) for rank in watch(ranks, limits_of(run), stop)]
    return conclude(ends, run, oom=cpu.oom_kills() > kills_before, limit=cpu.memory_limit())


def main(command: Sequence[str] = RANK_COMMAND, environ: Mapping[str, str] = os.environ) -> int:
    """Launch, write the termination message, and return the pod's exit code."""
    stop = Stop()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if parent := environ.get(PARENT_DEATH_ENV):
        die_with_parent(signal.SIGTERM)
        if int(parent) > 1 and os.getppid() != int(parent):  # it died before the line above
            stop()
    try:
        ended = launch(command, environ, stop)
    except LaunchError as error:
        host = os.uname().nodename
        ended = TerminationReport(exit_code=error.code, reason=error.code.name, cause=str(error), host=host)
    report.announce(ended, environ, say)
    return ended.exit_code


if __name__ == "__main__":
    # Not sys.exit: closing a stdout that nobody reads would change the exit code.
    os._exit(main())
