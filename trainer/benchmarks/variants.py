"""What the variants of a training step cost: ours and peft's, in turn, in the processor's seconds.

    python trainer/benchmarks/variants.py [--only dora] [--rounds 3]

A step is forward and backward of a few layers of a published shape in random weights, with one thread. Seconds are
those of the process, so that what other programs take meanwhile does not count; each is the least of its rounds, and
the variants of a case take turns. Results worth keeping are in LOG.md.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AutoConfig, AutoModelForCausalLM, logging

from qlora_contract.run_config import Adapter
from qlora_trainer.data.collate import collate
from qlora_trainer.data.dataset import Samples
from qlora_trainer.modeling.adapter_methods import method_for
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.quantization.schemes import Nf4, Scheme, Unquantized
from qlora_trainer.training.objective import SupervisedFineTuning

Step = Callable[[], object]

LLAMA = {"model_type": "llama", "vocab_size": 4096, "tie_word_embeddings": True}
SMOLLM2 = {**LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9,
           "num_key_value_heads": 3, "vocab_size": 49152}  # fmt: skip
"""6 of the 30 layers of SmolLM2-135M, and its whole head."""
LLAMA_1B = {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}  # fmt: skip
"""A layer of Llama-3.2-1B."""
QWEN3_5 = {
    "model_type": "qwen3_5_text", "vocab_size": 4096, "tie_word_embeddings": True, "hidden_size": 1024,
    "intermediate_size": 3584, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}  # fmt: skip
"""4 layers of a Qwen3.5 of 0.8 billion weights: three with a state, one with keys and values."""


def samples(vocabulary: int, lengths: list[int]) -> Samples:
    """Random ids; the second half of each sample is learned."""
    random = np.random.default_rng(0)
    offsets = np.cumsum([0, *lengths])
    mask = np.concatenate([np.arange(length) >= length // 2 for length in lengths]).astype(np.uint8)
    return Samples(random.integers(0, vocabulary, offsets[-1]).astype(np.int32), mask, offsets)


def ours(folder: Path, data: Samples, scheme: Scheme, dtype: torch.dtype, **adapter: Any) -> Step:
    """All samples packed in one row."""
    model = load_model(folder, scheme, dtype)
    model.graph.train()
    method_for(Adapter.model_validate(adapter)).attach(model, seed=0, dropout=None)
    objective, batch = SupervisedFineTuning(), collate(data, list(range(len(data))))

    def step() -> None:
        objective.loss(model, batch).total.backward()

    return step


def theirs(folder: Path, data: Samples, dtype: torch.dtype, **lora: Any) -> Step:
    """peft's LoRA, each sample alone, so that nothing is padded."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", **lora)
    model = get_peft_model(base, config).train()

    def step() -> None:
        for number in range(len(data)):
            ids, mask = (torch.from_numpy(each.astype(np.int64)) for each in data.sample(number))
            logits = model(input_ids=ids[None]).logits[0, :-1][mask[1:].bool()]
            F.cross_entropy(logits.float(), ids[1:][mask[1:].bool()], reduction="sum").backward()

    return step


def cases(folder: Path) -> dict[str, Callable[[], dict[str, Step]]]:
    """Case -> its variants."""

    def written(name: str, shape: dict[str, Any]) -> tuple[Path, int]:
        config = AutoConfig.for_model(**shape, max_position_embeddings=4096)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
        return folder / name, shape["vocab_size"]

    def methods() -> dict[str, Step]:
        path, vocabulary = written("smollm2", SMOLLM2)
        virtual = {"numVirtualTokens": 32}

        def of(length: int, **adapter: Any) -> Step:
            return ours(path, samples(vocabulary, [length] * 4), Nf4(double=True), torch.bfloat16, **adapter)

        return {
            "lora": of(128),
            "prompt-tuning, 32 tokens": of(96, method="prompt-tuning", **virtual),
            "prefix-tuning, 32 tokens": of(96, method="prefix-tuning", **virtual),
        }

    def dora() -> dict[str, Step]:
        path, vocabulary = written("llama", LLAMA_1B)
        data, dtype = samples(vocabulary, [256]), torch.bfloat16
        return {
            "ours, LoRA, unquantized": ours(path, data, Unquantized(), dtype),
            "ours, LoRA, nf4": ours(path, data, Nf4(double=True), dtype),
            "peft, LoRA": theirs(path, data, dtype),
            "peft, DoRA": theirs(path, data, dtype, use_dora=True),
        }

    def delta() -> dict[str, Step]:
        path, vocabulary = written("qwen3_5", QWEN3_5)
        data, dtype = samples(vocabulary, [128] * 4), torch.bfloat16
        return {
            "ours, unquantized": ours(path, data, Unquantized(), dtype),
            "ours, nf4": ours(path, data, Nf4(double=True), dtype),
            "peft": theirs(path, data, dtype),
        }

    return {"methods": methods, "dora": dora, "delta": delta}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases that contain this")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, load {os.getloadavg()[0]:.0f}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for case, make in cases(Path(folder)).items():
            if arguments.only not in case:
                continue
            steps = make()
            seconds: dict[str, list[float]] = {name: [] for name in steps}
            for number in range(arguments.rounds + 1):
                for name, step in steps.items():
                    start = time.process_time()
                    step()
                    if number > 0:  # the first warms up
                        seconds[name].append(time.process_time() - start)
            for name, found in seconds.items():
                print(
                    f"{case:<8} {name:<28} {min(found):.3f} s  {[round(each, 3) for each in found]}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
