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


class Screen:
    """A display on a file, with a clock of the test's own."""

    def __init__(self, *, terminal: bool = False) -> None:
        self.out, self.now = io.StringIO(), 0.0
        console = Console(
            file=self.out,
            force_terminal=terminal,
            width=100,
            color_system="standard",
            no_color=True,
            legacy_windows=False,
        )
        self.display = Display(console, "demo", lambda: self.now, lambda: f"T{self.now:g}")

    def show(self, *reports: tuple[float, ProgressReport | None], starting: str = "Importing") -> list[str]:
        """Show these at these times, and the lines that stay: on a terminal those above the live display."""
        with self.display.starting(starting) as display:
            for self.now, report in reports:
                display.show(report)
        shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.out.getvalue()).replace("\r", "\n")
        return [line.rstrip() for line in shown.splitlines() if line.strip()]


def working(
    name: str, done: int = 0, total: int | None = None, unit: str = "tokens", **more: Any
) -> ProgressReport:
    """A report of work besides steps."""
    return a_report(
        work=Work.model_validate({"name": name, "unit": unit, "done": done, "total": total}), **more
    )


def test_only_what_is_known_is_shown() -> None:
    """Before the first step there is little to tell."""
    assert facts(a_report(total_steps=0)) == []
    assert facts(a_report(memory_estimate=GIB)) == ["step 3/7", "memory estimate 1.00 GiB"]


def test_all_that_is_known_is_shown() -> None:
    """Step, losses, learning rate, speed, time left, memory, checkpoint."""
    report = a_report(
        loss=1.83217,
        eval_loss=2.0,
        learning_rate=2e-4,
        tokens_per_second=411.6,
        eta_seconds=552.0,
        memory_estimate=2 * GIB,
        memory_peak=GIB,
        checkpoint=CheckpointRef(step=2, time="2026-01-01T00:00:00Z", uri="pvc://a/b"),
    )
    assert "  ".join(facts(report)) == (
        "step 3/7  loss 1.8322  eval loss 2.0000  lr 2.00e-04  412 tok/s  ETA 9m 12s  "
        "memory 1.00 GiB (estimate 2.00 GiB)  checkpoint at step 2"
    )


@pytest.mark.parametrize(
    ("report", "seconds", "shown"),
    [
        pytest.param(working("tokenizing", unit="records"), 0, "Tokenizing", id="nothing yet"),
        pytest.param(
            working("tokenizing", 5120, unit="records"), 9, "Tokenizing  5,120 records", id="no total"
        ),
        pytest.param(
            working("loading the model", GIB, 2 * GIB, unit="bytes"),
            30,
            "Loading the model  50 %  1.00 of 2.00 GiB  ETA 30s",
            id="bytes",
        ),
        pytest.param(
            working("evaluating the base", 410, 1000, loss=2.5, tokens_per_second=400.0, eta_seconds=0.0),
            41,
            "Evaluating the base  41 %  410/1,000 tokens  ETA 59s",
            id="the steps' loss, speed and time left are not of this work",
        ),
        pytest.param(
            a_report(stage="Fetching", total_steps=0, step=0, bytes_done=GIB // 2, bytes_total=2 * GIB),
            0,
            "Fetching  25 %  0.50 of 2.00 GiB",
            id="a transfer",
        ),
        pytest.param(
            a_report(stage="Fetching", total_steps=0, step=0, waiting="hub: 503; retrying in 8 s"),
            0,
            "Fetching  hub: 503; retrying in 8 s",
            id="a transfer that fails",
        ),
        pytest.param(a_report(stage="Starting"), 5, "Starting", id="steps are not of other stages"),
    ],
)
def test_each_stage_has_its_own_name_amount_and_time(
    report: ProgressReport, seconds: float, shown: str
) -> None:
    """What takes its time before, between and after steps is never an empty bar."""
    lines = Screen().show((0.0, report), (seconds, None), (100.0, report))
    named = shown.partition("  ")[0]

    assert "  ".join([named, *facts(report, seconds)]) == shown
    assert any(line.startswith(f"T0 demo: {named}  ") for line in lines)


def test_without_a_terminal_a_stage_has_a_line_and_then_one_now_and_then() -> None:
    """With the time of day, and the time since the start."""
    lines = Screen().show(
        (0.0, None),
        (1.0, None),
        (11.0, working("tokenizing", unit="records")),
        (12.0, working("tokenizing", 512, unit="records")),
        (27.0, working("tokenizing", 4096, unit="records")),
        (50.0, working("tokenizing", 4096, unit="records")),
        (70.0, a_report(stage="Publishing")),
        (80.0, None),
    )

    assert lines == [
        "T0 demo: Importing  elapsed 0s",
        "T11 demo: Tokenizing  elapsed 11s",
        "T27 demo: Tokenizing  4,096 records  elapsed 27s",
        "T70 demo: Publishing  elapsed 1m 10s",
    ]


def test_a_failed_transfer_is_told_at_once_without_a_terminal() -> None:
    """Each failure once: its reason is what a user waits to see."""
    told = [
        a_report(stage="Fetching", step=0, total_steps=0, waiting=text)
        for text in ("503", "503", "no route", None)
    ]
    lines = Screen().show(*enumerate(told, start=1))

    assert [line.partition("demo: ")[2] for line in lines] == [
        "Fetching  503  elapsed 1s",
        "Fetching  no route  elapsed 3s",
    ]


@pytest.mark.parametrize(
    ("total", "seen", "expected"),
    [
        pytest.param(7, [1, 2, 2, 7], [1, 2, 7], id="few steps: each that is seen"),
        pytest.param(
            100, [1, 3, 4, 6, 9, 50, 99, 100], [4, 9, 50, 99, 100], id="many: one in four, and the last"
        ),
        pytest.param(100_000, [1, 3_999, 4_001], [4_001], id="very many"),
    ],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_steps_have_a_history(total: int, seen: list[int], expected: list[int], *, terminal: bool) -> None:
    """Every so many steps a line stays, on a terminal and without one."""
    steps = [a_report(step=step, total_steps=total, loss=2.0, learning_rate=1e-4) for step in seen]
    lines = Screen(terminal=terminal).show(
        (0.5, a_report(step=0, total_steps=total)), *((1.0, each) for each in steps)
    )
    history = [
        int(m[1]) for line in lines if (m := re.search(r"  ?Training  step (\d+)/\d+  loss 2.0000  lr", line))
    ]

    assert history == expected


def test_a_resumed_attempt_has_no_history_of_steps_that_others_made() -> None:
    """Before its first step there is the step to go on from, and no loss."""
    lines = Screen().show(
        (0.0, a_report(step=50, total_steps=100)), (1.0, a_report(step=51, total_steps=100, loss=2.0))
    )

    assert lines == ["T0 demo: Training  step 50/100  elapsed 0s"]


def test_on_a_terminal_what_is_over_stays_with_its_time() -> None:
    """Stages and steps stand above one picture that is drawn over and over, and goes at the end."""
    screen = Screen(terminal=True)
    lines = screen.show(
        (0.0, None),
        (6.0, working("tokenizing", unit="records")),
        (6.5, a_report(step=0, memory_estimate=GIB)),
        (9.0, a_report(step=1, loss=1.5)),
        (10.0, working("evaluating the base", 41, 100, loss=1.5, step=1)),
        (30.0, a_report(step=2, loss=1.25, eval_loss=1.75)),
    )
    kept = [line.strip() for line in lines if not line.startswith("demo")]

    assert "6s  Importing took 6s" in kept
    assert "9s  Training  step 1/7  loss 1.5000" in kept
    assert "30s  Evaluating the base took 20s  eval loss 1.7500" in kept
    assert not [line for line in kept if "Tokenizing took" in line], "half a second is not worth a line"
    assert any(re.match(r"demo Evaluating the base \S+ +41 %  41/100 tokens", line) for line in lines)
    assert any("elapsed 10s" in line for line in lines)


def test_a_bar_moves_while_nothing_is_known() -> None:
    """An empty bar looks like a program that hangs."""

    def bar(at: float, report: ProgressReport | None) -> str:
        screen = Screen(terminal=True)
        shown = screen.show((0.0, report), (at, report))
        return [line for line in shown if line.startswith("demo")][-1]

    assert bar(1.0, None) != bar(1.3, None)
    assert "━" in bar(1.0, a_report(step=0))


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
        pytest.param(
            {"base_eval_loss": 2.0, "eval_loss_unquantized": 1.5},
            "eval loss  1.5000, base model 2.0000: 25.0 % below it",
            id="base not quantized",
        ),
    ],
)
def test_a_result_tells_no_more_than_is_known(fields: dict[str, Any], line: str | None) -> None:
    """What was not measured is left out."""
    told = [text for text in result_lines(RESULT | fields, Path("a")) if text.startswith("eval")]

    assert told == ([line] if line else [])


def test_a_result_tells_where_the_time_went() -> None:
    """What a user waited for first, and what came after it."""
    timeline = {"imports": 8.12, "tokenizing": 0.01, "first step": 2.0, "training": 30.25}

    assert result_lines(RESULT | {"timeline": timeline}, Path("a"))[-1] == (
        "time       10.1 s to the end of the first step: imports 8.1 s, first step 2.0 s; then training 30.2 s"
    )
    assert "damaged" in result_lines(RESULT | {"timeline": {"imports": "long"}}, Path("a"))[-1]


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


def test_a_stage_does_not_show_the_one_before() -> None:
    """What was fetched says nothing of training that is about to start."""
    screen = Screen()
    screen.show((0.0, a_report(stage="Fetching", step=0, total_steps=0, bytes_done=1, bytes_total=1)))

    assert screen.show((2.0, None))[-1] == "T2 demo: Importing  elapsed 2s"


@pytest.mark.parametrize(
    "report", [{}, {"eval_loss": "x"}, RESULT | {"seconds": None}], ids=["empty", "text", "null"]
)
def test_a_damaged_report_leaves_the_adapter(report: dict[str, Any]) -> None:
    """The adapter has a manifest of its own, and is as good as before."""
    assert result_lines(report, Path("a")) == ["adapter    a", "trained    (training_report.json is damaged)"]
