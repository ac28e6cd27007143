"""TRL's SFTTrainer with peft and bitsandbytes on a CPU, tuned as well as it can be: the yardstick of speed.

LoRA of rank 16 on every linear layer over NF4 with double quantisation, packed
chats of which the assistant's answer is learnt, 1,024 tokens a step.

    python trainer/benchmarks/peer_trl.py MODEL DATA [--dtype fp32|bf16] [--ranks 2] [--steps 20] [--plain]

DATA is a folder with train.jsonl and eval.jsonl, chats that end with the answer.
One JSON line comes out. Rates leave the first step out, as warm-up.

What is done for speed, beside settings (`--plain`: settings alone):
- The four bins of a step stay four rows of 256 tokens. TRL lays them out as one row of 1,024, and without
  FlashAttention the mask that keeps samples apart makes attention cost the row's length squared.
- The output head runs on supervised positions only, which TRL does on GPUs and not on CPUs.
- malloc keeps freed memory instead of giving it back and faulting it in again with every large temporary.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BIN_TOKENS = 256
BINS = 4
"""A step is BINS * BIN_TOKENS tokens, over all ranks."""
STARTED = "PEER_TRL_STARTED"
"""Environment name: seconds between boot and this program's start, before it replaced itself."""
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}


@dataclass(frozen=True)
class Report:
    """What a run did; counts and seconds are of all steps but the first, over all ranks."""

    dtype: str
    ranks: int
    threads: int
    """Of each rank."""
    plain: bool
    steps: int
    tokens: int
    """Without padding."""
    supervised_tokens: int
    seconds: float
    startup_seconds: float
    """From the program's start to the first step's."""
    tokens_per_second: float
    supervised_tokens_per_second: float
    first_step_seconds: float
    base_eval_loss: float | None
    eval_loss: float | None


def main() -> int:
    """The command line."""
    arguments = _parse(sys.argv[1:])
    prepare_environment(arguments)
    report = train(arguments)
    if report is not None:
        print(json.dumps(asdict(report)))
    return 0


def _parse(command_line: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("data", type=Path, help="folder with train.jsonl and eval.jsonl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--ranks", type=int, choices=[1, 2, 4], default=1, help="processes, joined by gloo")
    parser.add_argument("--threads", type=int, help="of each rank; default: its share of the CPUs")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="settings alone: no change to TRL's own code")
    parser.add_argument("--evaluate", action="store_true", help="evaluation loss before and after")
    parser.add_argument(
        "--show", action="store_true", help="print the first batch, what is learnt in brackets"
    )
    return parser.parse_args(command_line)


def prepare_environment(arguments: argparse.Namespace) -> None:
    """Start this program anew with the threads, allocator and ranks that must be set before torch loads."""
    if STARTED in os.environ:
        return
    threads = arguments.threads or max(1, len(os.sched_getaffinity(0)) // arguments.ranks)
    environ = os.environ | {
        STARTED: str(_process_start()),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    if not arguments.plain:
        environ |= MALLOC
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
    command = [sys.executable, *(launcher if arguments.ranks > 1 else []), *sys.argv]
    os.execve(sys.executable, command, environ)  # noqa: S606 - no shell is wanted


def _process_start() -> float:
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def train(arguments: argparse.Namespace) -> Report | None:
    """Train; the report on rank 0, None on the others."""
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(arguments, scratch)
    if arguments.show and trainer.is_world_process_zero():
        show(trainer)
    base_eval_loss = evaluate(trainer) if arguments.evaluate else None
    trainer.train()
    eval_loss = evaluate(trainer) if arguments.evaluate else None
    first, last = trainer.ends[0], trainer.ends[-1]
    counts = torch.tensor(trainer.counts[1:]).sum(dim=0)
    tokens, supervised = trainer.accelerator.reduce(counts).tolist()
    if not trainer.is_world_process_zero():
        return None
    return Report(
        arguments.dtype, arguments.ranks, torch.get_num_threads(), arguments.plain,
        steps=len(trainer.ends) - 1,
        tokens=tokens,
        supervised_tokens=supervised,
        seconds=last - first,
        startup_seconds=trainer.begin - float(os.environ[STARTED]),
        tokens_per_second=tokens / (last - first),
        supervised_tokens_per_second=supervised / (last - first),
        first_step_seconds=first - trainer.begin,
        base_eval_loss=base_eval_loss,
        eval_loss=eval_loss,
    )  # fmt: skip


def read_chats(path: Path) -> Any:
    """A dataset of prompts and completions: the chats, cut before the answer.

    SmolLM2's chat template does not mark what the assistant says, so TRL can
    tell it apart in this form only. Raises ValueError for a chat whose learnt
    turn is not its last.
    """
    from datasets import Dataset  # type: ignore[import-untyped]

    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        messages = json.loads(line)["messages"]
        if [message["role"] == "assistant" for message in messages] != [False] * (len(messages) - 1) + [True]:
            raise ValueError(f"{path}: line {number}: a chat must have one assistant's turn, its last")
        rows.append({"prompt": messages[:-1], "completion": messages[-1:]})
    return Dataset.from_list(rows)


def make_trainer(arguments: argparse.Namespace, scratch: str) -> Any:
    """The trainer, ready to train; `scratch` is a folder it insists on."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

    trl: Any = importlib.import_module("trl")

    class Counting(trl.SFTTrainer):  # type: ignore[misc]
        """Counts what a step learns from, in the batches that reach the model."""

        begin = 0.0
        counts: list[tuple[int, int]]
        ends: list[float]

        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            self.counts.append(count(inputs))
            return super().training_step(model, inputs, *rest)

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Seconds since boot at the first step's begin and at each step's end."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            trainer.begin = trainer.begin or time.clock_gettime(time.CLOCK_BOOTTIME)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            trainer.ends.append(time.clock_gettime(time.CLOCK_BOOTTIME))

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=dtype,
        attn_implementation="sdpa",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    trainer = Counting(
        model=model,
        args=trl.SFTConfig(
            output_dir=scratch,
            max_steps=arguments.steps + 1,
            max_length=BIN_TOKENS,
            packing=True,
            per_device_train_batch_size=BINS // arguments.ranks,
            per_device_eval_batch_size=BINS // arguments.ranks,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            # No autocast: the model is in its dtype already, and casting it anew at every call is slower.
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            ddp_find_unused_parameters=False if arguments.ranks > 1 else None,
            remove_unused_columns=arguments.plain,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=arguments.seed,
        ),
        train_dataset=read_chats(arguments.data / "train.jsonl"),
        eval_dataset=read_chats(arguments.data / "eval.jsonl") if arguments.evaluate else None,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )
    trainer.counts, trainer.ends = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:  # TRL makes adapters of quantised models bf16, whatever was asked for
            parameter.data = parameter.data.to(dtype)
    if not arguments.plain:
        tune(trainer)
    return trainer


def tune(trainer: Any) -> None:
    """What settings cannot do."""
    utils: Any = importlib.import_module("trl.trainer.utils")
    trainer.data_collator = rows
    # Asked in this module only by the head, about whether to drop unsupervised positions.
    utils._use_triton = lambda _device: True


def rows(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each packed bin as a row; positions start anew with each sample, and so does the padding at the end.

    transformers derives from the positions the mask that keeps samples apart.
    """
    import torch

    ids = torch.zeros(len(examples), BIN_TOKENS, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    positions = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        ids[row, :length] = torch.tensor(example["input_ids"])
        labels[row, :length] = torch.tensor(example["labels"])
        parts = [*example["seq_lengths"], BIN_TOKENS - length]
        positions[row] = torch.cat([torch.arange(part) for part in parts])
    labels[positions == 0] = -100  # the sample before it does not predict a sample's first token
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "tokens": sum(map(_length, examples)),
    }


def _length(example: dict[str, Any]) -> int:
    return len(example["input_ids"])


def count(inputs: dict[str, Any]) -> tuple[int, int]:
    """(tokens without padding, supervised tokens) of a batch; takes our own count of tokens out of it."""
    tokens = inputs.pop("tokens", None) or inputs["input_ids"].numel()
    return tokens, int((inputs["labels"][:, 1:] != -100).sum())


def evaluate(trainer: Any) -> float:
    """Mean loss per supervised token of the evaluation data.

    In training mode, where dropout is 0: bitsandbytes repacks weights in
    evaluation mode on some processors, for good, and trains on without them.
    """
    import torch

    trainer.model.train()
    total, supervised = 0.0, 0
    for batch in trainer.get_eval_dataloader():
        learnt = count(batch)[1]
        with torch.no_grad():
            total += float(trainer.compute_loss(trainer.model, batch)) * learnt
        supervised += learnt
    sums = trainer.accelerator.reduce(torch.tensor([total, float(supervised)]))
    return float(sums[0] / sums[1])


def show(trainer: Any) -> None:
    """Print the first batch on standard error, what is learnt in brackets."""
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        text, inside = [], False
        for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
            if (label != -100) != inside:
                inside = not inside
                text.append("⟦" if inside else "⟧")
            text.append(trainer.processing_class.decode([token]))
        print("".join(text), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
