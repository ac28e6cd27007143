"""The plainest LoRA training there is, on transformers, peft and bitsandbytes: the yardstick of convergence.

Nothing of ours computes here, and nothing is clever: samples are padded, never
packed; every number is fp32; losses are summed over the supervised tokens of a
step and divided by their count. A plan says which samples make up which step,
so that another trainer can be given the same work.

    python trainer/benchmarks/peer_peft.py MODEL ADAPTER PLAN [--scheme nf4]

One JSON line comes out: the loss of each step and the evaluation losses.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Scheme = Literal["nf4", "none"]

ROWS = 8
"""Samples of one padded batch."""


@dataclass(frozen=True)
class Sample:
    """One tokenised sample."""

    ids: list[int]
    mask: list[int]
    """As ids: 1 where the token is to be learnt."""


@dataclass(frozen=True)
class Plan:
    """All that decides what an adapter becomes, but for the model and the adapter's start."""

    train: list[Sample]
    evaluation: list[Sample]
    steps: list[list[int]]
    """Numbers of the training samples of each optimiser step."""
    learning_rate: float
    schedule: Literal["linear", "cosine", "constant"]
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    eval_every: int
    """Evaluate every so many steps; before the first and after the last in any case."""

    def write(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read what `write` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        for split in ("train", "evaluation"):
            fields[split] = [Sample(**sample) for sample in fields[split]]
        return cls(**fields)


@dataclass(frozen=True)
class Outcome:
    """What a training did."""

    losses: list[float]
    """Mean loss per supervised token of each step."""
    eval_losses: dict[int, float]
    """Steps done -> mean loss per supervised token of the evaluation samples."""


def load(model: Path, adapter: Path, scheme: Scheme) -> Any:
    """The model in fp32, its linear layers as bitsandbytes keeps them, with the adapter of a PEFT folder to train.

    Double quantisation subtracts a mean whose last bits depend on the number of
    threads; one thread makes the bytes those that any other run gets.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, quantization_config=quantization if scheme == "nf4" else None
    )
    torch.set_num_threads(threads)
    adapted = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    for name, parameter in adapted.named_parameters():
        assert not parameter.requires_grad or parameter.dtype == torch.float32, name
    # Always: bitsandbytes repacks weights in evaluation mode on some processors, for good, and trains on
    # without them. There is no dropout that the mode could switch off.
    return adapted.train()


def batches(samples: Sequence[Sample]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(ids, attention mask, labels), each (rows, longest) int64 and padded at the right; -100: not learnt."""
    by_length = sorted(samples, key=lambda sample: len(sample.ids))
    for start in range(0, len(by_length), ROWS):
        rows = by_length[start : start + ROWS]
        longest = len(rows[-1].ids)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        attention = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for row, sample in enumerate(rows):
            length = len(sample.ids)
            ids[row, :length] = torch.tensor(sample.ids)
            attention[row, :length] = 1
            learnt = torch.tensor(sample.mask, dtype=torch.bool)
            labels[row, :length][learnt] = ids[row, :length][learnt]
        yield ids, attention, labels


def supervised(samples: Sequence[Sample]) -> int:
    """How many tokens are learnt."""
    return sum(sum(sample.mask) for sample in samples)


def summed_loss(model: Any, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the learnt tokens, each predicted from those before it."""
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    learnt = targets != -100
    return cross_entropy(causal.lm_head(hidden[:, :-1][learnt]), targets[learnt], reduction="sum")


def evaluate(model: Any, samples: Sequence[Sample]) -> float:
    """Mean loss per supervised token."""
    with torch.no_grad():
        total = sum(float(summed_loss(model, *batch)) for batch in batches(samples))
    return total / supervised(samples)


def train(model: Any, plan: Plan) -> Outcome:
    """Train the adapter as planned. Raises FloatingPointError for a loss that is not finite."""
    from transformers import get_scheduler

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=plan.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=plan.weight_decay
    )
    name = "constant_with_warmup" if plan.schedule == "constant" else plan.schedule
    total = len(plan.steps)
    scheduler = get_scheduler(name, optimizer, math.ceil(plan.warmup_ratio * total), total)
    losses: list[float] = []
    eval_losses = {0: evaluate(model, plan.evaluation)}
    for number, members in enumerate(plan.steps, start=1):
        losses.append(_step(model, [plan.train[member] for member in members], optimizer, plan.max_grad_norm))
        scheduler.step()
        if number % plan.eval_every == 0 or number == total:
            eval_losses[number] = evaluate(model, plan.evaluation)
            print(f"step {number}: evaluation loss {eval_losses[number]:.4f}", file=sys.stderr, flush=True)
    return Outcome(losses, eval_losses)


def _step(
    model: Any, samples: Sequence[Sample], optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> float:
    count = supervised(samples)
    optimizer.zero_grad()
    total = 0.0
    for batch in batches(samples):
        loss = summed_loss(model, *batch)
        (loss / count).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss of a step is {total}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    return total / count


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("adapter", type=Path, help="PEFT folder to start from")
    parser.add_argument("plan", type=Path, help="JSON, as Plan.write writes it")
    parser.add_argument("--scheme", choices=["nf4", "none"], default="nf4", help="none: plain LoRA in fp32")
    parser.add_argument("--output", type=Path, help="also save the trained adapter here")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.manual_seed(0)
    model = load(arguments.model, arguments.adapter, arguments.scheme)
    outcome = train(model, Plan.read(arguments.plan))
    if arguments.output:
        model.save_pretrained(arguments.output)
    print(json.dumps(asdict(outcome)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
