"""The backends in a script that knows nothing of this project."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = """
import json, os, sys, threading
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group(sys.argv[1])
rank, size = dist.get_rank(), dist.get_world_size()
said = {}

def save():
    with open(f"{sys.argv[2]}/{rank}.json", "w") as file:
        json.dump(said, file)

for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8):
    for count in (0, 1, 7, 100_001):
        own = (torch.arange(count) % 20 + rank).to(dtype)
        expected = (size * (torch.arange(count) % 20) + size * (size - 1) // 2).to(dtype)
        summed = own.clone()
        dist.all_reduce(summed)
        assert torch.equal(summed, expected), ("sum", dtype, count)
        highest = own.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        assert torch.equal(highest, own - rank + size - 1), ("max", dtype, count)
        sent = own.clone()
        dist.broadcast(sent, size - 1)
        assert torch.equal(sent, own - rank + size - 1), ("broadcast", dtype, count)
        gathered = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(gathered, own)
        assert all(torch.equal(each, own - rank + peer) for peer, each in enumerate(gathered)), ("gather", dtype)

mean = torch.tensor([float(rank)])
if sys.argv[1] != "gloo":  # which has no AVG
    dist.all_reduce(mean, dist.ReduceOp.AVG)
said["mean"] = mean.item()

works = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(20)]
said["async"] = [work.get_future().wait()[0].sum().item() for work in works]
objects = [None] * size
dist.all_gather_object(objects, {"rank": rank, "text": "x" * rank})
said["objects"] = objects

groups = [dist.new_group([0, 1]), dist.new_group(list(range(size))), None]
def sum_often(group, number):
    for _ in range(100):
        tensor = torch.full((1000,), float(number))
        dist.all_reduce(tensor, group=group)
        assert (tensor == size * number).all()
threads = [threading.Thread(target=sum_often, args=(group, number)) for number, group in enumerate(groups)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]

torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(8, 4))
model(torch.full((2, 8), float(rank + 1))).square().sum().backward()
said["gradient"] = model.module.weight.grad.flatten().tolist()
if sys.argv[1] == "gloo":
    save()
    # Gloo's threads sometimes end the process with SIGABRT when its groups are destroyed.
    dist.barrier()
    os._exit(0)

for what in (torch.ones(4, 4).t()[:2], torch.ones(3, dtype=torch.bool)):
    try:
        dist.all_reduce(what)
    except RuntimeError as error:
        said.setdefault("refused", []).append(str(error).splitlines()[0])

dist.barrier()
dist.destroy_process_group()
dist.init_process_group(sys.argv[1])
again = torch.ones(1)
dist.all_reduce(again)
said["again"] = again.item()
dist.destroy_process_group()
save()
"""


def run(torch_name: str, folder: Path) -> list[dict[str, Any]]:
    """What two ranks of the script said, started as its users would."""
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    words = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "script.py",
        torch_name,
        str(folder),
    ]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def with_gloo(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the script says with torch's own backend."""
    return run("gloo", tmp_path_factory.mktemp("plain") / "gloo")


@pytest.mark.parametrize("torch_name", ["ccl", "impi"])
def test_a_plain_script_may_use_each_backend(
    torch_name: str, tmp_path: Path, with_gloo: list[dict[str, Any]]
) -> None:
    """All types and sizes, async work, groups at once, objects, DDP, a second life: as with gloo, to the bit."""
    said = run(torch_name, tmp_path / torch_name)

    assert said[0] == said[1]
    assert said[0]["mean"] == 0.5
    assert said[0]["async"] == [2000.0] * 20
    assert said[0]["objects"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x"}]
    assert said[0]["again"] == 2.0
    dense, kind = said[0]["refused"]
    assert "must be dense and contiguous" in dense
    assert "cannot reduce" in kind
    assert said[0]["gradient"] == with_gloo[0]["gradient"]
    assert torch.tensor(said[0]["gradient"]).abs().min() > 0
