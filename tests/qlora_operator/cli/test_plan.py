"""`qlora plan`: the parts that need no model. The trainer's half is tested with the trainer."""

import io
import os
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from qlora_contract import memory
from qlora_contract.exit_codes import ExitCode
from qlora_contract.memory import ModelShape
from qlora_contract.plan import (
    Machine,
    MemoryFigures,
    PlanReport,
    SplitStats,
    Steps,
    TextSpan,
    TimeEstimate,
)
from qlora_contract.run_config import Training
from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli.cpu_locks import CpuLocks, lock_file
from qlora_operator.cli.plan import (
    JobPlan,
    RankPlace,
    choose_isa,
    fewer_pods,
    job_plan,
    query_layout,
    rank_places,
    sample_text,
    show,
)
from qlora_operator.errors import CommandError

pytestmark = pytest.mark.process

MIB = 2**20
Job = Callable[..., QLoRAJob]


def a_machine(cpus: int = 4) -> Machine:
    """A machine without AMX."""
    lacking = {"amx_bf16": ["amx_bf16", "amx_tile"], "avx512_bf16": ["avx512_bf16"]}
    return Machine.model_validate(
        {"tiers": ["avx512", "avx2"], "lacking": lacking, "cpus": list(range(cpus))}
    )


def figures(total: int, **more: Any) -> MemoryFigures:
    """Memory of so many MiB."""
    fields = {
        "parts": {"base": total * MIB},
        "total": total * MIB,
        "micro_batch_tokens": 1024,
        "checkpointing": "full",
    }
    return MemoryFigures.model_validate(fields | more)


def details(memory: MemoryFigures) -> PlanReport:
    """What the trainer might measure."""
    numbers = dict.fromkeys(set(ModelShape.model_fields) - {"tied", "beside_layers"}, 1)
    split = {
        "format": "alpaca",
        "records": 12,
        "bad": [{"reason": "output is blank", "count": 6, "places": ["d.csv: row 3", "d.csv: row 9"]}],
        "truncated": 3,
        "dropped": 2,
        "samples": 10,
        "tokens": 4000,
        "supervised_tokens": 1000,
    }
    return PlanReport(
        compute_dtype="fp32",
        stored_in="GGUF, Q4_K, F32",
        shape=ModelShape.model_validate({**numbers, "tied": True}),
        memory=memory,
        training=SplitStats.model_validate(split),
        steps=Steps(per_epoch=4, total=10, epochs=2.5, tokens_per_step=1000.0, fill=0.925),
        sample=[TextSpan(text="What?\x1b ", supervised=False), TextSpan(text="That.", supervised=True)],
    )


def a_rank(number: int, **fields: Any) -> RankPlace:
    """A rank on four CPUs of a machine with one NUMA node."""
    known = {"rank": number, "pod": 0, "cpus": "0-3", "threads": 4, "helpers": "", "nodes": "0"}
    return RankPlace.model_validate(known | fields)


def a_plan(**fields: Any) -> JobPlan:
    """A plan of one rank."""
    known = {
        "name": "demo",
        "isa": "avx512",
        "compute_dtype": "fp32",
        "world_size": 1,
        "memory_per_rank": 1024 * MIB,
        "ranks": [a_rank(0)],
        "notes": [],
        "problems": [],
        "exit_code": 0,
        "missing_volumes": [],
        "details": None,
        "time": None,
        "price_per_core_hour": None,
        "currency": "",
        "money": None,
    }
    return JobPlan.model_validate(known | fields)


def shown(plan: JobPlan, **console: Any) -> str:
    """What a user sees."""
    out = io.StringIO()
    show(plan, Console(file=out, width=200, highlight=False, **console))
    return out.getvalue()


TIME = TimeEstimate(
    seconds=7385.0,
    training_seconds=7200.0,
    evaluation_seconds=165.0,
    start_seconds=20.0,
    core_hours=8.2,
    flops_per_token=1.0,
    tokens_per_second=433.4,
    basis="a measurement",
)


@pytest.mark.parametrize(
    ("money", "expected"),
    [
        pytest.param({}, "8.2 core-hours\n", id="without a price"),
        pytest.param({"money": 0.328, "currency": "EUR"}, "8.2 core-hours, 0.328 EUR\n", id="with one"),
        pytest.param({"money": 0.328}, "8.2 core-hours, 0.328\n", id="in no currency"),
    ],
)
def test_the_time_is_shown_with_what_it_rests_on(money: dict[str, Any], expected: str) -> None:
    """In hours, by what takes it, with core-hours and, if there is a price, money."""
    text = shown(a_plan(details=details(figures(512)), time=TIME, **money))

    assert f"time      about 2h 03m (steps 2h 00m, evaluation 2m 45s, start 20s): {expected}" in text
    assert "          at 433 tokens/s; rests on a measurement\n" in text


@pytest.mark.parametrize(
    ("topology", "time", "expected"),
    [
        pytest.param({"pods": 4}, TIME, [], id="all or none"),
        pytest.param({"pods": 4, "minPods": 4}, TIME, [], id="all"),
        pytest.param(
            {"pods": 4, "minPods": 1, "ranksPerPod": 2},
            TIME,
            [
                (
                    "in a cluster 1 of 4 pods will do (topology.minPods), 2 rank(s): "
                    "the job then takes up to about 8h 11m"
                )
            ],
            id="the least",
        ),
        pytest.param(
            {"pods": 4, "minPods": 3, "ranksPerPod": "auto", "cpusPerRank": 8},
            None,
            ["in a cluster 3 of 4 pods will do (topology.minPods)"],
            id="nobody knows the ranks, nor the time",
        ),
    ],
)
def test_what_fewer_pods_mean_is_told(
    a_job: Job, topology: dict[str, Any], time: TimeEstimate | None, expected: list[str]
) -> None:
    """Steps and evaluations are as many, of as many tokens, so they take longer; the start does not."""
    assert fewer_pods(a_job(topology=topology).spec.topology, time) == expected


def test_answers_and_exports_are_shown_where_there_are_any() -> None:
    """Most jobs export nothing."""
    time = TIME.model_copy(update={"answers_seconds": 12.0, "exports_seconds": 75.0})

    text = shown(a_plan(details=details(figures(512)), time=time))

    assert "(steps 2h 00m, evaluation 2m 45s, start 20s, answers 12s, exports 1m 15s): " in text


def test_without_a_model_there_is_no_time() -> None:
    """It follows from the model's shape and the data."""
    assert "time" not in shown(a_plan())


def test_ranks_that_share_memory_are_counted() -> None:
    """With `auto` memoryPerRank is the pod's, so that is what the sentence tells."""
    (problem,) = memory.problems(figures(1025), 1024 * MIB, Training(max_steps=1), sharing=8)

    assert "a rank needs 1,025 MiB, but spec.topology.memoryPerRank is 8,192 MiB for the 8 ranks" in problem
    assert "raise it to 8256Mi" in problem


def test_ranks_are_placed_as_their_launchers_would(a_job: Job) -> None:
    """Each rank with its pod, its CPUs, threads and NUMA nodes, told by the launcher's own code."""
    cpus = sorted(os.sched_getaffinity(0))
    topology = {"pods": 2, "ranksPerPod": 1, "cpusPerRank": 1, "pinning": "best-effort"}
    run = to_run_config(a_job(topology=topology), uid="u", attempt=0, isa="avx2")
    ranks = rank_places(query_layout(run, [cpus[:1], cpus[-1:]]))

    assert [(each.rank, each.pod, each.cpus, each.threads) for each in ranks] == [
        (0, 0, str(cpus[0]), 1),
        (1, 1, str(cpus[-1]), 1),
    ]


def test_ranks_that_do_not_fit_their_pod_are_a_problem(a_job: Job) -> None:
    """With the launcher's sentence, and the code that it would exit with."""
    run = to_run_config(
        a_job(topology={"cpusPerRank": 8, "pinning": "strict"}), uid="u", attempt=0, isa="avx2"
    )

    with pytest.raises(CommandError, match="need 8 CPUs, but only 1 can be used here") as caught:
        query_layout(run, [sorted(os.sched_getaffinity(0))[:1]])
    assert caught.value.code == ExitCode.INVALID_CONFIGURATION


def test_a_tier_that_is_not_met_here_is_planned_for(a_job: Job) -> None:
    """A job for a cluster can be planned on a laptop: with the tier that it will have."""
    isa, problems = choose_isa(a_job(isa={"allowed": ["amx_bf16"]}), a_machine())

    assert isa == "amx_bf16"
    assert [str(problem).partition(":")[0] for problem in problems] == [
        "this machine has avx512, and spec.isa.allowed has only amx_bf16"
    ]


def test_what_does_not_fit_here_is_a_problem_not_an_end(a_job: Job) -> None:
    """The plan has no ranks, and says what would have to change."""
    plan = job_plan(a_job(topology={"cpusPerRank": 1024, "pinning": "strict"}), {}, ["team"])

    assert plan.ranks == []
    assert any(
        "1 pod(s) with 1 rank(s) of 1024 CPU(s) need 1024 CPUs" in problem for problem in plan.problems
    )


def test_auto_ranks_are_planned(a_job: Job) -> None:
    """One rank for each NUMA node of this machine's CPUs, and what memory each of them gets."""
    count = len(os.sched_getaffinity(0))
    topology = {"ranksPerPod": "auto", "cpusPerRank": count, "memoryPerRank": "8Gi", "pinning": "best-effort"}
    plan = job_plan(a_job(topology=topology), {}, ["team"])

    assert plan.world_size == len(plan.ranks) >= 1
    assert plan.memory_per_rank == 8 * 1024 * MIB // len(plan.ranks)


def test_ranks_that_nobody_can_count_are_said_so(a_job: Job) -> None:
    """With `auto`, and a pod that does not fit this machine, their number is left open."""
    topology = {"ranksPerPod": "auto", "cpusPerRank": 1024, "pinning": "strict"}
    plan = job_plan(a_job(topology=topology), {}, ["team"])

    assert plan.world_size is None
    assert "one rank per NUMA cluster" in shown(plan)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, 0, id="it would run"),
        pytest.param({"topology": {"cpusPerRank": 1024, "pinning": "strict"}}, 10, id="too few CPUs"),
        pytest.param({"topology": {"memoryPerRank": "64Ti"}}, 10, id="too little memory"),
    ],
)
def test_a_plan_knows_how_run_would_end(a_job: Job, fields: dict[str, Any], expected: int) -> None:
    """A script that plans first learns from the exit code whether the job can be run here."""
    plan = job_plan(a_job(**fields), {}, ["team"])

    assert plan.exit_code == expected
    assert bool(plan.problems) == bool(expected)


def test_cpus_of_running_jobs_are_named(a_job: Job) -> None:
    """Who plans while another job runs learns that its CPUs are not free now."""
    locks = CpuLocks(lock_file())
    locks.take(os.sched_getaffinity(0), "job other (process 17)")
    locks.promise_memory(1 << 20, "job other (process 4194305)")
    try:
        plan = job_plan(a_job(), {}, ["team"])
    finally:
        locks.close()

    assert any(note.endswith("are in use by job other (process 17)") for note in plan.notes)
    assert "job other (process 4194305) may take 1.00 MiB more memory" in plan.notes
    assert plan.exit_code == 0


def test_without_volumes_the_machine_is_planned(a_job: Job) -> None:
    """What needs model and data is left out, and the claims are named."""
    plan = job_plan(a_job(), {}, ["team"])

    assert plan.details is None
    assert plan.world_size == len(plan.ranks) == 1
    assert "add --volume team=PATH to see memory, steps and a sample" in shown(plan)


@pytest.mark.parametrize(
    ("needs", "remedies"),
    [
        pytest.param(figures(1024), [], id="just enough"),
        pytest.param(
            figures(1025),
            ["raise it to 1088Mi", "lower training.maxSequenceLength"],
            id="nothing left to save",
        ),
        pytest.param(
            figures(2048, micro_batch_tokens=2048, checkpointing="none"),
            [
                "raise it to 2048Mi",
                "lower training.microBatchTokens",
                "set training.gradientCheckpointing to auto",
                "lower training.maxSequenceLength",
            ],
            id="knobs of the user's",
        ),
    ],
)
def test_too_little_memory_is_a_problem(needs: MemoryFigures, remedies: list[str]) -> None:
    """The sentence says what is needed and what could be changed instead."""
    problems = memory.problems(needs, 1024 * MIB, Training(max_steps=1))
    start = f"a rank needs {needs.total // MIB:,} MiB, but spec.topology.memoryPerRank is 1,024 MiB: "
    assert problems == ([start + ", or ".join(remedies)] if remedies else [])


def test_a_plan_shows_memory_data_steps_and_a_sample() -> None:
    """All of it, in a few lines."""
    out = shown(a_plan(details=details(figures(512))))

    assert "demo: 1 rank(s), avx512, computing in fp32\nweights   GGUF, Q4_K, F32\n" in out
    assert "memory    512 MiB of 1.00 GiB per rank (MiB: base 512)" in out
    assert (
        "10 samples from 12 alpaca records, 4,000 tokens, 1,000 of them trained on; 3 truncated; "
        "2 dropped, because truncation left nothing to train on; "
        "6 left out: output is blank (d.csv: row 3, d.csv: row 9)\n"
    ) in out
    assert "held out  none" in out
    assert "steps     10 (2.50 epochs of 4), 1,000 tokens per step, bins 92 % full" in out
    assert "What?\N{REPLACEMENT CHARACTER} [[That.]]" in out


def test_colour_marks_what_is_learnt_on_a_terminal() -> None:
    """Where there is colour there are no brackets, and memory that is too much is red."""
    out = shown(a_plan(details=details(figures(2048))), force_terminal=True, color_system="standard")

    assert "\x1b[4;32mThat." in out
    assert "[[" not in out
    assert "\x1b[1;31mmemory    2.00 GiB of 1.00 GiB" in out


def test_a_long_sample_is_cut_on_screen() -> None:
    """A sample of a book does not scroll the rest away."""
    text = sample_text(
        [TextSpan(text="a" * 5000, supervised=True), TextSpan(text="never", supervised=False)], marked=True
    )

    assert text.plain == f"[[{'a' * 2000}]] ..."


def test_many_ranks_are_counted() -> None:
    """The first sixteen stand for all."""
    ranks = [a_rank(n) for n in range(20)]

    assert "... and 4 more" in shown(a_plan(ranks=ranks))


def test_warnings_are_shown() -> None:
    """What may not be meant does not change how a plan ends."""
    warned = details(figures(512)).model_copy(update={"warnings": ["2 record(s) to train on"]})

    assert "warning: 2 record(s) to train on\n" in shown(a_plan(details=warned))


def test_problems_are_shown() -> None:
    """Each in a line of its own."""
    assert "problem: too few CPUs\n" in shown(a_plan(problems=["too few CPUs"]))
