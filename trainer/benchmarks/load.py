"""The load of a model: quantized anew, quantized into the workspace, found there, and by bitsandbytes.

    python trainer/benchmarks/load.py WORK_FOLDER [--shapes Llama-3.2-1B] [--rounds 5] [--threads 2] [--dropped]

Each way runs once in each round, in turn, in a process of its own that has imported everything before the clock
starts; the table has medians. Weights are random numbers in bf16 in the shapes of published models. A line of JSON for
each run, and at the end a table:

    seconds     elapsed
    cpu         processor seconds of all threads
    read        bytes from the disk (0 where the page cache has them)
    anonymous   peak of anonymous memory above that of the imports, over the bytes of the finished model
    first       processor seconds of the first forward pass, which touches what is mapped

`plain` is what a rank does without a workspace, `cold` what the first start does, `warm` what later starts do, with
all digests compared, `bitsandbytes` what from_pretrained does. `--dropped` asks the kernel to forget the files' pages
before each run. Results worth keeping are in LOG.md.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory import SHAPES

LLAMA_3B = {
    "model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": True, "hidden_size": 3072,
    "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
    "head_dim": 128,
}  # fmt: skip
ALL_SHAPES: dict[str, dict[str, Any]] = {**SHAPES, "Llama-3.2-3B": LLAMA_3B}
WAYS = ("plain", "cold", "warm", "bitsandbytes")
TOKENS = 16
"""Of the first forward pass."""
SHARD_BYTES = 1 << 30


def write_model(folder: Path, shape: str) -> None:
    """A model of random weights, a shard at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    config = AutoConfig.for_model(
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=2, **ALL_SHAPES[shape]
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, Any] = {}
    places: dict[str, str] = {}

    def write() -> None:
        name = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, parameter in parameters.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        shard[name] = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            write()
    if shard:
        write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.save_pretrained(folder)


def by_bitsandbytes(model: Path) -> Callable[[], Any]:
    """As its users load a model."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return lambda: AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, quantization_config=quantization
    )


def ours(way: str, model: Path, work: Path, threads: int) -> Callable[[], Any]:
    """As a rank does it, but for the exchange with others."""
    import torch

    from qlora_contract.run_config import Quantization
    from qlora_trainer.modeling.image_cache import ImageCache
    from qlora_trainer.modeling.loading import load_model
    from qlora_trainer.modeling.weight_files import WeightsHash
    from qlora_trainer.quantization.schemes import scheme_of

    settings = Quantization()
    cache = ImageCache(work / "work", ("bench", 0, 0), model, settings, torch.bfloat16)

    def plain() -> Any:
        taken = WeightsHash(threads)
        loaded = load_model(model, scheme_of(settings), torch.bfloat16, weights_hash=taken)
        taken.hexdigest()
        return loaded

    def mapped() -> Any:
        key = cache.known()
        image = cache.read(key, threads) if key else None
        assert (image is not None) == (way == "warm"), f"{way}: the image is {'' if image else 'not '}there"
        if image is None:
            size = sum(file.stat().st_size for file in model.iterdir()) // 2
            assert cache.can_keep(size, size)
            key = cache.write(threads)
            assert key is not None
            image = cache.read(key, threads, check=False)
            assert image is not None
        return image.model(torch.bfloat16)

    return plain if way == "plain" else mapped


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    return 0


def read_bytes() -> int:
    """Bytes that this process has had read from disks."""
    return int(
        dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"]
    )


def one(way: str, model: Path, work: Path, threads: int) -> dict[str, Any]:
    """Load a model in this process, and run it once."""
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401 - loaded before the clock starts

    torch.set_num_threads(threads)
    load = by_bitsandbytes(model) if way == "bitsandbytes" else ours(way, model, work, threads)
    gc.collect()
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous())

    before, read = anonymous(), read_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    elapsed, cpu = time.perf_counter(), time.process_time()
    loaded = load()
    elapsed, cpu = time.perf_counter() - elapsed, time.process_time() - cpu
    done.set()
    watcher.join()
    peak = max(peak, anonymous())
    first = time.process_time()
    run_once(loaded)
    first = time.process_time() - first
    return {
        "way": way, "seconds": elapsed, "cpu": cpu, "first": first, "read": read_bytes() - read,
        "anonymous": peak - before, "finished": finished(loaded),
    }  # fmt: skip


def run_once(loaded: Any) -> None:
    """One forward pass of a few tokens, with the head."""
    import numpy as np
    import torch

    from qlora_trainer.data.collate import collate
    from qlora_trainer.data.dataset import Samples

    with torch.no_grad():
        if hasattr(loaded, "hidden_states"):
            ids = np.arange(TOKENS, dtype=np.int32)
            samples = Samples(ids, np.ones(TOKENS, dtype=np.uint8), np.array([0, TOKENS]))
            loaded.logits(loaded.hidden_states(collate(samples, [0])))
        else:
            loaded(input_ids=torch.arange(TOKENS)[None])


def finished(loaded: Any) -> int:
    """Bytes of our model's weights, which is as small as a 4-bit model gets; 0 for another's."""
    if not hasattr(loaded, "linears"):
        return 0
    own = {tensor.data_ptr(): tensor.nbytes for tensor in [loaded.head, *loaded.graph.parameters()]}
    return sum(own.values()) + sum(layer.weight.nbytes for layer in loaded.linears.values())


def drop(folder: Path) -> None:
    """Ask the kernel to forget the pages of the files below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(shape: str, options: argparse.Namespace) -> None:
    """All ways in turn, round after round; prints each, then the medians."""
    work: Path = options.work.resolve()
    model = work / f"load-{shape}"
    if not (model / "config.json").is_file():
        shutil.rmtree(model, ignore_errors=True)
        write_model(model, shape)
        time.sleep(6)  # an image of files that are younger is not remembered
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways}
    for _ in range(options.rounds):
        for way in options.ways:
            if way == "cold":
                shutil.rmtree(work / "work" / "cache", ignore_errors=True)
            if options.dropped:
                drop(work)
            command = [sys.executable, __file__, str(model), "--one", way, "--threads", str(options.threads)]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode:
                sys.exit(f"{way}: {ended.stderr[-2000:]}")
            runs[way].append(json.loads(ended.stdout.splitlines()[-1]))
            print(json.dumps({"shape": shape, **runs[way][-1]}), flush=True)
    size = max((run["finished"] for each in runs.values() for run in each), default=0) or 1
    print(f"\n{shape}, {options.threads} threads, {size / 2**20:,.0f} MiB when finished")
    for way, each in runs.items():
        middle = {name: statistics.median(run[name] for run in each) for name in each[0] if name != "way"}
        print(
            f"{way:>14}  {middle['seconds']:6.2f} s  cpu {middle['cpu']:6.2f}  first {middle['first']:5.2f}  "
            f"read {middle['read'] / 2**20:8,.0f} MiB  anonymous {middle['anonymous'] / size:5.2f} x"
        )
    shutil.rmtree(work / "work", ignore_errors=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--shapes", nargs="+", choices=ALL_SHAPES, default=["Llama-3.2-1B", "Llama-3.2-3B"], metavar="SHAPE"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dropped", action="store_true")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.one:
        print(json.dumps(one(options.one, options.work, options.work.parent, options.threads)))
        return
    for shape in options.shapes:
        compare(shape, options)


if __name__ == "__main__":
    main()
