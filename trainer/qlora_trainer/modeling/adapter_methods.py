"""What is trained beside the frozen base: one table of adapter methods."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from qlora_contract.run_config import Adapter
from qlora_trainer.modeling.adapter_parameters import AdapterParameters
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.lora import Lora
from qlora_trainer.modeling.lora_linear import Dropout

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the name of each tensor of an adapter, whatever its method."""


class AdapterMethod(Protocol):
    """A kind of adapter, made of a job's settings.

    Linear layers are given by their paths in the checkpoint (`model.layers.0.mlp.up_proj`) and shapes (out, in).
    """

    def attach(self, model: BaseModel, *, seed: int, dropout: Dropout | None) -> AdapterParameters:
        """Give a model its adapter.

        Args:
            model: its layers are changed in place; until the first step it computes what it did before.
            seed: what the adapter starts with depends on it and on names alone.
            dropout: masks of the adapter's inputs while training; None for none.

        Raises:
            ModelError: the model lacks a layer that is to be adapted.
        """

    def parameter_shapes(self, linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of everything that `attach` would make trainable, in its order.

        The names are those in checkpoints, and after PEFT's prefix those in the finished adapter. Raises as `attach`.
        """

    def parameter_count(self, linears: Mapping[str, tuple[int, int]]) -> int:
        """How many numbers those are. Raises as `attach`."""

    def peft_config(self, parameters: AdapterParameters) -> dict[str, Any]:
        """The method's part of PEFT's adapter_config.json, `peft_type` and all that PEFT needs to rebuild it."""


METHODS: dict[str, Callable[[Adapter], AdapterMethod]] = {
    "lora": Lora,
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
    before = {name: layer.enabled for name, layer in model.linears.items()}
    try:
        for layer in model.linears.values():
            layer.enabled = False
        yield
    finally:
        for name, enabled in before.items():
            model.linears[name].enabled = enabled
