"""The table of adapter methods, switching adapters off, and a method that nobody but the table knows."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_contract.run_config import Adapter
from qlora_trainer.modeling import adapter_methods
from qlora_trainer.modeling.adapter_methods import adapters_disabled, method_for
from qlora_trainer.modeling.adapter_parameters import AdapterParameters, flat_parameters
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.lora import Lora
from qlora_trainer.modeling.lora_linear import Dropout, LoraLinear
from qlora_trainer.modeling.shape import model_shape
from qlora_trainer.quantization.schemes import Nf4

pytestmark = pytest.mark.process

Make = Callable[..., Path]
Loss = Callable[..., Tensor]
LIVELY = {"vocab_size": 300, "initializer_range": 0.12}
"""Few words; weights large enough for lively attention."""


def loaded(small_model: Make) -> BaseModel:
    """A quantized model that trains."""
    model = load_model(small_model("llama", **LIVELY), Nf4(double=True), torch.float32)
    model.graph.train()
    return model


def with_noise(parameters: AdapterParameters) -> AdapterParameters:
    """The same adapter, trained a little: none of its matrices is zero."""
    noise = torch.randn(parameters.flat.shape, generator=torch.Generator().manual_seed(1))
    parameters.flat.data.add_(noise, alpha=0.1)
    return parameters


def test_the_api_s_method_is_lora() -> None:
    """`lora` is the method of that name, with the job's settings."""
    adapter = Adapter(rank=3)

    assert method_for(adapter) == Lora(adapter)


# --- switched off


@pytest.mark.parametrize("probability", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_a_disabled_adapter_leaves_the_frozen_base(
    probability: float, small_model: Make, loss_of: Loss
) -> None:
    """While disabled, the loss is the base's bit for bit, whatever the adapter has learnt; afterwards it is not."""
    model = loaded(small_model)
    base = loss_of(model).detach()
    dropout = Dropout(probability, 0) if probability else None
    if dropout is not None:
        dropout.at(0, [(0, 43)])
    with_noise(Lora(Adapter(rank=3)).attach(model, seed=0, dropout=dropout))
    adapted = loss_of(model)
    with adapters_disabled(model):
        disabled = loss_of(model)

    assert torch.equal(disabled, base)
    assert not torch.equal(adapted, base)
    assert torch.equal(loss_of(model), adapted)


def test_a_disabled_adapter_gets_no_gradient_and_passes_the_base_s_on(small_model: Make) -> None:
    """While disabled, what reaches an input is the frozen layer's gradient, and nothing reaches the adapter."""
    model = loaded(small_model)
    parameters = with_noise(Lora(Adapter(rank=3)).attach(model, seed=0, dropout=None))
    layer = next(iter(model.linears.values()))
    x = torch.randn(5, layer.shape[1], generator=torch.Generator().manual_seed(2)).requires_grad_()
    dy = torch.randn(5, layer.shape[0], generator=torch.Generator().manual_seed(3))
    with adapters_disabled(model):
        layer(x).backward(dy)

    assert x.grad is not None
    assert torch.equal(x.grad, layer.weight.linear_grad_input(dy))
    assert not parameters.gradient.any()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_reference_without_gradient_leaves_the_step_as_it_was(
    recompute: bool, small_model: Make, loss_of: Loss
) -> None:
    """A forward pass of the base between the adapter's forward and backward changes no bit of its gradient."""
    model = loaded(small_model)
    parameters = with_noise(Lora(Adapter(rank=3)).attach(model, seed=0, dropout=None))
    if recompute:
        model.enable_gradient_checkpointing()
    loss_of(model).backward()
    expected = parameters.gradient.clone()
    parameters.gradient.zero_()
    loss = loss_of(model)
    with adapters_disabled(model), torch.no_grad():
        loss_of(model)
    loss.backward()

    assert torch.equal(parameters.gradient, expected)


def test_switching_off_nests_and_survives_errors(small_model: Make) -> None:
    """Each block restores what it found, also when it is left by an exception."""
    model = loaded(small_model)
    layers = list(model.linears.values())
    layers[0].enabled = False
    with adapters_disabled(model):
        with pytest.raises(KeyError), adapters_disabled(model):
            raise KeyError
        assert not any(layer.enabled for layer in layers)

    assert [layer.enabled for layer in layers] == [False] + [True] * (len(layers) - 1)


# --- a method that the rest of the code has never heard of


@dataclass(frozen=True)
class Shift:
    """A trained constant that is added to what each linear layer gives (after Zaken et al. 2021, "BitFit")."""

    adapter: Adapter

    def attach(
        self, model: BaseModel, *, seed: int, dropout: Dropout | None, encode: Any = None
    ) -> AdapterParameters:
        """Add zeros."""
        parameters = flat_parameters(
            self.parameter_shapes({n: x.shape for n, x in model.linears.items()}, None)
        )
        for name, layer in model.linears.items():
            layer.register_forward_hook(self.adding(parameters.named[f"{name}.shift"]))
        return parameters

    @staticmethod
    def adding(shift: nn.Parameter) -> Callable[[LoraLinear, Any, Tensor], Tensor]:
        """A hook that adds the shift, unless the layer's adapters are disabled."""
        return lambda layer, _, out: out + shift if layer.enabled else out

    def parameter_shapes(
        self, linears: Mapping[str, tuple[int, int]], config: Any
    ) -> dict[str, tuple[int, ...]]:
        """One vector (out,) a layer."""
        return {f"{name}.shift": (out,) for name, (out, _) in linears.items()}

    def parameter_count(self, linears: Mapping[str, tuple[int, int]], config: Any) -> int:
        """The sum of their sizes."""
        return sum(math.prod(shape) for shape in self.parameter_shapes(linears, config).values())

    def peft_config(self, parameters: AdapterParameters) -> dict[str, Any]:
        """PEFT has no such method."""
        return {"peft_type": "SHIFT"}


def test_a_new_method_is_one_entry(monkeypatch: pytest.MonkeyPatch, small_model: Make, loss_of: Loss) -> None:
    """A method that is only registered is counted, attached, trained and switched off."""
    monkeypatch.setitem(adapter_methods.METHODS, "shift", Shift)
    adapter = Adapter().model_copy(update={"method": "shift"})
    model = loaded(small_model)
    base = loss_of(model).detach()
    parameters = method_for(adapter).attach(model, seed=0, dropout=None)
    optimizer = torch.optim.AdamW([parameters.flat], lr=1e-2, fused=True)
    losses = []
    for _ in range(3):
        parameters.gradient.zero_()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    weights = model_shape(small_model("llama", **LIVELY), adapter).adapter_weights
    assert weights == sum(p.numel() for p in parameters.named.values())
    assert "model.layers.0.mlp.up_proj.shift" in parameters.named
    assert losses[2] < losses[1] < losses[0] == float(base)
    with adapters_disabled(model):
        assert torch.equal(loss_of(model), base)
