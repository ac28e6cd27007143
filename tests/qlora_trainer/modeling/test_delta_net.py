"""Gated delta networks over packed samples, against transformers' own layer on each sample alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

import builders
from qlora_trainer.data.collate import collate
from qlora_trainer.data.dataset import Samples
from qlora_trainer.modeling import delta_net
from qlora_trainer.modeling.adapter_methods import method_for
from qlora_trainer.modeling.delta_net import GatedDeltaNet, blocks
from qlora_trainer.modeling.key_value_cache import CachedSequence
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.quantization.schemes import Unquantized

pytestmark = pytest.mark.process

HIDDEN = 48
LENGTHS = [1, 63, 64, 65, 2, 200, 7]
"""Around the length of a chunk, and of several."""
TOLERANCE = 1e-5
HEADS = {
    "a key for each value": (3, 3, 16, 16),
    "a key for two values": (3, 6, 16, 24),
    "wide keys": (2, 6, 32, 8),
}
"""Heads of keys, of values, and the size of each."""


def a_layer(heads: tuple[int, int, int, int], **config: Any) -> Any:
    """transformers' layer with random weights, fp32, decays from strong to weak."""
    keys, values, key_size, value_size = heads
    torch.manual_seed(0)
    layer = Qwen3_5GatedDeltaNet(
        Qwen3_5TextConfig(
            hidden_size=HIDDEN, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_key_heads=keys,
            linear_num_value_heads=values, linear_key_head_dim=key_size, linear_value_head_dim=value_size, **config,
        ),
        0,
    )  # fmt: skip
    layer.A_log.data.copy_(torch.linspace(-4, 2, values))
    layer.dt_bias.data.normal_()
    layer.norm.weight.data.normal_(mean=1.0)
    for linear in (layer.in_proj_qkv, layer.in_proj_z, layer.in_proj_b, layer.in_proj_a, layer.out_proj):
        linear.weight.data.normal_(std=0.3)
    return layer


def rows(tokens: int, seed: int = 1) -> Tensor:
    """(1, tokens, hidden size)."""
    return torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def by_stock(stock: Any, x: Tensor, lengths: list[int]) -> Tensor:
    """Each sample alone."""
    return torch.cat([stock(hidden_states=part) for part in torch.split(x, lengths, dim=1)], dim=1)


def with_gradients(stock: Any, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of every projection, of a random sum of outputs."""
    x = rows(sum(LENGTHS)).requires_grad_()
    out = run(x)
    weights = {name: p for name, p in stock.named_parameters() if "proj" in name}
    gradients = torch.autograd.grad((out * rows(sum(LENGTHS), seed=2)).sum(), [x, *weights.values()])
    return dict(zip(["output", "input", *weights], [out.detach(), *gradients], strict=True))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each within tolerance, relative to its size."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm() / tensor.norm()) <= TOLERANCE, name


@pytest.mark.parametrize(
    ("heads", "taps"),
    [*((heads, 4) for heads in HEADS.values()), (HEADS["wide keys"], 1)],
    ids=[*HEADS, "no convolution"],
)
def test_packed_samples_give_what_transformers_gives_for_each_alone(
    heads: tuple[int, int, int, int], taps: int
) -> None:
    """The output and all gradients, of samples shorter and longer than a chunk."""
    stock = a_layer(heads, linear_conv_kernel_dim=taps)
    ours = GatedDeltaNet(stock)

    found = with_gradients(stock, lambda x: ours(x, segment_lengths=LENGTHS))
    assert_close(found, with_gradients(stock, lambda x: by_stock(stock, x, LENGTHS)))


@pytest.mark.parametrize(("numbers", "block"), [(1, 200), (30_000, 1)])
def test_heads_and_samples_that_run_in_turn_change_nothing(
    numbers: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of them memory allows at a time."""
    stock = a_layer(HEADS["a key for two values"])
    ours = GatedDeltaNet(stock)
    expected = with_gradients(stock, lambda x: ours(x, segment_lengths=LENGTHS))
    monkeypatch.setattr(delta_net, "RECURRENT_NUMBERS", numbers)
    monkeypatch.setattr(delta_net, "BLOCK", block)
    assert len(list(blocks(LENGTHS))) > 1

    assert_close(with_gradients(stock, lambda x: ours(x, segment_lengths=LENGTHS)), expected)


def test_a_sample_sees_nothing_of_its_neighbors() -> None:
    """Whatever stands before and behind it: not one bit differs, forward or backward."""
    ours = GatedDeltaNet(a_layer(HEADS["a key for two values"]))
    found = []
    for seed in (1, 2):
        x = rows(sum(LENGTHS), seed)
        x[:, 64:128] = rows(64, 3)
        x.requires_grad_()
        out = ours(x, segment_lengths=LENGTHS)
        (gradient,) = torch.autograd.grad(out[:, 64:128].sum(), x)
        found.append((out[:, 64:128], gradient[:, 64:128]))
        assert not gradient[:, :64].any()
        assert not gradient[:, 128:].any()

    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("parts", [[100, 30], [1, 2, 127], [130], [128, 1, 1], [3, 70, 57]], ids=str)
@torch.no_grad()
def test_a_sequence_goes_on_where_it_stopped(parts: list[int]) -> None:
    """Read in parts, beside another sequence and a segment that is none, it gives what it gives as a whole."""
    stock = a_layer(HEADS["a key for two values"])
    ours, x, other = GatedDeltaNet(stock), rows(130), rows(130, 2)
    one, two = CachedSequence(200), CachedSequence(200)
    found = []
    for first, second in zip(torch.split(x, parts, 1), torch.split(other, parts, 1), strict=True):
        length = first.shape[1]
        row = torch.cat([second, first, rows(3)], dim=1)
        out = ours(row, segment_lengths=[length, length, 3], cached=[two, one, None])
        found.append(out[:, length : 2 * length])
        for sequence in (one, two):
            sequence.advance(length)

    assert_close({"output": torch.cat(found, 1)}, {"output": stock(hidden_states=x)})


def test_bf16_is_rounded_once() -> None:
    """Of bf16 projections, what comes out of the core is fp32's to the last digit that bf16 has."""
    core = GatedDeltaNet(a_layer(HEADS["a key for two values"])).core
    heads = core.heads
    sizes = 2 * heads.keys * heads.key_size + heads.values * heads.value_size, heads.values * heads.value_size
    generator = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(sum(LENGTHS), size, generator=generator).bfloat16()
        for size in (*sizes, heads.values, heads.values)
    ]
    narrow, _ = core.run(*inputs, LENGTHS)
    wide, _ = core.run(*(x.float() for x in inputs), LENGTHS)

    assert torch.equal(narrow, wide.bfloat16())


def test_samples_must_be_told_apart() -> None:
    """Without segments, or with other ones, nothing is computed."""
    ours = GatedDeltaNet(a_layer(HEADS["wide keys"]))

    with pytest.raises(ValueError, match="samples would see each other"):
        ours(rows(5))
    with pytest.raises(ValueError, match="segments of 4 tokens do not cover"):
        ours(rows(5), segment_lengths=[3, 1])


def test_recomputed_layers_give_the_same_gradient(small_model: Callable[..., Path], samples: Samples) -> None:
    """With gradient checkpointing, bit for bit."""
    run = builders.a_run(adapter={"rank": 4, "targetModules": ["all-linear"]})
    gradients = []
    for recompute in (False, True):
        model = load_model(small_model("qwen3_5_text", vocab_size=300), Unquantized(), torch.float32)
        model.graph.train()
        if recompute:
            model.enable_gradient_checkpointing()
        parameters = method_for(run.adapter).attach(model, seed=0, dropout=None)
        for parameter in parameters.named.values():
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
        model.hidden_states(collate(samples, range(len(samples)))).square().sum().backward()
        gradients.append(parameters.gradient.clone())

    assert bool(gradients[0].any())
    assert torch.equal(*gradients)
