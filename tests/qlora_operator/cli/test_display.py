"""What `qlora run` shows."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qlora_contract.progress import CheckpointRef, ProgressReport, Work
from qlora_operator.cli.display import Display, facts, printable, result_lines

GIB = 2**30
RESULT: dict[str, Any] = {
    "eval_loss": 1.5,
    "base_eval_loss": 1.9,
    "base_eval_loss_quantized": 2.0,
    "steps": 7,
    "tokens": 7000,
    "seconds": 70.0,
    "tokens_per_second": 100.0,
    "world_size": 2,
    "peak_memory_bytes": GIB,
}


def a_report(**fields: Any) -> ProgressReport:
    """A report of step 3 of 7."""
    known = {"job_uid": "u", "attempt": 1, "stage": "Training", "step": 3, "total_steps": 7, "epoch": 0.4}
    return ProgressReport.model_validate({**known, "updated_time": "2026-01-01T00:00:00Z", **fields})


def test_only_what_is_known_is_shown() -> None:
    """Before the first step there is little to tell."""
    assert facts(a_report(total_steps=0)) == []
    assert facts(a_report(memory_estimate=GIB)) == ["step 3/7", "memory estimate 1.00 GiB"]


def test_all_that_is_known_is_shown() -> None:
    """Step, losses, speed, time left, memory, checkpoint."""
    report = a_report(
        loss=1.83217,
        eval_loss=2.0,
        tokens_per_second=411.6,
        eta_seconds=552.0,
        memory_estimate=2 * GIB,
        memory_peak=GIB,
        checkpoint=CheckpointRef(step=2, time="2026-01-01T00:00:00Z", uri="pvc://a/b"),
    )
    assert "  ".join(facts(report)) == (
        "step 3/7  loss 1.8322  eval loss 2.0000  412 tok/s  ETA 9m 12s  memory 1.00 GiB (estimate 2.00 GiB)  "
        "checkpoint at step 2"
    )


@pytest.mark.parametrize(
    ("work", "shown"),
    [
        pytest.param({"name": "tokenizing", "unit": "records"}, "Tokenizing", id="nothing yet"),
        pytest.param(
            {"name": "tokenizing", "unit": "records", "done": 5120},
            "Tokenizing  5,120 records",
            id="no total",
        ),
        pytest.param(
            {"name": "loading the model", "unit": "bytes", "done": GIB, "total": 2 * GIB},
            "Loading the model  1.00 of 2.00 GiB",
            id="bytes",
        ),
        pytest.param(
            {"name": "evaluating the base", "unit": "tokens", "done": 410, "total": 1000},
            "Evaluating the base  410/1,000 tokens",
            id="tokens",
        ),
    ],
)
def test_work_besides_steps_has_its_own_name_and_amount(work: dict[str, Any], shown: str) -> None:
    """What takes its time before, between and after steps is never an empty bar."""
    out = io.StringIO()
    with Display(Console(file=out), "demo") as display:
        display.show(a_report(stage="Starting", work=Work(**work)))

    assert out.getvalue() == f"demo: {shown}\n"


def test_without_a_terminal_lines_are_few() -> None:
    """A line for each stage, and else one every few seconds, if there is anything new."""
    shown = [
        (0.0, None),
        (10.0, None),
        (11.0, a_report()),
        (11.5, a_report(step=4)),
        (16.5, a_report(step=5)),
        (30.0, a_report(step=5)),
        (30.1, a_report(step=7, stage="Publishing")),
        (40.0, None),
    ]
    times, out = iter([0.0, *(at for at, _ in shown)]), io.StringIO()
    with Display(Console(file=out), "demo", clock=lambda: next(times)) as display:
        for _, report in shown:
            display.show(report)

    assert out.getvalue().splitlines() == [
        "demo: Starting",
        "demo: Training  step 3/7",
        "demo: Training  step 5/7",
        "demo: Publishing  step 7/7",
    ]


def test_on_a_terminal_the_display_is_live() -> None:
    """One picture is drawn over and over, lines that are said stand above it, and the last report stays."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None, legacy_windows=False)
    with Display(console, "demo") as display:
        display.show(None)
        display.show(a_report(loss=1.5))
        display.print("resumed after step 2")
        display.show(None)

    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).replace("\r", "\n").splitlines()
    assert shown[0].startswith("demo Starting")
    assert "resumed after step 2" in [line.strip() for line in shown]
    assert [line.split() for line in shown if "demo" in line][-1][:2] == ["demo", "Training"]
    assert shown[-1].strip() == "loss 1.5000"


def test_a_result_tells_what_was_gained() -> None:
    """Where the adapter is, its loss beside the base's, time and memory."""
    assert result_lines(RESULT, Path("/w/adapter")) == [
        "adapter    /w/adapter",
        "eval loss  1.5000, base model 1.9000 unquantized and 2.0000 quantized: 25.0 % below the quantized base",
        "trained    7 steps, 7,000 tokens in 1m 10s, 100 tokens/s with 2 rank(s)",
        "memory     1.00 GiB peak per rank",
    ]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        pytest.param(
            {"base_eval_loss": None},
            "eval loss  1.5000, base model 2.0000 quantized: 25.0 % below the quantized base",
            id="no fp32",
        ),
        pytest.param(
            {"eval_loss": 2.5, "base_eval_loss": None},
            "eval loss  2.5000, base model 2.0000 quantized: 25.0 % above the quantized base",
            id="worse",
        ),
        pytest.param({"eval_loss": None}, None, id="no evaluation"),
    ],
)
def test_a_result_tells_no_more_than_is_known(fields: dict[str, Any], line: str | None) -> None:
    """What was not measured is left out."""
    told = [text for text in result_lines(RESULT | fields, Path("a")) if text.startswith("eval")]

    assert told == ([line] if line else [])


def test_an_inexact_resume_is_told() -> None:
    """The reason why the result may differ in the last bits stands in the result."""
    assert result_lines(RESULT | {"not_bit_exact": "world_size 1 -> 2"}, Path("a"))[-1] == (
        "resumed    not bit-exact: world_size 1 -> 2"
    )


@given(st.text())
def test_nothing_printable_can_move_the_cursor(text: str) -> None:
    """No control character but newline and tab is left, and nothing else is changed."""
    shown = printable(text)

    assert len(shown) == len(text)
    assert all(c.isprintable() or c in "\n\t" for c in shown)
    assert all(a == b for a, b in zip(text, shown, strict=True) if a.isprintable())


def test_a_transfer_is_shown_in_bytes() -> None:
    """How much has come, of how much; on a terminal with a bar."""
    report = a_report(stage="Fetching", step=0, total_steps=0, bytes_done=GIB // 2, bytes_total=2 * GIB)
    assert facts(report) == ["0.50 of 2.00 GiB"]

    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100, color_system=None)
    with Display(console, "job") as display:
        display.show(report)
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", text.getvalue())
    assert re.search(r"job Fetching \S+\s+0\.50 of 2\.00 GiB", shown)


def test_a_stage_does_not_show_the_one_before() -> None:
    """What was fetched says nothing of training that is about to start."""
    text = io.StringIO()
    display = Display(Console(file=text, width=200), "job")
    with display:
        display.show(a_report(stage="Fetching", step=0, total_steps=0, bytes_done=1, bytes_total=1))
    with display:
        display.show(None)

    assert text.getvalue().splitlines()[-1] == "job: Starting"


@pytest.mark.parametrize(
    "report", [{}, {"eval_loss": "x"}, RESULT | {"seconds": None}], ids=["empty", "text", "null"]
)
def test_a_damaged_report_leaves_the_adapter(report: dict[str, Any]) -> None:
    """The adapter has a manifest of its own, and is as good as before."""
    assert result_lines(report, Path("a")) == ["adapter    a", "trained    (training_report.json is damaged)"]
