"""What `kubectl qlora` shows."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from builders import a_job
from qlora_operator.kubectl.main import jobs_table, main, status_lines

STATUS: dict[str, Any] = {
    "phase": "Running",
    "message": "training\x1b",
    "columns": {"ranks": "2/2", "step": "3/10", "loss": "1.5", "tokensPerSecond": "412", "eta": "9m", "restarts": "1"},
    "progress": {"step": 3, "totalSteps": 10},
    "checkpoint": {"step": 2},
    "placement": {"isa": "avx2", "nodes": ["n1", "n2"]},
    "conditions": [
        {
            "type": "Running", "status": "True", "reason": "Training", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
    ],
    "attempts": [
        {"attempt": 0, "stage": "fetch", "end": "2026-01-01T00:00:00Z", "reason": "Fetched", "message": "done"},
        {"attempt": 1, "stage": "train"},
    ],
}  # fmt: skip


def shown(*jobs: Any, namespaces: bool = False) -> list[list[str]]:
    """The words of the table's lines."""
    out = io.StringIO()
    Console(file=out, width=200).print(jobs_table(jobs, namespaces=namespaces))
    return [line.split() for line in out.getvalue().splitlines()]


def test_jobs_are_listed_with_the_columns_of_kubectl_get() -> None:
    """What is not known yet is a dash; the namespace only where there are several."""
    jobs = [
        a_job("docs", metadata={"namespace": "team"}, status=STATUS),
        a_job("new", metadata={"namespace": "b"}),
    ]

    assert shown(*jobs) == [
        ["NAME", "PHASE", "RANKS", "STEP", "LOSS", "TOK/S", "ETA", "RESTARTS"],
        ["docs", "Running", "2/2", "3/10", "1.5", "412", "9m", "1"],
        ["new", "-", "-", "-", "-", "-", "-", "-"],
    ]
    assert [line[0] for line in shown(*jobs, namespaces=True)] == ["NAMESPACE", "team", "b"]


def test_the_status_says_how_a_job_is_and_why() -> None:
    """Phase, message, progress, where it runs, conditions, and how its attempts ended."""
    lines = status_lines(a_job("docs", metadata={"namespace": "team"}, status=STATUS))

    assert lines[:2] == ["team/docs: Running", "  training\x1b"]
    assert "progress    step 3/10, loss 1.5, tokens/s 412, ETA 9m" in lines
    assert "placement   avx2 on n1, n2" in lines
    assert lines[-2:] == ["  0   fetch    Fetched: done", "  1   train    open"]
    assert status_lines(a_job("new", metadata={"namespace": "b"})) == ["b/new: not seen by the operator yet"]


def test_commands_of_one_machine_are_those_of_qlora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`kubectl qlora validate FILE` is `qlora validate FILE`, and needs no cluster."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "argv", ["kubectl-qlora", "validate", str(tmp_path / "job.yaml")])

    assert main() == 2
    assert "job.yaml" in capsys.readouterr().out


def test_without_a_cluster_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No kubeconfig, and no pod's service account."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    assert main(["list"]) == 1
    assert "error: no configuration of a cluster can be read" in capsys.readouterr().err
