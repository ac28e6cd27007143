"""AdamW over the flat adapter, against torch's with two groups of parameters."""

import pytest
import torch

from qlora_trainer.modeling.adapter_parameters import AdapterParameters, flat_parameters
from qlora_trainer.training.optimizer import AdapterAdamW

pytestmark = pytest.mark.process

SHAPES = {
    "q.lora_A.weight": (3, 8),
    "q.lora_B.weight": (5, 3),
    "k.lora_A.weight": (3, 8),
    "k.lora_B.weight": (4, 3),
}


def adapter() -> AdapterParameters:
    """Random parameters, the same at each call."""
    parameters = flat_parameters(SHAPES)
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.named.values():
        parameter.data.normal_(generator=generator)
    return parameters


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_b_learns_at_its_own_rate(ratio: float) -> None:
    """Twenty steps with changing rates and decay are those of two groups, one at `ratio` times the rate."""
    parameters, theirs = adapter(), adapter()
    ours = AdapterAdamW(parameters, lr=1e-3, weight_decay=0.1, ratio=ratio)
    copies = {name: p.detach().clone().requires_grad_() for name, p in theirs.named.items()}
    groups = [[p for name, p in copies.items() if kind in name] for kind in ("lora_A", "lora_B")]
    stock = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        rate = 1e-3 * (step + 1)
        ours.param_groups[0]["lr"] = rate
        stock.param_groups[0]["lr"], stock.param_groups[1]["lr"] = rate, rate * ratio
        for name, parameter in parameters.named.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)
            copies[name].grad = gradient
        ours.step()
        stock.step()

    for name, parameter in parameters.named.items():
        torch.testing.assert_close(parameter.detach(), copies[name].detach(), rtol=1e-5, atol=1e-6, msg=name)


def test_without_a_ratio_it_is_torch_s_own() -> None:
    """At 1 the bits are those of AdamW over the flat buffer: jobs of before resume bit-exact."""
    parameters, theirs = adapter(), adapter()
    ours = AdapterAdamW(parameters, lr=1e-2, weight_decay=0.1, ratio=1.0)
    stock = torch.optim.AdamW([theirs.flat], lr=1e-2, weight_decay=0.1, fused=True)
    for each in (parameters, theirs):
        each.gradient.fill_(0.3)
    ours.step()
    stock.step()

    assert torch.equal(parameters.flat, theirs.flat)
