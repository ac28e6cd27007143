"""The asking side of a conversation with a job's model."""

import sys
import time
from pathlib import Path

import pytest

import builders
from qlora_contract.chat import ChatRequest, Question
from qlora_contract.run_config import RunConfig
from qlora_operator.cli.chat_exchange import RefusedError, local_model, local_run, workspace_root
from qlora_operator.cli.processes import ProcessError
from qlora_operator.errors import CommandError

pytestmark = pytest.mark.process

ECHO = """
import json, sys
assert json.load(open(sys.argv[1]))["job"]["name"] == "smollm2"
ready = {"model": "/m", "scheme": "nf4", "computeDtype": "fp32"}
def tell(**event):
    print(json.dumps(event), flush=True)
opening = json.loads(sys.stdin.readline())
print("a line of something else")
tell(ready=ready | {"adapter": None if opening["baseOnly"] else "/a"})
for line in sys.stdin:
    text = json.loads(line)["questions"][0]["text"]
    if text == "die":
        sys.exit("no more")
    if text == "no":
        tell(error={"code": 11, "cause": "it cannot be asked"})
        continue
    for letter in text:
        tell(piece={"question": 0, "text": letter})
    tell(answers=[{"prompt": text, "text": text, "tokens": len(text), "cut": False}])
"""


def request(text: str) -> ChatRequest:
    """One question."""
    return ChatRequest(questions=[Question(text=text)])


def test_answers_come_piece_by_piece_and_a_refusal_ends_nothing() -> None:
    """The model is opened, asked, refuses, and is asked again; what is no event is passed over."""
    pieces: list[tuple[int, str]] = []
    with local_model(builders.a_run(), {}, [sys.executable, "-c", ECHO]) as exchange:
        ready = exchange.open(base_only=False)
        answer = exchange.ask(request("ab"), lambda number, text: pieces.append((number, text)))
        with pytest.raises(RefusedError, match=r"^invalid data: it cannot be asked$") as refused:
            exchange.ask(request("no"))
        again = exchange.ask(request("c"))

    assert ready.adapter == "/a"
    assert (answer[0].text, pieces) == ("ab", [(0, "a"), (0, "b")])
    assert refused.value.code == 11
    assert again[0].text == "c"


def test_the_end_of_the_process_is_told_with_its_last_words() -> None:
    """A process that dies in the middle of a request is an error that names its code and last line."""
    with local_model(builders.a_run(), {}, [sys.executable, "-c", ECHO]) as exchange:
        exchange.open(base_only=True)
        with pytest.raises(CommandError, match=r"process ended with code 1: no more$"):
            exchange.ask(request("die"))


def test_a_program_that_is_not_there_is_told() -> None:
    """As of every process."""
    with (
        pytest.raises(ProcessError, match=r"^/no/such could not be started"),
        local_model(builders.a_run(), {}, ["/no/such"]),
    ):
        pass


def test_the_process_ends_with_the_block(tmp_path: Path) -> None:
    """Also one that does not read its input, and when Ctrl-C leaves the block."""
    program = (
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )

    def interrupted() -> None:
        with local_model(builders.a_run(), {}, [sys.executable, "-c", program]):
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def never() -> RunConfig:
    """A job file that must not be read."""
    raise AssertionError


def test_a_job_folder_brings_its_run(tmp_path: Path) -> None:
    """run.json of a folder; a file is read otherwise, and a folder without it is named."""
    (tmp_path / "run.json").write_text(builders.a_run(job={"name": "mine"}).to_json())

    assert local_run(str(tmp_path), never).job.name == "mine"
    assert local_run("job.yaml", builders.a_run).job.name == "smollm2"
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CommandError, match="give the job's file instead"):
        local_run(str(tmp_path), never)
    (tmp_path / "run.json").unlink()
    with pytest.raises(CommandError, match=r"has no run\.json, which `qlora run` leaves there"):
        local_run(str(tmp_path), never)


PLACES: dict[str, tuple[str, str, tuple[str, Path] | None]] = {
    "a folder of the claim": ("pvc://team/a/b", "/srv/team/a/b/jobs/smollm2", ("team", Path("/srv/team"))),
    "the claim itself": ("pvc://team", "/srv/team/jobs/smollm2", ("team", Path("/srv/team"))),
    "moved elsewhere": ("pvc://team/a", "/srv/saved/jobs/smollm2", None),
    "of another name": ("pvc://team", "/srv/team/jobs/copy", None),
}


@pytest.mark.parametrize(("workspace", "folder", "expected"), PLACES.values(), ids=PLACES.keys())
def test_a_job_folder_tells_where_its_claim_is(
    workspace: str, folder: str, expected: tuple[str, Path] | None
) -> None:
    """By its place in the workspace."""
    assert workspace_root(Path(folder), builders.a_run(workspace=workspace)) == expected
