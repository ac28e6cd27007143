"""AdamW over the flat adapter, with LoRA+ where a job asks for it."""

from collections.abc import Callable
from typing import Any

import torch

from qlora_trainer.modeling.adapter_parameters import AdapterParameters
from qlora_trainer.modeling.expert_adapters import B


class AdapterAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) whose steps of LoRA's B matrices are `ratio` times as long.

    That is the learning rate of LoRA+ (Hayou et al. 2024): everything that AdamW adds to a weight, decay included, is
    proportional to the rate. One flat tensor and one pair of moments remain.
    """

    def __init__(
        self, parameters: AdapterParameters, *, lr: float, weight_decay: float, ratio: float
    ) -> None:
        super().__init__([parameters.flat], lr=lr, weight_decay=weight_decay, fused=True)
        self._ratio = ratio
        self._b = [p.data for name, p in parameters.named.items() if name.endswith(B)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, in place."""
        before = [b.clone() for b in self._b] if self._ratio != 1.0 else []
        loss = super().step(closure)
        for b, old in zip(self._b, before, strict=bool(before)):
            b.sub_(old).mul_(self._ratio).add_(old)
        return loss
