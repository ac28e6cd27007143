"""LoRA on the experts of a layer, as PEFT has it: on the parameter that holds a matrix of each of them.

transformers has the gates and ups of all experts in one parameter of three dimensions, and the downs in another; PEFT's
`target_parameters` name these. Every expert has an A and a B of its own, which the adapter's file holds side by side:
A (experts x rank, in), expert after expert; B (out, rank x experts), the experts' columns taking turns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from qlora_trainer.modeling.adapter_parameters import PEFT_PREFIX
from qlora_trainer.modeling.families import EXPERTS
from qlora_trainer.modeling.lora_linear import LoraLinear

A, B = "lora_A.weight", "lora_B.weight"
"""Names of a layer's matrices, after its path: PEFT's."""
JOINED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
"""Layers of an expert -> the parameter of transformers that holds them, where it is called otherwise."""

Matrices = TypeVar("Matrices")


@dataclass
class ExpertMatrices:
    """A parameter's matrices, as the graph has them."""

    experts: list[list[LoraLinear]] = field(default_factory=list)
    """Of each expert the linear layers that make the outputs of its matrix, in order: a gate and an up, or one."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out, in)."""
        first = self.experts[0]
        return len(self.experts), sum(layer.shape[0] for layer in first), first[0].shape[1]

    def attach(self, number: int, a: nn.Parameter, b: nn.Parameter, scale: float) -> None:
        """Give an expert its adapter: a is (rank, in), b is (out, rank), both fp32 and with a gradient to add to."""
        assert b.grad is not None
        start = 0
        for layer in self.experts[number]:
            rows = slice(start, start + layer.shape[0])
            part = nn.Parameter(b.data[rows])
            part.grad = b.grad[rows]
            layer.attach(a, part, scale, None)
            start = rows.stop


def parameter_and_number(path: str) -> tuple[str, int] | None:
    """The parameter of transformers that an expert's linear layer is in, and the expert; None for other layers.

    `model.layers.0.mlp.experts.3.up_proj` is in `model.layers.0.mlp.experts.gate_up_proj`, of expert 3.
    """
    module, _, leaf = path.rpartition(".")
    module, _, number = module.rpartition(".")
    if module.rpartition(".")[2] != EXPERTS:
        return None
    return f"{module}.{JOINED.get(leaf, leaf)}", int(number)


def targeted(
    experts: Mapping[str, Matrices], targets: Sequence[str]
) -> tuple[dict[str, Matrices], list[str]]:
    """The experts' parameters that `targets` name, and the targets that name none.

    A target is the end of a parameter's path, `experts` included: `mlp.experts.down_proj`, `experts.down_proj`.
    """
    named = {
        target: {name for name in experts if f".{name}".endswith(f".{target}")}
        for target in targets
        if EXPERTS in target.split(".")
    }
    others = [target for target in targets if not named.get(target)]
    return {n: m for n, m in experts.items() if any(n in names for names in named.values())}, others


def parameter_shapes(experts: Mapping[str, tuple[int, int, int]], rank: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of A and B of each expert, by the experts' parameters and their shapes (experts, out, in)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (count, out, in_) in experts.items():
        for number in range(count):
            shapes[of_expert(name, number, A)] = (rank, in_)
            shapes[of_expert(name, number, B)] = (out, rank)
    return shapes


def of_expert(name: str, number: int, which: str) -> str:
    """The name in checkpoints of an expert's A or B."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.{number}.{leaf}.{which}"


@dataclass
class JoinedExperts:
    """The PublishedForm of parameters some of which are experts'."""

    named: Mapping[str, Tensor]
    """All parameters."""
    counts: Mapping[str, int]
    """Experts' parameter of transformers -> experts."""

    def tensors(self) -> dict[str, Tensor]:
        """By PEFT's names."""
        found = {
            f"{PEFT_PREFIX}{name}": tensor.detach()
            for name, tensor in self.named.items()
            if parameter_and_number(name.removesuffix(f".{A}").removesuffix(f".{B}")) is None
        }
        for name, count in self.counts.items():
            a, b = (
                [self.named[of_expert(name, n, which)].detach() for n in range(count)] for which in (A, B)
            )
            found[self._published(name, A)] = torch.cat(a)
            found[self._published(name, B)] = torch.stack(b, dim=-1).flatten(1)
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the parameters to published ones."""
        with torch.no_grad():
            for name, count in self.counts.items():
                a, b = (tensors[self._published(name, which)] for which in (A, B))
                for number in range(count):
                    own_a, own_b = (self.named[of_expert(name, number, which)] for which in (A, B))
                    own_a.copy_(a.view(count, *own_a.shape)[number])
                    own_b.copy_(b.view(*own_b.shape, count)[..., number])
            for name, tensor in self.named.items():
                if f"{PEFT_PREFIX}{name}" in tensors:
                    tensor.copy_(tensors[f"{PEFT_PREFIX}{name}"])

    def make(self) -> None:
        """Nothing: the layers compute with the parameters themselves."""

    def _published(self, name: str, which: str) -> str:
        """PEFT wraps a module once for each of its parameters, in their order; the last wrapper is the outermost."""
        module = name.rpartition(".")[0]
        siblings = [other for other in self.counts if other.rpartition(".")[0] == module]
        inside = len(siblings) - 1 - siblings.index(name)
        return f"{PEFT_PREFIX}{module}.{'base_layer.' * inside}{which}"
