"""Reports of ranks and termination messages."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.env import TERMINATION_LOG_ENV
from qlora_contract.progress import TerminationReport
from qlora_trainer.telemetry import termination


def a_report(cause: str = "the loss is NaN at step 7", **more: object) -> TerminationReport:
    """A report of rank 1 with this cause."""
    return TerminationReport(exit_code=13, reason="DIVERGED", cause=cause, rank=1, step=7, **more)  # type: ignore[arg-type]


def test_a_report_reaches_the_launcher(tmp_path: Path) -> None:
    """What a rank writes is what the launcher reads, and no other file is left."""
    path = tmp_path / "rank-0.json"
    termination.write_rank_report(a_report(eval_loss=1.5), {termination.REPORT_ENV: str(path)})

    assert termination.read_rank_report(path) == a_report(eval_loss=1.5)
    assert list(tmp_path.iterdir()) == [path]


def test_a_rank_started_by_hand_reports_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launcher nothing is written."""
    monkeypatch.chdir(tmp_path)
    termination.write_rank_report(a_report(), {})

    assert list(tmp_path.iterdir()) == []


def test_what_a_rank_needs_its_memory_for_outlives_it(tmp_path: Path) -> None:
    """Beside its report, which one that is killed never writes; whatever else is there is no plan."""
    path = tmp_path / "rank-0.json"
    before = termination.read_memory_plan(path)
    termination.write_memory_plan({"base": 7}, {termination.REPORT_ENV: str(path)})
    termination.write_memory_plan({"base": 8}, {})

    assert (before, termination.read_memory_plan(path)) == ({}, {"base": 7})
    for text in ("", "[]", '{"base": "x"}', '{"base": null}'):
        (tmp_path / "rank-0.json.memory").write_text(text)
        assert termination.read_memory_plan(path) == {}


def test_a_report_that_cannot_be_written_changes_no_end(tmp_path: Path) -> None:
    """/tmp is full, or its folder was removed: a finished job is finished all the same."""
    environ = {termination.REPORT_ENV: str(tmp_path / "gone" / "rank-0.json")}
    termination.write_rank_report(a_report(), environ)
    termination.write_memory_plan({"base": 7}, environ)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [None, b"", b'{"version": 1, "exitC', b'{"version": 2}', b"\xff"])
def test_a_missing_or_foreign_report_is_none(tmp_path: Path, text: bytes | None) -> None:
    """A rank that was killed leaves none, and garbage is not trusted."""
    path = tmp_path / "rank-0.json"
    if text is not None:
        path.write_bytes(text)

    assert termination.read_rank_report(path) is None


@given(st.text(), st.one_of(st.none(), st.text()), st.integers(1, 60))
def test_a_report_always_fits(cause: str, not_bit_exact: str | None, repeat: int) -> None:
    """However long the texts, the report is valid JSON in UTF-8 of at most 4,096 bytes, facts unchanged."""
    whole = a_report(cause * repeat * 20, not_bit_exact=not_bit_exact and not_bit_exact * repeat * 20)
    data = termination.to_bytes(whole)
    read = TerminationReport.model_validate_json(data)

    assert len(data) <= 4096
    assert json.loads(data.decode())["exitCode"] == 13
    assert (read.reason, read.rank, read.step) == ("DIVERGED", 1, 7)
    assert len(read.cause.splitlines()) <= 1


def test_only_the_long_text_is_cut() -> None:
    """A short cause survives beside a long other text, and the cut is shown and no deeper than needed."""
    data = termination.to_bytes(a_report("short", not_bit_exact="ä" * 9000))
    read = TerminationReport.model_validate_json(data)

    assert read.cause == "short"
    assert read.not_bit_exact is not None
    assert read.not_bit_exact.endswith("ä…")
    assert len(data) > 4090


def test_undecodable_bytes_in_a_cause_do_not_prevent_the_report() -> None:
    """A lone surrogate, as a file name may bring it, becomes a question mark; lines become one."""
    read = TerminationReport.model_validate_json(termination.to_bytes(a_report("bad\nname \udcff")))

    assert read.cause == "bad name ?"


def test_the_termination_log_is_where_the_environment_says(tmp_path: Path) -> None:
    """The named file wins; without it Kubernetes' own file is used only where there is one."""
    assert termination.termination_log({TERMINATION_LOG_ENV: str(tmp_path / "t")}) == tmp_path / "t"
    own = termination.termination_log({})
    assert (own is not None) == Path("/dev/termination-log").exists()
