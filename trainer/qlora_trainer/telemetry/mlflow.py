"""Metrics for an MLflow tracking server, by its REST interface (https://mlflow.org/docs/latest/rest-api.html).

A thread of its own talks to the server. Training never waits for it: what it could not send is kept up to a bound, and
one line of the log says that the server does not answer. Redirects are not followed and no proxy is asked: the
administrator has allowed one address. A server that refuses is asked again some minutes later: a login may be put
right, or renewed, while a job trains for days.
"""

import base64
import collections
import http.client
import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from qlora_contract.files import read_json, write_atomically

log = logging.getLogger(__name__)

REQUEST_SECONDS = 10.0
"""The longest that one answer is waited for."""
SEND_SECONDS = 2.0
"""How long lines are collected before they are sent together."""
RETRY_SECONDS = (5.0, 60.0)
"""Between two tries while the server does not answer: the first pause, which doubles, and the longest."""
REFUSED_SECONDS = 300.0
"""Between two tries while the server refuses."""
LAST_RETRY_SECONDS = 1.0
"""Between two tries at the end."""
CLOSE_SECONDS = 10.0
"""The longest that the end waits for what is left to be sent."""
MAX_LINES = 10_000
"""Lines that are kept while the server does not answer; then the oldest are dropped."""
MAX_METRICS = 1000
"""In one request, as the server limits it."""
MAX_PARAMS = 100
MAX_PARAM_CHARACTERS = 6000
_MAX_ANSWER = 2**20
METRICS = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens", "seconds", "memory_peak", "epoch")
"""Of a line of metrics.jsonl, under the same names."""
USERNAME, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
"""Keys of the Secret, and variables of the environment where there is none; the names are MLflow's."""
_LOST_RUN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class _RefusedError(Exception):
    """The server answers that a request is wrong: to repeat it at once does not help."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status, self.code = status, code


@dataclass(frozen=True)
class Target:
    """Where the metrics go."""

    uri: str
    experiment: str
    run_name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    credentials: Path | None = None
    """Folder of a mounted Secret; read for each request, since it may be renewed. None: the environment's."""


class MlflowRun:
    """The run of a job at a tracking server: the same one for all attempts."""

    def __init__(self, target: Target, state: Path) -> None:
        """Begin to talk to the server.

        Args:
            target: where to.
            state: file that keeps the run's id from attempt to attempt.
        """
        self._target, self._state = target, state
        self._lines: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque(maxlen=MAX_LINES)
        self._run_id: str | None = None
        self._status: str | None = None
        self._deadline = math.inf
        self._wake = threading.Event()
        self._said = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def write(self, line: Mapping[str, Any]) -> None:
        """Send a line of metrics.jsonl, some time."""
        self._lines.append((_now(), line))

    def close(self, status: str) -> None:
        """Send what is left and the run's end, or give up after CLOSE_SECONDS.

        Args:
            status: FINISHED, FAILED or KILLED, as the server has them.
        """
        self._deadline = time.monotonic() + CLOSE_SECONDS
        self._status = status
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)

    # --- the thread

    def _work(self) -> None:
        pause = RETRY_SECONDS[0]
        while True:
            closing = self._status is not None
            try:
                self._send()
                if self._said:
                    self._said = False
                    log.warning("the tracking server %s takes the metrics again", self._target.uri)
                pause = RETRY_SECONDS[0]
                if closing:
                    self._call("runs/update", run_id=self._run_id, status=self._status, end_time=_now())
                    return
                self._wake.wait(SEND_SECONDS)
            except _RefusedError as error:
                self._say(
                    f"refuses the metrics ({error}){self._hint(error)}; training goes on, and it is asked again"
                )
                if error.code in _LOST_RUN:
                    self._run_id = None  # somebody may have deleted it
                if closing:
                    return
                self._wake.wait(REFUSED_SECONDS)
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
                what = str(error) or type(error).__name__
                self._say(f"does not answer as it should ({what}); training goes on, and it is tried again")
                if not closing:
                    self._wake.wait(pause)
                elif time.monotonic() + LAST_RETRY_SECONDS < self._deadline:
                    time.sleep(LAST_RETRY_SECONDS)
                else:
                    return
                pause = min(2 * pause, RETRY_SECONDS[1])

    def _send(self) -> None:
        """Send all lines that there are; those of a request that fails stay."""
        if self._run_id is None:
            self._run_id = self._open_run()
        while self._lines:
            lines = [
                self._lines[index] for index in range(min(len(self._lines), MAX_METRICS // len(METRICS)))
            ]
            metrics = [metric for at, line in lines for metric in metrics_of(line, at)]
            if metrics:
                self._call("runs/log-batch", run_id=self._run_id, metrics=metrics)
            for sent in lines:
                if self._lines and self._lines[0] is sent:  # it may have been dropped meanwhile
                    self._lines.popleft()

    def _open_run(self) -> str:
        """The id of the run of the attempts before, or of a new one."""
        known = self._known_run()
        if known is not None:
            try:
                self._call("runs/update", run_id=known, status="RUNNING")
                return known
            except _RefusedError as error:
                if error.code not in _LOST_RUN:
                    raise
        tags = {"mlflow.runName": self._target.run_name, "mlflow.source.type": "JOB", **self._target.tags}
        made = self._call(
            "runs/create",
            experiment_id=self._experiment_id(),
            run_name=self._target.run_name,
            start_time=_now(),
            tags=[{"key": key, "value": value} for key, value in tags.items()],
        )
        run_id = str(made["run"]["info"]["run_id"])
        params = [
            {"key": key, "value": value[:MAX_PARAM_CHARACTERS]} for key, value in self._target.params.items()
        ]
        for start in range(0, len(params), MAX_PARAMS):
            self._call("runs/log-batch", run_id=run_id, params=params[start : start + MAX_PARAMS])
        kept = {"uri": self._target.uri, "experiment": self._target.experiment, "run_id": run_id}
        write_atomically(self._state, json.dumps(kept))
        return run_id

    def _known_run(self) -> str | None:
        try:
            kept = read_json(self._state)
            same = (kept["uri"], kept["experiment"]) == (self._target.uri, self._target.experiment)
            return str(kept["run_id"]) if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _experiment_id(self) -> str:
        name = self._target.experiment
        for create in (False, True, False):  # another job may create it in between
            try:
                if create:
                    return str(self._call("experiments/create", name=name)["experiment_id"])
                found = self._call("experiments/get-by-name", method="GET", experiment_name=name)
                return str(found["experiment"]["experiment_id"])
            except _RefusedError as error:
                if error.code not in ("RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"):
                    raise
        raise ValueError(f"experiment {name} is neither there nor can it be created")

    def _call(self, path: str, method: str = "POST", **fields: Any) -> dict[str, Any]:
        """The server's answer.

        Raises:
            _RefusedError: it does not take the request.
            OSError, HTTPException, ValueError: it does not answer as such a server does.
        """
        parts = urlsplit(self._target.uri)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        left = max(0.1, min(REQUEST_SECONDS, self._deadline - time.monotonic()))
        connection = kind(str(parts.hostname), parts.port, timeout=left)
        headers = authorization(self._target.credentials)
        target = f"{parts.path.rstrip('/')}/api/2.0/mlflow/{path}"
        try:
            if method == "GET":
                connection.request(method, f"{target}?{urlencode(fields)}", headers=headers)
            else:
                body = json.dumps(fields).encode()
                connection.request(method, target, body, {"Content-Type": "application/json", **headers})
            response = connection.getresponse()
            answer = _object(response.read(_MAX_ANSWER))
        finally:
            connection.close()
        if 400 <= response.status < 500 and response.status not in (408, 429):
            raise _RefusedError(
                response.status, str(answer.get("error_code", "")), str(answer.get("message", ""))
            )
        if response.status != http.client.OK:
            raise ValueError(f"status {response.status}")
        return answer

    def _hint(self, error: _RefusedError) -> str:
        if error.status not in (401, 403):
            return ""
        given = self._target.credentials or "the environment"
        return f": give it {USERNAME} and {PASSWORD}, or {TOKEN}, that it takes; they are read from {given}"

    def _say(self, what: str) -> None:
        """Log it, the first time."""
        if not self._said:
            self._said = True
            log.warning("the tracking server %s %s", self._target.uri, what)


def authorization(folder: Path | None, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The header that credentials make; none without any.

    Args:
        folder: of a mounted Secret; None: there is none.
        environ: read in its place.
    """
    known = {} if folder is not None else environ
    if folder is not None:
        names = [name for name in (USERNAME, PASSWORD, TOKEN) if (folder / name).is_file()]
        known = {name: (folder / name).read_text(errors="replace").strip() for name in names}
    if token := known.get(TOKEN):
        return {"Authorization": f"Bearer {token}"}
    if user := known.get(USERNAME):
        login = base64.b64encode(f"{user}:{known.get(PASSWORD, '')}".encode()).decode()
        return {"Authorization": f"Basic {login}"}
    return {}


def metrics_of(line: Mapping[str, Any], at: int) -> list[dict[str, Any]]:
    """The metrics of a line of metrics.jsonl as the server takes them. `at`: its time, in milliseconds."""
    values = [(name, line.get(name)) for name in METRICS]
    return [
        {"key": name, "value": value, "timestamp": at, "step": line["step"]}
        for name, value in values
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def _now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def _object(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body or b"{}")
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
