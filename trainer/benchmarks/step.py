"""One training step, forward and backward, of a model's shape: ours, peft with bitsandbytes, and peft on plain weights.

    taskset -c 1 python trainer/benchmarks/step.py WORK_FOLDER [--shapes Llama-3.2-1B] [--layers 4] [--tokens 1024 4096]
        [--dtypes bf16 fp32] [--rounds 5] [--threads 1]

The first layers of published models, with their embedding and head, in random weights; one sample of random tokens,
all supervised; LoRA of rank 16 on all linear layers. Everything that is compared runs once in each round, in turn. The
table has medians of tokens per second and of the products' FLOPs in a second: those of the frozen weights and the head,
forward and with respect to their inputs, and of attention's causal half.

With one thread it is processor time, so that what other programs take meanwhile does not count; with more, elapsed
time. Results worth keeping are in LOG.md.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from load import ALL_SHAPES, write_model

from qlora_contract.run_config import Quantization
from qlora_trainer.data.collate import collate
from qlora_trainer.data.dataset import Samples
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.lora import attach_adapters
from qlora_trainer.modeling.loss import summed_cross_entropy
from qlora_trainer.quantization.schemes import scheme_of

RANK, ALPHA = 16, 32.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONTENDERS = ("ours", "ours, unquantized", "peft + bitsandbytes", "peft, unquantized")
Step = Callable[[], float]
"""Runs forward and backward; returns the mean loss."""


def of_layers(work: Path, shape: str, layers: int) -> Path:
    """The folder of a model with so many layers of a shape, written if it is not there."""
    name = f"{shape}, {layers} layers"
    ALL_SHAPES[name] = {**ALL_SHAPES[shape], "num_hidden_layers": layers}
    folder = work / f"step-{shape}-{layers}"
    if not (folder / "config.json").is_file():
        write_model(folder, name)
    return folder


def ours(folder: Path, dtype: torch.dtype, ids: np.ndarray[Any, Any], scheme: str) -> Step:
    """Our step, as the loop runs it for one micro-batch."""
    quantization = Quantization.model_validate({"scheme": scheme})
    model: BaseModel = load_model(folder, scheme_of(quantization), dtype)
    adapter = attach_adapters(model.linears, rank=RANK, alpha=ALPHA, dropout=None, seed=0)
    count = len(ids)
    batch = collate(Samples(ids.astype(np.int32), np.ones(count, np.uint8), np.array([0, count])), [0])

    def step() -> float:
        adapter.flat.grad = None
        rows = model.hidden_states(batch)[batch.logit_positions]
        loss = summed_cross_entropy(rows, model.head, batch.targets, model.softcap) / len(batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss)

    return step


def peft(folder: Path, dtype: torch.dtype, ids: np.ndarray[Any, Any], *, quantized: bool) -> Step:
    """As peft's users build it, without what a trainer adds."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=settings if quantized else None, attn_implementation="sdpa"
    )
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    # In training mode: in evaluation mode bitsandbytes repacks weights on some processors, for good.
    model = get_peft_model(base, lora).train()
    row = torch.from_numpy(ids.astype(np.int64))[None]

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=row, labels=row, use_cache=False).loss
        loss.backward()
        return float(loss)

    return step


def contenders(
    names: list[str], folder: Path, dtype: torch.dtype, ids: np.ndarray[Any, Any]
) -> dict[str, Step]:
    """What is compared, by name."""
    makers: dict[str, Callable[[], Step]] = {
        "ours": lambda: ours(folder, dtype, ids, "nf4"),
        "ours, unquantized": lambda: ours(folder, dtype, ids, "none"),
        "peft + bitsandbytes": lambda: peft(folder, dtype, ids, quantized=True),
        "peft, unquantized": lambda: peft(folder, dtype, ids, quantized=False),
    }
    return {name: makers[name]() for name in names}


def flop(config: dict[str, Any], tokens: int) -> float:
    """Of a step: 2 each forward and 2 for the gradient of the inputs, for each weight and token; attention's beside."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_size = config.get("head_dim") or hidden // heads
    of_layer = hidden * head_size * (2 * heads + 2 * key_heads) + 3 * hidden * config["intermediate_size"]
    products = 4 * tokens * (layers * of_layer + config["vocab_size"] * hidden)
    # Two products forward and five in the backward pass, of half the pairs of tokens.
    attention = layers * 7 * heads * head_size * tokens * tokens
    return float(products + attention)


def medians(
    steps: dict[str, Step], rounds: int, clock: Callable[[], float]
) -> dict[str, tuple[float, float]]:
    """Seconds of a step, and its loss, by name."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = clock()
            losses[name] = step()
            if number:  # the first warms up
                times[name].append(clock() - start)
    return {name: (statistics.median(taken), losses[name]) for name, taken in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--shapes", nargs="+", choices=ALL_SHAPES, default=["Llama-3.2-1B", "Llama-3.2-3B"], metavar="SHAPE"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {options.threads} threads of {os.cpu_count()} CPUs")
    for shape, name, tokens in itertools.product(options.shapes, options.dtypes, options.tokens):
        folder = of_layers(options.work.resolve(), shape, options.layers)
        config = json.loads((folder / "config.json").read_text())
        ids = np.random.default_rng(0).integers(3, config["vocab_size"], tokens)
        steps = contenders(options.contenders, folder, DTYPES[name], ids)
        for contender, (seconds, loss) in medians(steps, options.rounds, clock).items():
            rate = flop(config, tokens) / seconds / 1e9
            print(
                f"{shape}, {options.layers} layers, {name}, {tokens} tokens  {contender:>20}  "
                f"{tokens / seconds:8.1f} tokens/s  {rate:7.0f} GFLOP/s  loss {loss:.3f}",
                flush=True,
            )
        del steps


if __name__ == "__main__":
    main()
