"""LoRA (Hu et al. 2021) as an adapter method: which layers get adapters, how these start, what PEFT calls them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from qlora_contract.run_config import Adapter
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling import expert_adapters
from qlora_trainer.modeling.adapter_parameters import AdapterParameters, Encode, flat_parameters
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.expert_adapters import (
    A,
    B,
    ExpertMatrices,
    JoinedExperts,
    of_expert,
    parameter_and_number,
    targeted,
)
from qlora_trainer.modeling.families import LANGUAGE_MODEL
from qlora_trainer.modeling.lora_linear import Dropout, LoraLinear, seeded_generator

Layer = TypeVar("Layer")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Lora:
    """The AdapterMethod `lora`: W x + s B A x on the layers that targetModules names.

    s is alpha / rank, or alpha / sqrt(rank) with rslora (Kalajdzievski 2023), by each layer's own alpha and rank.
    """

    adapter: Adapter
    """The job's settings."""

    def attach(
        self,
        model: BaseModel,
        *,
        seed: int,
        dropout: Dropout | None,
        encode: Encode | None = None,  # noqa: ARG002 - AdapterMethod's
    ) -> AdapterParameters:
        """Give the targeted layers their adapters."""
        adapter = self.adapter
        experts, others = self._targets(model.experts)
        layers = target_layers(model.linears, others)
        alphas = by_pattern(layers, adapter.alpha_pattern, adapter.alpha, "adapter.alphaPattern")
        ranks = self._ranks(layers)
        scales = {
            name: alphas[name] / (math.sqrt(rank) if adapter.rslora else rank) for name, rank in ranks.items()
        }
        scale = adapter.alpha / (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)
        of_experts = OfExperts(experts, adapter.rank, scale)
        return attach_ranked(layers, ranks, scales, of_experts, dropout=dropout, seed=seed)

    def parameter_shapes(
        self,
        linears: Mapping[str, tuple[int, ...]],
        config: Any,  # noqa: ARG002 - AdapterMethod's
    ) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what is trained."""
        experts, others = self._targets({n: (s[0], s[1], s[2]) for n, s in linears.items() if len(s) == 3})
        layers = target_layers({n: (s[0], s[1]) for n, s in linears.items() if len(s) == 2}, others)
        by_pattern(layers, self.adapter.alpha_pattern, self.adapter.alpha, "adapter.alphaPattern")
        return lora_shapes(layers, self._ranks(layers)) | expert_adapters.parameter_shapes(
            experts, self.adapter.rank
        )

    def _targets(self, experts: Mapping[str, Layer]) -> tuple[dict[str, Layer], list[str]]:
        """The experts' parameters that are targeted, and the targets for linear layers.

        Raises:
            ModelError: for what PEFT has not for parameters, or our files of them do not say.
        """
        adapter = self.adapter
        found, others = targeted(experts, adapter.target_modules)
        refused = {
            "dropout": bool(adapter.dropout),
            "rankPattern": bool(adapter.rank_pattern),
            "alphaPattern": bool(adapter.alpha_pattern),
            "initialAdapter": adapter.initial_adapter is not None,
        }
        for name, given in refused.items():
            if found and given:
                raise ModelError(
                    f"adapter.{name} does not go with adapters on experts ({min(found)}): leave one of them out"
                )
        return found, others

    def _ranks(self, layers: Mapping[str, Any]) -> dict[str, int]:
        return by_pattern(layers, self.adapter.rank_pattern, self.adapter.rank, "adapter.rankPattern")

    def parameter_count(self, linears: Mapping[str, tuple[int, ...]], config: Any) -> int:
        """Numbers that are trained."""
        return sum(math.prod(shape) for shape in self.parameter_shapes(linears, config).values())

    def peft_config(self, parameters: AdapterParameters) -> dict[str, Any]:
        """LoRA's part of adapter_config.json; `all-linear` is spelled out as the names of the adapted layers.

        In a multimodal model layers of other parts have the same names: PEFT is told to leave them alone.
        """
        adapted = [name.removesuffix(f".{A}") for name in parameters.named if name.endswith(f".{A}")]
        places = {name: parameter_and_number(name) for name in adapted}
        layers = [name for name, place in places.items() if place is None]
        experts = dict.fromkeys(place[0] for place in places.values() if place is not None)
        _, targets = targeted(experts, self.adapter.target_modules)
        on_experts = sorted(set(self.adapter.target_modules) - set(targets))
        names = {n.rpartition(".")[2] for n in layers} if "all-linear" in targets else targets
        part = f"{LANGUAGE_MODEL}."
        excluded = rf"(?!{re.escape(part)}).*" if layers and all(n.startswith(part) for n in layers) else None
        later = {
            "use_rslora": self.adapter.rslora,
            "rank_pattern": self.adapter.rank_pattern,
            "alpha_pattern": self.adapter.alpha_pattern,
        }
        return {
            "peft_type": "LORA",
            "r": self.adapter.rank,
            "lora_alpha": self.adapter.alpha,
            "lora_dropout": self.adapter.dropout,
            "target_modules": sorted(set(names)),
            **({} if excluded is None else {"exclude_modules": excluded}),
            **({"target_parameters": on_experts} if on_experts else {}),
            "bias": "none",
            **{field: value for field, value in later.items() if value},
        }


def lora_shapes(
    linears: Mapping[str, tuple[int, ...]], ranks: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the matrices of these layers: A (rank, in) and B (out, rank) of each."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (out, in_) in linears.items():
        shapes[f"{name}.{A}"] = (ranks[name], in_)
        shapes[f"{name}.{B}"] = (out, ranks[name])
    return shapes


def attach_adapters(
    layers: Mapping[str, LoraLinear], *, rank: int, alpha: float, dropout: Dropout | None, seed: int
) -> AdapterParameters:
    """Give every layer an adapter: A uniform in +-1/sqrt(in) (as PEFT does it), B zero.

    What a layer starts with depends on the seed and its name alone.
    """
    return attach_ranked(
        layers, dict.fromkeys(layers, rank), dict.fromkeys(layers, alpha / rank), dropout=dropout, seed=seed
    )


@dataclass(frozen=True)
class OfExperts:
    """Adapters on experts."""

    matrices: Mapping[str, ExpertMatrices]
    """By transformers' parameter."""
    rank: int
    """Of each expert's."""
    scale: float


def attach_ranked(
    layers: Mapping[str, LoraLinear],
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    experts: OfExperts | None = None,
    *,
    dropout: Dropout | None,
    seed: int,
) -> AdapterParameters:
    """As attach_adapters, with a rank and a scale for each layer, and with experts."""
    shapes = lora_shapes({name: layer.shape for name, layer in layers.items()}, ranks)
    if experts is not None:
        of_matrices = {name: each.shape for name, each in experts.matrices.items()}
        shapes |= expert_adapters.parameter_shapes(of_matrices, experts.rank)
    parameters = flat_parameters(shapes)
    for name, parameter in parameters.named.items():
        if name.endswith(f".{A}"):
            bound = 1.0 / math.sqrt(parameter.shape[1])
            with torch.no_grad():
                generator = seeded_generator(f"lora/{seed}/{name.removesuffix(f'.{A}')}")
                parameter.uniform_(-bound, bound, generator=generator)
    for name, layer in layers.items():
        layer.attach(parameters.named[f"{name}.{A}"], parameters.named[f"{name}.{B}"], scales[name], dropout)
    if experts is not None and experts.matrices:
        for name, each in experts.matrices.items():
            for number in range(len(each.experts)):
                a, b = (parameters.named[of_expert(name, number, which)] for which in (A, B))
                each.attach(number, a, b, experts.scale)
        parameters.form = JoinedExperts(
            parameters.named, {name: len(each.experts) for name, each in experts.matrices.items()}
        )
    return parameters


def target_layers(linears: Mapping[str, Layer], targets: list[str]) -> dict[str, Layer]:
    """The linear layers that `targets` name, by last part or whole path, as in PEFT; `all-linear` names all.

    Args:
        linears: path in the checkpoint -> layer, or anything that stands for it.
        targets: the job's targetModules.

    Raises:
        ModelError: for a target that names none, with those that exist.
    """
    if "all-linear" in targets:
        return dict(linears)
    named = {t: {n for n in linears if n == t or n.endswith(f".{t}")} for t in targets}
    for target, names in named.items():
        if not names:
            kinds = sorted({name.rpartition(".")[2] for name in linears})
            raise ModelError(
                f"adapter.targetModules: no linear layer is called {target!r}; "
                f"this model has: {', '.join(kinds)} (or all-linear)"
            )
    return {name: layer for name, layer in linears.items() if any(name in names for names in named.values())}


def by_pattern(
    layers: Mapping[str, Any], pattern: Mapping[str, Number], otherwise: Number, field: str
) -> dict[str, Number]:
    """Layer -> its value: that of the key that is its name's last part or whole path, as in PEFT; else `otherwise`.

    Raises:
        ModelError: a key names no adapted layer, or two keys name one; the maps of Kubernetes have no order.
    """
    values = dict.fromkeys(layers, otherwise)
    taken: dict[str, str] = {}
    for key, value in pattern.items():
        named = [name for name in layers if name == key or name.endswith(f".{key}")]
        if not named:
            kinds = sorted({name.rpartition(".")[2] for name in layers})
            raise ModelError(f"{field}: no adapted layer is called {key!r}; adapted are {', '.join(kinds)}")
        for name in named:
            if name in taken:
                raise ModelError(
                    f"{field}: {taken[name]!r} and {key!r} both name {name}; one of them must go"
                )
            taken[name], values[name] = key, value
    return values
