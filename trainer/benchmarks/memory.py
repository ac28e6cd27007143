"""The memory that a rank needs by qlora_contract.memory, beside the peak that it has: `qlora run` of real shapes.

Weights are random numbers in the shapes of published models, which take the same memory; data are random words, in
samples that fill a bin. Prints a line of JSON for each case.

    python trainer/benchmarks/memory.py TOKENIZER_FOLDER WORK_FOLDER [CASE ...]
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {**SMOLLM2, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3},
    "SmolLM2-360M": {**SMOLLM2, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
                     "num_attention_heads": 15, "num_key_value_heads": 5},
    "Qwen2.5-0.5B": {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True, "hidden_size": 896,
                     "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                     "num_key_value_heads": 2},
    "Llama-3.2-1B": {"model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": True, "hidden_size": 2048,
                     "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                     "num_key_value_heads": 8, "head_dim": 64},
    "SmolLM2-1.7B": {**SMOLLM2, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
                     "num_attention_heads": 32, "num_key_value_heads": 32},
    "Gemma-3-270M": {"model_type": "gemma3_text", "vocab_size": 262144, "tie_word_embeddings": True,
                     "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
                     "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512},
    "4 layers of Qwen3-0.6B": {
        "model_type": "qwen3", "vocab_size": 49152, "tie_word_embeddings": True, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128},
    "4 layers of Qwen3.5-0.8B": {
        "model_type": "qwen3_5_text", "vocab_size": 49152, "tie_word_embeddings": True, "hidden_size": 1024,
        "intermediate_size": 3584, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128},
    "4 layers of Qwen3-30B-A3B, 16 experts": {
        "model_type": "qwen3_moe", "vocab_size": 49152, "tie_word_embeddings": True, "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 16, "num_experts_per_tok": 8, "norm_topk_prob": True},
}  # fmt: skip
"""As their config.json has them, or parts of them."""


@dataclass(frozen=True)
class Case:
    """A job."""

    shape: str
    length: int = 1024
    """training.maxSequenceLength, and the length of each sample."""
    bins: int = 1
    """Samples of a micro-batch."""
    training: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    scheme: str = "nf4"
    ranks: int = 1


NONE, FULL = {"gradientCheckpointing": "none"}, {"gradientCheckpointing": "full"}
CASES: dict[str, Case] = {
    "135M": Case("SmolLM2-135M", training=NONE),
    "135M-2-ranks": Case("SmolLM2-135M", training=NONE, ranks=2),
    "135M-twice": Case("SmolLM2-135M", bins=2, training=NONE),
    "135M-four-short": Case("SmolLM2-135M", length=256, bins=4, training=NONE),
    "135M-recomputed": Case("SmolLM2-135M", bins=2, training=FULL),
    "135M-dropout": Case("SmolLM2-135M", training=NONE, adapter={"dropout": 0.05}),
    "135M-int8": Case("SmolLM2-135M", training=NONE, scheme="int8"),
    "135M-none": Case("SmolLM2-135M", training=NONE, scheme="none"),
    "135M-fp32": Case("SmolLM2-135M", length=512, training={**NONE, "computeDtype": "fp32"}),
    "135M-prompt": Case(
        "SmolLM2-135M", training=NONE, adapter={"method": "prompt-tuning", "numVirtualTokens": 32}
    ),
    "135M-prefix": Case(
        "SmolLM2-135M", training=NONE, adapter={"method": "prefix-tuning", "numVirtualTokens": 32}
    ),
    "135M-prefix-short": Case(
        "SmolLM2-135M",
        length=256,
        bins=4,
        training=NONE,
        adapter={"method": "prefix-tuning", "numVirtualTokens": 128},
    ),
    "135M-prefix-recomputed": Case(
        "SmolLM2-135M",
        length=256,
        bins=2,
        training=FULL,
        adapter={"method": "prefix-tuning", "numVirtualTokens": 32},
    ),
    "135M-projected": Case(
        "SmolLM2-135M",
        length=256,
        training=NONE,
        adapter={
            "method": "prefix-tuning",
            "numVirtualTokens": 128,
            "prefixProjection": True,
            "encoderHiddenSize": 512,
        },
    ),
    "360M": Case("SmolLM2-360M", length=512, training=NONE),
    "0.5B-recomputed": Case("Qwen2.5-0.5B", length=512, training=FULL),
    "270M": Case("Gemma-3-270M", length=256, training=NONE),
    "270M-int8-recomputed": Case("Gemma-3-270M", length=256, training=FULL, scheme="int8"),
    "0.6B": Case("4 layers of Qwen3-0.6B", length=512, training=NONE, adapter={"dropout": 0.05}),
    "135M-fp4": Case("SmolLM2-135M", length=256, training=FULL, scheme="fp4", adapter={"dropout": 0.05}),
    "0.8B-recurrent-int8": Case(
        "4 layers of Qwen3.5-0.8B", length=256, training=FULL, scheme="int8", adapter={"dropout": 0.05}
    ),
    "0.8B-recurrent": Case("4 layers of Qwen3.5-0.8B", length=256, training=NONE),
    "experts": Case("4 layers of Qwen3-30B-A3B, 16 experts", length=256, training=NONE),
    "1B-recomputed": Case("Llama-3.2-1B", length=256, training=FULL),
    "1.7B-recomputed": Case("SmolLM2-1.7B", length=256, training=FULL),
}


def write_model(folder: Path, shape: str, tokenizer: Path) -> None:
    """A model of random weights, and the tokenizer of another."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**SHAPES[shape], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = AutoConfig.for_model(max_position_embeddings=8192, **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / file, folder)


def write_data(file: Path, samples: int) -> None:
    """Texts longer than any sample, so that each fills one."""
    chosen = random.Random(0)  # noqa: S311 - not a secret
    words = ["".join(chosen.choices("abcdefghij", k=5)) for _ in range(500)]
    lines = (json.dumps({"text": " ".join(chosen.choices(words, k=4000))}) for _ in range(samples))
    file.write_text("\n".join(lines))


def folder_of(case: Case) -> str:
    """Of its model."""
    return case.shape.replace(",", "").replace(" ", "-")


def job(name: str, case: Case) -> dict[str, Any]:
    """The job of a case: three steps, and no evaluation."""
    tokens = case.length * case.bins
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": name},
        "spec": {
            "workspace": "pvc://bench/work",
            "model": {"source": f"pvc://bench/{folder_of(case)}"},
            "dataset": {"source": "pvc://bench/data.jsonl", "evalFraction": 0},
            "quantization": {"scheme": case.scheme},
            "adapter": case.adapter,
            "training": {
                "maxSteps": 3,
                "globalBatchTokens": tokens * case.ranks,
                "microBatchTokens": tokens,
                "maxSequenceLength": case.length,
                **case.training,
            },
            "evaluation": {"requireImprovement": False},
            "topology": {
                "ranksPerPod": case.ranks,
                "cpusPerRank": 1 if case.ranks > 1 else 2,
                "memoryPerRank": "8Gi",
            },
        },
    }


def measure(name: str, case: Case, tokenizer: Path, work: Path) -> dict[str, Any]:
    """Run a case: its peak of anonymous memory, and the estimate that it was run with."""
    if not (work / folder_of(case) / "config.json").is_file():
        write_model(work / folder_of(case), case.shape, tokenizer)
    write_data(work / "data.jsonl", 16)
    (work / "job.json").write_text(json.dumps(job(name, case)))
    shutil.rmtree(work / "work" / "jobs" / name, ignore_errors=True)
    command = [sys.executable, "-m", "qlora_operator.cli", "run", str(work / "job.json")]
    subprocess.run([*command, "--volume", f"bench={work}"], check=True, stdout=subprocess.DEVNULL)
    report = json.loads((work / "work" / "jobs" / name / "training_report.json").read_text())
    largest = max(report["ranks"], key=lambda rank: rank["peak_anonymous_bytes"])
    return {
        "model": case.shape,
        "scheme": case.scheme,
        "dtype": report["compute_dtype"],
        "length": case.length,
        "tokens": report["plan"]["micro_batch_tokens"],
        "checkpointing": report["plan"]["checkpointing"],
        "adapter": case.adapter,
        "ranks": case.ranks,
        "kernel": report["kernel"],
        "imports_bytes": largest["imports_bytes"],
        # Of a base that is mapped, a rank's part counts, as in the estimate.
        "mapped": largest["mapped_model_bytes"] > 0,
        "peak_bytes": largest["peak_anonymous_bytes"] + largest["mapped_model_bytes"] // case.ranks,
        "estimate_bytes": report["plan"]["memory_bytes"],
    }


def main() -> None:
    """Measure the cases that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.cases or CASES:
        print(
            json.dumps(
                measure(
                    f"of-{name.lower().replace('.', '-')}",
                    CASES[name],
                    options.tokenizer,
                    options.work.resolve(),
                )
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
