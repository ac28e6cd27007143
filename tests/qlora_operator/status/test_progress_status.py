"""What rank 0 tells and what the pods show, as parts of the status."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from qlora_contract.progress import ProgressReport, RankFacts
from qlora_operator.api.status import AdapterStatus, Progress, RankStatus
from qlora_operator.status import progress_status
from qlora_operator.status.observation import Pod

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def told(**fields: Any) -> ProgressReport:
    """Rank 0's report."""
    known = {"job_uid": "u", "attempt": 0, "stage": "Training", "step": 3, "total_steps": 8, "epoch": 0.5}
    return ProgressReport.model_validate({**known, "updated_time": "2026-01-31T11:59:59Z", **fields})


def ended(**report: Any) -> str:
    """A termination message."""
    return json.dumps(
        {"version": 1, "exitCode": 0, "reason": "DONE", "cause": "all ranks are done", **report}
    )


@pytest.mark.parametrize(
    ("before", "step_time"),
    [
        pytest.param(None, "2026-01-31T12:00:00Z", id="the first report"),
        pytest.param(Progress(step=3, step_time="then"), "then", id="no step since"),
        pytest.param(Progress(step=2, step_time="then"), "2026-01-31T12:00:00Z", id="a step since"),
        pytest.param(Progress(step=5, step_time="then"), "2026-01-31T12:00:00Z", id="back to a checkpoint"),
    ],
)
def test_the_step_time_moves_with_the_step(before: Progress | None, step_time: str) -> None:
    """The time of the last step is when the operator first saw it, by its own clock."""
    progress = progress_status.progress(before, told(), NOON)

    assert progress.step_time == step_time
    assert (progress.step, progress.percent) == (3, 37)
    assert progress.updated_time == "2026-01-31T11:59:59Z"


@pytest.mark.parametrize(
    ("before", "advances", "advance_time"),
    [
        pytest.param(None, 5, "2026-01-31T12:00:00Z", id="the first report"),
        pytest.param(Progress(step=3, advances=5, advance_time="then"), 5, "then", id="nothing since"),
        pytest.param(
            Progress(step=3, advances=5, advance_time="then"),
            6,
            "2026-01-31T12:00:00Z",
            id="some tokens since",
        ),
        pytest.param(
            Progress(step=2, advances=5, advance_time="then"), 5, "2026-01-31T12:00:00Z", id="a step since"
        ),
        pytest.param(
            Progress(step=3, step_time="then"),
            None,
            "then",
            id="an old trainer, and an older operator's status",
        ),
        pytest.param(
            Progress(step=2, step_time="then"), None, "2026-01-31T12:00:00Z", id="an old trainer's step"
        ),
    ],
)
def test_the_advance_time_moves_with_anything_that_is_done(
    before: Progress | None, advances: int | None, advance_time: str
) -> None:
    """The count as well as the step moves it; a trainer that does not count has its steps."""
    progress = progress_status.progress(before, told(advances=advances), NOON)

    assert (progress.advances, progress.advance_time) == (advances, advance_time)


def test_no_steps_at_all() -> None:
    """A job of no steps has no percentage."""
    assert progress_status.progress(None, told(step=0, total_steps=0), NOON).percent is None


def test_eta_is_in_whole_seconds() -> None:
    """The API's field is an integer."""
    assert progress_status.progress(None, told(eta_seconds=59.6), NOON).eta_seconds == 60


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, None),
        (Progress(), Progress()),
        (
            Progress(step=390, total_steps=400, percent=97, eta_seconds=9, loss=1.0),
            Progress(step=400, total_steps=400, percent=100, eta_seconds=0, loss=1.0),
        ),
    ],
    ids=["never told", "told nothing", "told of a step before the last"],
)
def test_a_finished_job_has_made_all_its_steps(before: Progress | None, after: Progress | None) -> None:
    """A job that is done has made all its steps."""
    assert progress_status.finished(before) == after


def test_ranks_keep_what_is_known(make_pod: Callable[..., Pod]) -> None:
    """A second look at the pods keeps what the ranks told, unless the pod is another."""
    pods = [make_pod(1, node="b"), make_pod(0, node="a")]
    facts = [RankFacts(rank=n, host="h", isa="avx512", cpus=str(n), threads=1) for n in range(4)]
    known = progress_status.with_facts(progress_status.ranks([], pods, 2), told(ranks=facts))
    assert [(r.index, r.pod, r.node, r.isa, r.cpus) for r in known] == [
        (0, "job-a0-0", "a", "avx512", "0"),
        (1, "job-a0-0", "a", "avx512", "1"),
        (2, "job-a0-1", "b", "avx512", "2"),
        (3, "job-a0-1", "b", "avx512", "3"),
    ]

    assert progress_status.ranks(known, pods, 2) == known
    other = progress_status.ranks(known, [make_pod(0, attempt=1, node="a")], 2)
    assert other == [RankStatus(index=n, pod="job-a1-0", node="a") for n in range(2)]


def test_ranks_that_only_rank_0_can_count(make_pod: Callable[..., Pod]) -> None:
    """With `auto` there are none until rank 0 tells; then each is in the pod that it was told to be in."""
    pods = [make_pod(1, node="b"), make_pod(0, node="a")]
    of_pod = {0: 0, 1: 0, 2: 1, 3: 7}
    facts = [
        RankFacts(rank=n, host="h", isa="avx512", cpus=str(n), threads=1, pod=pod, nodes=str(n))
        for n, pod in of_pod.items()
    ]

    before = progress_status.ranks([], pods, "auto")
    known = progress_status.with_facts(before, told(ranks=facts), pods)

    assert before == []
    assert [(r.index, r.pod, r.node, r.cpus, r.numa_nodes) for r in known] == [
        (0, "job-a0-0", "a", "0", "0"),
        (1, "job-a0-0", "a", "1", "1"),
        (2, "job-a0-1", "b", "2", "2"),
    ]
    assert progress_status.ranks(known, pods, "auto") == known
    assert progress_status.ranks(known, [make_pod(0, attempt=1, node="a")], "auto") == []


def test_rank_0_adds_no_ranks_where_the_job_says_how_many(make_pod: Callable[..., Pod]) -> None:
    """What it tells of others is passed over."""
    facts = [RankFacts(rank=9, host="h", isa="avx512", cpus="9", threads=1)]

    assert progress_status.with_facts(progress_status.ranks([], [make_pod(0)], 1), told(ranks=facts)) == [
        RankStatus(index=0, pod="job-a0-0")
    ]


def test_ranks_are_capped(make_pod: Callable[..., Pod]) -> None:
    """The first 64 ranks are shown."""
    assert len(progress_status.ranks([], [make_pod(n) for n in range(40)], 2)) == 64


def test_nodes_are_named_once_and_capped(make_pod: Callable[..., Pod]) -> None:
    """Each node once, in order, without those of pods that have none."""
    pods = [make_pod(0, node="b"), make_pod(1, node="a"), make_pod(2, node="b"), make_pod(3)]

    assert progress_status.nodes(pods) == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        pytest.param([], None, id="no pods"),
        pytest.param(["Segmentation fault"], None, id="no report"),
        pytest.param([ended(computeDtype="bf16", step=None)], None, id="no step was made"),
        pytest.param([ended(computeDtype="bf16", step=0)], None, id="ended before the first step"),
        pytest.param(["", ended(computeDtype="bf16", step=2)], "bf16", id="a step was made"),
    ],
)
def test_the_data_type_is_that_of_a_completed_step(
    make_pod: Callable[..., Pod], words: list[str], dtype: str | None
) -> None:
    """What pods say they have computed in counts once they have completed a step."""
    assert (
        progress_status.dtype([make_pod(n, termination_message=each) for n, each in enumerate(words)])
        == dtype
    )


def test_rank_0_reports_how_many_ranks_there_were(make_pod: Callable[..., Pod]) -> None:
    """Rank 0's pod says in the end how many ranks there were; other pods do not count."""
    pods = [
        make_pod(1, termination_message=ended(worldSize=9)),
        make_pod(0, termination_message=ended(worldSize=3)),
    ]

    assert progress_status.world_size(pods) == 3
    assert progress_status.world_size(pods[:1]) is None
    assert progress_status.world_size([make_pod(0, termination_message=ended())]) is None


@pytest.mark.parametrize(
    ("report", "adapter"),
    [
        pytest.param({}, None, id="nothing stored"),
        pytest.param(
            {"adapterUri": "pvc://a", "adapterSha256": "5", "baseEvalLoss": 3.0, "evalLoss": 2.0},
            AdapterStatus(uri="pvc://a", sha256="5", base_eval_loss=3.0, eval_loss=2.0),
            id="stored and evaluated",
        ),
        pytest.param(
            {"adapterUri": "pvc://a", "baseEvalLossQuantized": 3.5},
            AdapterStatus(uri="pvc://a", base_eval_loss=3.5),
            id="only the quantised base was measured",
        ),
        pytest.param(
            {"adapterUri": "pvc://a", "baseEvalLoss": 0.0, "baseEvalLossQuantized": 3.5},
            AdapterStatus(uri="pvc://a", base_eval_loss=0.0),
            id="a loss of zero is a loss",
        ),
    ],
)
def test_rank_0_reports_the_adapter(
    make_pod: Callable[..., Pod], report: dict[str, Any], adapter: AdapterStatus | None
) -> None:
    """Rank 0's pod says what it has stored; nobody else is asked."""
    assert progress_status.adapter([make_pod(0, termination_message=ended(**report))]) == adapter
    assert progress_status.adapter([make_pod(1, termination_message=ended(**report))]) is None


@pytest.mark.parametrize(
    ("index", "report", "expected"),
    [
        pytest.param(0, {"energyKwh": 0.25}, 0.25, id="it is known"),
        pytest.param(0, {}, None, id="it is not"),
        pytest.param(1, {"energyKwh": 0.25}, None, id="of another pod"),
        pytest.param(0, {"energyKwh": -1.0}, None, id="less than none"),
        pytest.param(0, {"energyKwh": float("nan")}, None, id="no number"),
        pytest.param(0, {"energyKwh": float("inf")}, None, id="more than there is"),
    ],
)
def test_rank_0_reports_the_energy(
    make_pod: Callable[..., Pod], index: int, report: dict[str, Any], expected: float | None
) -> None:
    """Over all attempts, where the processors tell."""
    assert progress_status.energy_kwh([make_pod(index, termination_message=ended(**report))]) == expected


FETCHED = {"fetched": {"model": "c0ffee", "dataset": None}}


@pytest.mark.parametrize(
    ("pods", "known"),
    [
        pytest.param([], False, id="no pod"),
        pytest.param([(0, "")], False, id="no words"),
        pytest.param([(0, ended(**FETCHED))], True, id="its report"),
        pytest.param([(0, ended(**FETCHED, inventedLater=1))], True, id="of a newer trainer"),
        pytest.param([(0, ended(**{**FETCHED, "exitCode": 32}))], False, id="of one that failed"),
        pytest.param([(1, ended(**FETCHED))], False, id="of another pod"),
        pytest.param([(0, ""), (0, ended(**FETCHED))], True, id="the second pod of its index"),
    ],
)
def test_a_transfers_report_is_that_of_its_pod_when_it_ended_well(
    make_pod: Callable[..., Pod], pods: list[tuple[int, str]], known: bool
) -> None:
    """What a transfer did is told by its one pod, when it ended well."""
    said = progress_status.transfer_report(
        [make_pod(index, termination_message=words) for index, words in pods]
    )

    assert (said is not None) == known
    if said is not None and said.fetched is not None:
        assert (said.fetched.model, said.fetched.dataset) == ("c0ffee", None)
