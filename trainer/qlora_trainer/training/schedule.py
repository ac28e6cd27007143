"""The learning rate of each optimizer step."""

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def learning_rate(step: int, total_steps: int, peak: float, schedule: Schedule, warmup_ratio: float) -> float:
    """Learning rate of optimizer step `step`, where 0 is the first of `total_steps`.

    It rises linearly from 0 over ceil(warmup_ratio * total_steps) steps, then falls to 0 linearly or along half a
    cosine, or stays. The same values as transformers' get_{linear,cosine,constant}_schedule_with_warmup.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    match schedule:
        case "linear":
            return peak * (1.0 - progress)
        case "cosine":
            return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "constant":
            return peak
