"""What is trained beside the frozen base: one table of adapter methods."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from qlora_contract.run_config import Adapter
from qlora_trainer.modeling.adapter_parameters import AdapterParameters, Encode
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.lora import Lora
from qlora_trainer.modeling.lora_linear import Dropout
from qlora_trainer.modeling.prompt_methods import PrefixTuning, PromptTuning


class AdapterMethod(Protocol):
    """A kind of adapter, made of a job's settings.

    Linear layers are given by their paths in the checkpoint (`model.layers.0.mlp.up_proj`) and shapes (out, in); and so
    are experts' matrices, by transformers' parameters (`model.layers.0.mlp.experts.down_proj`) and (experts, out, in).
    """

    def attach(
        self, model: BaseModel, *, seed: int, dropout: Dropout | None, encode: Encode | None = None
    ) -> AdapterParameters:
        """Give a model its adapter.

        Args:
            model: it is changed in place. With LoRA it computes what it did before, until the first step.
            seed: what the adapter starts with depends on it and on names alone.
            dropout: masks of the adapter's inputs while training; None for none.
            encode: a text's tokens, for an adapter that starts as one; None where another is loaded into it anyway.

        Raises:
            ModelError: the model lacks a layer that is to be adapted.
        """

    def parameter_shapes(
        self, linears: Mapping[str, tuple[int, ...]], config: Any
    ) -> dict[str, tuple[int, ...]]:
        """Name -> shape of everything that `attach` would make trainable, in its order.

        The names are those in checkpoints. `config`: transformers', of the language model. Raises as `attach`.
        """

    def parameter_count(self, linears: Mapping[str, tuple[int, ...]], config: Any) -> int:
        """How many numbers those are. Raises as `attach`."""

    def peft_config(self, parameters: AdapterParameters) -> dict[str, Any]:
        """The method's part of PEFT's adapter_config.json, `peft_type` and all that PEFT needs to rebuild it."""


METHODS: dict[str, Callable[[Adapter], AdapterMethod]] = {
    "lora": Lora,
    "prompt-tuning": PromptTuning,
    "prefix-tuning": PrefixTuning,
}
"""By the name in the API, `adapter.method`."""


def method_for(adapter: Adapter) -> AdapterMethod:
    """The method that a job's `adapter` asks for. Raises KeyError for one that is not in METHODS."""
    return METHODS[adapter.method](adapter)


@contextmanager
def adapters_disabled(model: BaseModel) -> Iterator[None]:
    """Within it the model is its frozen base, forward and backward: a reference to compare the adapter with.

    Where layers are recomputed in the backward pass (gradient checkpointing), that pass belongs within it, too.
    """
    experts = [layer for each in model.experts.values() for layers in each.experts for layer in layers]
    parts = [*model.linears.values(), *experts, *([] if model.virtual is None else [model.virtual])]
    before = [part.enabled for part in parts]
    try:
        for part in parts:
            part.enabled = False
        yield
    finally:
        for part, enabled in zip(parts, before, strict=True):
            part.enabled = enabled
