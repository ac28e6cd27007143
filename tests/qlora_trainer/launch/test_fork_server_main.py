"""What the fork server does by itself. With its launcher: test_fork_server.py."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import pytest

from qlora_trainer.launch import fork_server_main
from qlora_trainer.launch.cpu_layout import CpuAssignment
from qlora_trainer.launch.fork_server import ForkRequest, RankSpec, fork_ranks

pytestmark = pytest.mark.process


def test_a_request_arrives_as_it_was_sent() -> None:
    """Environments may hold bytes that are not UTF-8."""
    rank = RankSpec({"A": "ä", "B": os.fsdecode(b"\xff")}, [0, 3], None, 5, 6)
    request = ForkRequest(1, 4, [rank])

    assert fork_server_main.read_request(json.dumps(asdict(request))) == request


def test_a_script_is_read_by_each_rank(tmp_path: Path) -> None:
    """A script is not looked at before it runs, and runs as a script does."""
    run = fork_server_main.program([str(tmp_path / "rank.py")])
    (tmp_path / "rank.py").write_text(
        f"import pathlib\nif __name__ == '__main__': pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    )
    run()

    assert (tmp_path / "ran").exists()


def test_a_module_is_imported_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank runs is the module's `main`, found when the program is."""
    (tmp_path / "imported_once").mkdir()
    (tmp_path / "imported_once" / "__main__.py").write_text("def main():\n    return 'ran'\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = fork_server_main.program(["-m", "imported_once"])

    assert "imported_once.__main__" in sys.modules
    assert run() == "ran"


def test_it_starts_nothing_for_another_than_its_parent(tmp_path: Path) -> None:
    """When the launcher is gone by then, no rank is started."""
    (tmp_path / "rank.py").write_text("raise SystemExit(3)")
    request = ForkRequest(1, 0, [RankSpec(dict(os.environ), sorted(os.sched_getaffinity(0)), None, 1, 2)])
    done = subprocess.run(
        [sys.executable, "-m", "qlora_trainer.launch.fork_server_main", str(tmp_path / "rank.py")],
        input=json.dumps(asdict(request)).encode(),
        capture_output=True,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (137, b"", b"")


PARALLEL = """
    import os, torch
    SUM = float(torch.ones(1 << 21).mul_(2).sum())
    def main():
        print(SUM, float(torch.ones(1 << 21).mul_(2).sum()), torch.get_num_threads())
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="OpenMP starts no thread for one CPU")
def test_ranks_compute_in_parallel_though_imports_did(tmp_path: Path) -> None:
    """OpenMP threads that an import started are not waited for by the ranks, which start their own."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "__main__.py").write_text(textwrap.dedent(PARALLEL))
    environ = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    cpus = tuple(os.sched_getaffinity(0))
    ranks = fork_ranks(
        [sys.executable, "-m", "job"],
        [environ | {"RANK": str(rank)} for rank in range(2)],
        [CpuAssignment(cpus, 2)] * 2,
        lambda: False,
    )
    for rank in ranks:
        with rank.stdout as out, rank.stderr:
            assert out.read() == b"4194304.0 4194304.0 2\n"
        assert rank.wait() == 0


BESIDE_TRANSFORMERS = """
import json, sys
import torch
import transformers.modeling_utils

before = {name.partition(".")[0] for name in sys.modules}
import qlora_trainer.__main__

after = {name.partition(".")[0] for name in sys.modules}
print(json.dumps(sorted(name for name in after - before if name not in sys.stdlib_module_names)))
"""
OURS = {"prometheus_client", "pydantic", "qlora_contract", "qlora_trainer", "tokenizers"}
"""Beside what every model of transformers needs, with what pydantic is made of."""
LATE = {
    "bitsandbytes",
    "datasets",
    "gguf",
    "matplotlib",
    "mlflow",
    "pandas",
    "peft",
    "pyarrow",
    "scipy",
    "sklearn",
}
"""What a rank may need in the end, or for some data, or that only tests need."""


def test_ranks_start_with_little_beside_what_transformers_imports() -> None:
    """Each module costs every start: what is needed later, or not by all, is imported where it is used."""
    done = subprocess.run(
        [sys.executable, "-c", BESIDE_TRANSFORMERS], capture_output=True, text=True, check=True
    )
    found = set(json.loads(done.stdout.splitlines()[-1]))
    of_pydantic = {"annotated_types", "pydantic_core", "typing_inspection"}

    assert "qlora_trainer" in found
    assert not found & LATE
    assert found <= OURS | of_pydantic
