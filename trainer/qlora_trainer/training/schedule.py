"""The learning rate of each optimizer step."""

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def learning_rate(step: int, total_steps: int, peak: float, schedule: Schedule, warmup_ratio: float) -> float:
    """Learning rate of optimizer step `step`, where 0 is the first of `total_steps`.

    It rises linearly over ceil(warmup_ratio * total_steps) steps, the warm-up, to its peak right after them. Then it
    falls to 0 linearly or along half a cosine, or stays. After the warm-up it has the values of transformers'
    get_{linear,cosine,constant}_schedule_with_warmup. Those begin the warm-up with a rate of 0, so that a job of one
    step would learn nothing; here no step has it.
    """
    warmup = warmup_steps(total_steps, warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    match schedule:
        case "linear":
            return peak * (1.0 - progress)
        case "cosine":
            return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "constant":
            return peak


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Steps of the warm-up."""
    return math.ceil(warmup_ratio * total_steps)
