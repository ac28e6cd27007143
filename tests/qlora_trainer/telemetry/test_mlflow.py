"""Metrics for an MLflow tracking server."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.telemetry import mlflow
from qlora_trainer.telemetry.mlflow import MlflowRun, Target, authorization, metrics_of

pytestmark = pytest.mark.process


def target(uri: str, **fields: Any) -> Target:
    """A job's run at a server."""
    known = {"experiment": "docs", "run_name": "demo", "params": {"training.seed": "7"}, "tags": {"a": "b"}}
    return Target(uri=uri, **{**known, **fields})


class Server(ThreadingHTTPServer):
    """A server that answers as it is told, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.logins: list[str | None] = []
        self.answers: dict[str, Callable[[], tuple[int, dict[str, Any]]]] = {}
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def uri(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}/proxy"

    def calls(self, path: str) -> list[dict[str, Any]]:
        """The requests for a path."""
        return [body for asked, body in list(self.asked) if asked == path]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_POST(self) -> None:
        """Answer."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0].removeprefix("/proxy/api/2.0/mlflow/")
        self.server.logins.append(self.headers.get("Authorization"))
        self.server.asked.append((path, json.loads(body or b"{}")))
        status, answer = self.server.answers.get(path, lambda: (200, {}))()
        text = json.dumps(answer).encode()
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with an experiment and one run to give; times are short."""
    monkeypatch.setattr(mlflow, "SEND_SECONDS", 0.01)
    monkeypatch.setattr(mlflow, "RETRY_SECONDS", (0.02, 0.05))
    monkeypatch.setattr(mlflow, "LAST_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(mlflow, "CLOSE_SECONDS", 2.0)
    made = Server()
    made.answers["experiments/get-by-name"] = lambda: (200, {"experiment": {"experiment_id": "5"}})
    made.answers["runs/create"] = lambda: (200, {"run": {"info": {"run_id": "r1"}}})
    yield made
    made.shutdown()
    made.server_close()


def sent(server: Server) -> list[tuple[int, str, float]]:
    """(step, name, value) of all metrics that the server took."""
    batches = (body.get("metrics", []) for body in server.calls("runs/log-batch"))
    return [(metric["step"], metric["key"], metric["value"]) for batch in batches for metric in batch]


def test_a_run_has_its_metrics_parameters_and_end(server: Server, tmp_path: Path) -> None:
    """One run in the experiment, with the job's name; its id is kept."""
    run = MlflowRun(target(server.uri), tmp_path / "mlflow.json")
    run.write({"step": 1, "loss": 2.0, "grad_norm": 0.5})
    run.write({"step": 2, "loss": 1.0, "eval_loss": 1.5})
    run.close("FINISHED")

    (created,) = server.calls("runs/create")
    assert (created["experiment_id"], created["run_name"]) == ("5", "demo")
    assert {"key": "a", "value": "b"} in created["tags"]
    assert server.calls("runs/log-batch")[0]["params"] == [{"key": "training.seed", "value": "7"}]
    assert sent(server) == [(1, "loss", 2.0), (1, "grad_norm", 0.5), (2, "loss", 1.0), (2, "eval_loss", 1.5)]
    assert server.calls("runs/update")[-1]["status"] == "FINISHED"
    assert json.loads((tmp_path / "mlflow.json").read_text())["run_id"] == "r1"


def test_the_next_attempt_goes_on_with_the_run(server: Server, tmp_path: Path) -> None:
    """It is running again, and nothing is created; at another server or in another experiment it is another run."""
    for uri in (server.uri, server.uri):
        MlflowRun(target(uri), tmp_path / "mlflow.json").close("KILLED")
    assert len(server.calls("runs/create")) == 1
    assert [body["status"] for body in server.calls("runs/update")] == ["KILLED", "RUNNING", "KILLED"]

    MlflowRun(target(server.uri, experiment="other"), tmp_path / "mlflow.json").close("KILLED")
    assert len(server.calls("runs/create")) == 2


def test_a_run_that_is_gone_is_made_anew(server: Server, tmp_path: Path) -> None:
    """The server's data were removed, or it is another server at the same address."""
    state = tmp_path / "mlflow.json"
    state.write_text(json.dumps({"uri": server.uri, "experiment": "docs", "run_id": "gone"}))
    answers = iter([(404, {"error_code": "RESOURCE_DOES_NOT_EXIST"})])
    server.answers["runs/update"] = lambda: next(answers, (200, {}))
    MlflowRun(target(server.uri), state).close("FINISHED")

    assert json.loads(state.read_text())["run_id"] == "r1"
    assert server.calls("runs/update")[-1] == {
        **server.calls("runs/update")[-1],
        "run_id": "r1",
        "status": "FINISHED",
    }


@pytest.mark.parametrize("text", ["", "{", "[]", '{"uri": 1}'])
def test_a_damaged_state_is_passed_over(text: str, server: Server, tmp_path: Path) -> None:
    """Another run begins."""
    (tmp_path / "mlflow.json").write_text(text)
    MlflowRun(target(server.uri), tmp_path / "mlflow.json").close("FINISHED")

    assert len(server.calls("runs/create")) == 1


def test_an_experiment_is_created_once(server: Server, tmp_path: Path) -> None:
    """By whichever job comes first."""
    found = iter([(404, {"error_code": "RESOURCE_DOES_NOT_EXIST"})])
    server.answers["experiments/get-by-name"] = lambda: next(
        found, (200, {"experiment": {"experiment_id": "8"}})
    )
    server.answers["experiments/create"] = lambda: (400, {"error_code": "RESOURCE_ALREADY_EXISTS"})
    MlflowRun(target(server.uri), tmp_path / "mlflow.json").close("FINISHED")

    assert server.calls("runs/create")[0]["experiment_id"] == "8"


def test_nothing_is_lost_while_the_server_is_down(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What fails is sent again, in order, and one line says that the server does not answer."""
    failures = iter([(503, {}), (500, {}), (429, {})])
    server.answers["runs/log-batch"] = lambda: next(failures, (200, {}))
    run = MlflowRun(target(server.uri, params={}), tmp_path / "mlflow.json")
    for step in range(1, 500):
        run.write({"step": step, "loss": float(step)})
    run.close("FINISHED")
    steps = [step for step, _, _ in sent(server)]

    assert sorted(set(steps)) == list(range(1, 500))
    assert steps[-1] == 499
    assert caplog.text.count("does not answer as it should") == 1
    assert all(len(body.get("metrics", [])) <= 1000 for body in server.calls("runs/log-batch"))


@pytest.mark.parametrize("listens", [False, True], ids=["nobody listens", "it never answers"])
def test_a_server_that_is_down_holds_nothing_up(
    listens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To write costs nothing, what is kept is bounded, and the end waits only so long."""
    monkeypatch.setattr(mlflow, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(mlflow, "MAX_LINES", 100)
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if listens:
            port.listen()
        run = MlflowRun(target(f"http://127.0.0.1:{port.getsockname()[1]}"), tmp_path / "mlflow.json")
        began = time.monotonic()
        for step in range(5000):
            run.write({"step": step, "loss": 1.0})
        assert time.monotonic() - began < 1
        assert len(run._lines) == 100
        run.close("FINISHED")
        assert time.monotonic() - began < 5

    assert caplog.text.count("does not answer") <= 1


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        pytest.param(401, {}, id="unauthorized"),
        pytest.param(400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}, id="wrong"),
    ],
)
def test_a_server_that_refuses_is_asked_again_later(
    status: int,
    answer: dict[str, Any],
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once it takes them nothing is lost, and the log says both, once."""
    monkeypatch.setattr(mlflow, "REFUSED_SECONDS", 0.05)
    answers = iter([(status, answer)] * 3)
    server.answers["runs/create"] = lambda: next(answers, (200, {"run": {"info": {"run_id": "r1"}}}))
    run = MlflowRun(target(server.uri), tmp_path / "mlflow.json")
    run.write({"step": 1, "loss": 2.0})
    deadline = time.monotonic() + 10
    while not sent(server):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.close("FINISHED")

    assert len(server.calls("runs/create")) == 4
    assert sent(server) == [(1, "loss", 2.0)]
    assert caplog.text.count("refuses the metrics") == 1
    assert caplog.text.count("takes the metrics again") == 1


def test_a_server_that_refuses_does_not_hold_up_the_end(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log says what it lacks."""
    server.answers["runs/create"] = lambda: (401, {})
    run = MlflowRun(target(server.uri), tmp_path / "mlflow.json")
    run.write({"step": 1, "loss": 2.0})
    began = time.monotonic()
    run.close("FINISHED")

    assert time.monotonic() - began < 2
    assert (
        "give it MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        in caplog.text
    )
    assert not (tmp_path / "mlflow.json").exists()


def test_a_run_that_is_deleted_meanwhile_is_made_anew(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was sent is gone with it; the rest is in another run."""
    monkeypatch.setattr(mlflow, "REFUSED_SECONDS", 0.05)
    gone = (404, {"error_code": "RESOURCE_DOES_NOT_EXIST"})
    answers = iter([(200, {}), gone])  # its parameters, then metrics
    server.answers["runs/log-batch"] = lambda: next(answers, (200, {}))
    server.answers["runs/update"] = lambda: gone if len(server.calls("runs/create")) == 1 else (200, {})
    run = MlflowRun(target(server.uri), tmp_path / "mlflow.json")
    run.write({"step": 1, "loss": 2.0})
    deadline = time.monotonic() + 10
    while len(server.calls("runs/create")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.close("FINISHED")

    assert sent(server)[-1] == (1, "loss", 2.0)


LOGIN = "Basic dXNlcjp3b3Jk"
CREDENTIALS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "none": ({}, {}),
    "a name and a password": (
        {"MLFLOW_TRACKING_USERNAME": "user", "MLFLOW_TRACKING_PASSWORD": "word"},
        {"Authorization": LOGIN},
    ),
    "a token": ({"MLFLOW_TRACKING_TOKEN": "t0"}, {"Authorization": "Bearer t0"}),
}


@pytest.mark.parametrize(("known", "header"), CREDENTIALS.values(), ids=CREDENTIALS)
def test_credentials_are_a_secrets_or_the_environments(
    known: dict[str, str], header: dict[str, str], tmp_path: Path
) -> None:
    """A mounted Secret is all that counts; without one, what MLflow's own clients read."""
    for name, value in known.items():
        (tmp_path / name).write_text(f"{value}\n")

    assert authorization(tmp_path, {"MLFLOW_TRACKING_TOKEN": "other"}) == header
    assert authorization(None, known) == header


def test_a_login_that_is_renewed_is_used(server: Server, tmp_path: Path) -> None:
    """The kubelet replaces the files of a Secret."""
    (tmp_path / "MLFLOW_TRACKING_TOKEN").write_text("first")
    run = MlflowRun(target(server.uri, credentials=tmp_path), tmp_path / "mlflow.json")
    deadline = time.monotonic() + 10
    while not server.calls("runs/create"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (tmp_path / "MLFLOW_TRACKING_TOKEN").write_text("second")
    run.write({"step": 1, "loss": 2.0})
    run.close("FINISHED")

    assert (server.logins[0], server.logins[-1]) == ("Bearer first", "Bearer second")


def test_a_redirect_is_not_followed(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The administrator has allowed one address, and a server cannot name another."""
    server.answers["experiments/get-by-name"] = lambda: (302, {})
    MlflowRun(target(server.uri), tmp_path / "mlflow.json").close("FINISHED")

    assert "status 302" in caplog.text
    assert server.calls("runs/create") == []


@pytest.mark.parametrize("answer", [{}, {"run": None}, {"run": {"info": []}}], ids=str)
def test_another_kind_of_server_is_survived(
    answer: dict[str, Any], server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Something else listens at the address."""
    server.answers["runs/create"] = lambda: (200, answer)
    MlflowRun(target(server.uri), tmp_path / "mlflow.json").close("FINISHED")

    assert "does not answer as it should" in caplog.text


def test_what_is_no_number_is_not_sent() -> None:
    """JSON has none for it, and the server refuses a batch for one."""
    line = {"step": 3, "loss": math.nan, "eval_loss": None, "grad_norm": math.inf, "tokens": 5, "epoch": "x"}

    assert metrics_of(line, 1000) == [{"key": "tokens", "value": 5, "timestamp": 1000, "step": 3}]


# --- the real one


SERVE = "from mlflow.server import app; app.run('127.0.0.1', {port}, threaded=True)"
"""MLflow's own application; `mlflow server` puts the same behind another HTTP server, which needs all of mlflow."""


@pytest.fixture(scope="module")
def tracking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server that keeps its runs in files; its address."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = {
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "_MLFLOW_SERVER_FILE_STORE": str(folder / "runs"),
        "_MLFLOW_SERVER_ARTIFACT_ROOT": str(folder / "artifacts"),
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE.format(port=port)],
            env={**os.environ, **store}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        uri = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=5).read()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.5)
        yield uri
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_a_real_server_has_one_run_of_two_attempts(tracking_server: str, tmp_path: Path) -> None:
    """Killed and resumed: one run with all steps, parameters and tags, which is finished at the end."""
    state = tmp_path / "mlflow.json"
    for status, steps in (("KILLED", range(1, 4)), ("FINISHED", range(4, 7))):
        run = MlflowRun(target(tracking_server, experiment="a b/ü"), state)
        for step in steps:
            run.write({"step": step, "loss": 1.0 / step, "learning_rate": 0.1})
        run.close(status)
    client = __import__("mlflow").MlflowClient(tracking_server)
    experiment = client.get_experiment_by_name("a b/ü")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")

    assert found.info.run_id == json.loads(state.read_text())["run_id"]
    assert (found.info.status, found.info.run_name) == ("FINISHED", "demo")
    assert found.data.params == {"training.seed": "7"}
    assert found.data.tags["a"] == "b"
    assert [(each.step, each.value) for each in history] == [(step, 1.0 / step) for step in range(1, 7)]
