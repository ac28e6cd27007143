"""transformers' graph of a language model, without memory, its experts taken apart into linear layers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_trainer.modeling import attention
from qlora_trainer.modeling.families import EXPERTS, Family, Mixture
from qlora_trainer.modeling.layers import ClampedGatedMlp


class Expert(nn.Module):
    """The linear layers of one expert; layers.fuse_layers makes a gated MLP of them."""

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, dtype=dtype)


class Experts(nn.ModuleList):
    """A mixture of experts: every token goes through those that its router has chosen.

    transformers has the experts' weights in one tensor of three dimensions, checkpoints have a matrix of each, and so
    have we: each is quantized by itself, and only those are multiplied with that a token has chosen.
    """

    def forward(self, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The sum of the chosen experts' outputs, each times its weight.

        Args:
            states: (tokens, hidden size).
            chosen: (tokens, experts per token) int64.
            weights: as chosen, in the compute dtype.

        Returns:
            (tokens, hidden size).
        """
        out = torch.zeros_like(states)
        for number in sorted(set(chosen.flatten().tolist())):
            rows, place = torch.where(chosen == number)
            out = out.index_add(0, rows, self[number](states[rows]) * weights[rows, place, None])
        return out


def build_graph(config: Any, family: Family, dtype: torch.dtype) -> nn.Module:
    """transformers' causal language model with our attention, on the meta device.

    Args:
        config: of the language model.
        family: says whether it has experts.
        dtype: of its parameters.
    """
    attention.register()
    with torch.device("meta"):
        graph: nn.Module = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention.NAME, dtype=dtype
        )
        if family.experts is not None:
            paths = [path for path, _ in graph.named_modules() if path.endswith(f".{EXPERTS}")]
            for path in paths:
                experts = [_expert(config, family.experts, dtype) for _ in range(config.num_experts)]
                graph.set_submodule(path, Experts(experts))
    return graph


def _expert(config: Any, mixture: Mixture, dtype: torch.dtype) -> nn.Module:
    hidden, intermediate = config.hidden_size, getattr(config, mixture.width)
    if not mixture.clamped:
        return Expert(hidden, intermediate, dtype)
    return ClampedGatedMlp(
        nn.Linear(hidden, 2 * intermediate, dtype=dtype),
        nn.Linear(intermediate, hidden, dtype=dtype),
        config.swiglu_alpha,
        config.swiglu_limit,
    )
