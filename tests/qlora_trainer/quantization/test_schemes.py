"""The schemes at work, and a new one that nobody but the tables knows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_contract import quantization as contract
from qlora_contract.memory import choose
from qlora_contract.run_config import (
    Adapter,
    Dataset,
    JobRef,
    Layout,
    ModelSource,
    Quantization,
    RunConfig,
    Training,
)
from qlora_trainer.data.collate import collate
from qlora_trainer.data.dataset import Samples
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.adapter_methods import method_for
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.loss import summed_cross_entropy
from qlora_trainer.modeling.shape import model_shape
from qlora_trainer.quantization import kernels, schemes
from qlora_trainer.quantization.frozen_weight import FrozenWeight
from qlora_trainer.quantization.schemes import AsStored, Fp4, Int8, Nf4, Unquantized, scheme_of

pytestmark = pytest.mark.process


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param(Quantization(), Nf4(double=True), id="default"),
        pytest.param(Quantization(double_quantization=False), Nf4(double=False), id="nf4, fp32 scales"),
        pytest.param(Quantization(block_size=128), Nf4(double=True, block=128), id="nf4, blocks of 128"),
        pytest.param(Quantization(scheme="fp4", block_size=128), Fp4(double=True, block=128), id="fp4"),
        pytest.param(Quantization(scheme="int8"), Int8(), id="int8"),
        pytest.param(Quantization(scheme="none"), Unquantized(), id="none"),
        pytest.param(
            Quantization(scheme="none", double_quantization=False), Unquantized(), id="none, no scales"
        ),
    ],
)
def test_settings_name_their_scheme(settings: Quantization, expected: schemes.Scheme) -> None:
    """A job's quantization gives the scheme of that name, with the settings that it has."""
    assert scheme_of(settings) == expected


def test_every_scheme_of_the_api_can_be_loaded() -> None:
    """The trainer knows what to do for each name of the contract's table, and knows no others."""
    assert list(schemes.IMPLEMENTATIONS) == list(contract.SCHEMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["fp32 scales", "nested scales"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("name", contract.SCHEMES)
def test_weights_take_what_the_table_says(name: str, block: int, double: bool, dtype: torch.dtype) -> None:
    """The memory estimate's bytes are those of the weights that are loaded, to a thousandth."""
    settings = Quantization.model_validate({"scheme": name, "doubleQuantization": double, "blockSize": block})
    weight = scheme_of(settings).freeze("w", randn(576, 576), dtype)

    assert weight.nbytes == pytest.approx(
        contract.weight_bytes(576 * 576, settings, dtype.itemsize), rel=1e-3
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheme", [Nf4(double=True), Fp4(double=True), Int8(), Unquantized()], ids=str)
def test_what_is_not_finite_is_refused(scheme: schemes.Scheme, value: float) -> None:
    """A NaN or an infinity in a weight is a ModelError that names the tensor."""
    weight = randn(4, 64)
    weight[2, 3] = value

    with pytest.raises(ModelError, match=r"layer\.weight"):
        scheme.freeze("layer.weight", weight, torch.float32)


def test_unquantized_weights_are_copies_and_stored_ones_are_not() -> None:
    """A copy outlives the file that it was mapped from; as stored, not a byte is copied."""
    tensor = randn(4, 64)
    x = torch.eye(64)
    copy = Unquantized().freeze("w", tensor, torch.float32)
    mapped = AsStored().freeze("w", tensor, torch.bfloat16)
    tensor.fill_(2.0)

    assert not (copy.linear(x, None) == 2.0).any()
    assert (mapped.linear(x, None) == 2.0).all()


# --- a scheme that the rest of the code has never heard of


class RowsOf8Bits:
    """A weight in 8 bits with a scale per row, which multiplies without ever making W."""

    def __init__(self, weight: Tensor) -> None:
        self.scales = weight.float().abs().amax(dim=1) / 127
        self.codes = (weight.float() / self.scales[:, None]).round().to(torch.int8)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """A byte a weight, and the scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Needed by the tests alone."""
        matrix = (self.codes.float() * self.scales[:, None]).to(dtype)
        return matrix if out is None else out.copy_(matrix)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Scale what the codes give."""
        y = (x @ self.codes.to(x.dtype).t()).mul_(self.scales.to(x.dtype))
        return y if bias is None else y.add_(bias)

    def linear_grad_input(self, dy: Tensor) -> Tensor:
        """Scale what goes into the codes."""
        return (dy * self.scales.to(dy.dtype)) @ self.codes.to(dy.dtype)


@dataclass(frozen=True)
class Rows8:
    """The scheme of such weights."""

    def freeze(self, _name: str, tensor: Tensor, _dtype: torch.dtype) -> FrozenWeight:
        """(out, in) -> 8 bits a number and a scale a row."""
        return RowsOf8Bits(tensor)


@pytest.fixture
def rows8(monkeypatch: pytest.MonkeyPatch) -> Quantization:
    """Register the scheme `rows8`: an entry in each table, and no more."""
    facts = contract.SchemeFacts("8 bits, a scale per row", lambda weights, _settings, _bytes: weights)
    monkeypatch.setitem(contract.SCHEMES, "rows8", facts)
    monkeypatch.setitem(schemes.IMPLEMENTATIONS, "rows8", lambda _settings: Rows8())
    return Quantization().model_copy(update={"scheme": "rows8"})


def random_samples() -> Samples:
    """Two samples of 300 words; all tokens but the first are learnt."""
    ids = np.random.default_rng(0).integers(0, 300, 40).astype(np.int32)
    mask = np.ones(40, np.uint8)
    mask[[0, 25]] = 0
    return Samples(ids, mask, np.array([0, 25, 40]))


def test_a_new_scheme_is_two_entries(rows8: Quantization, small_model: Callable[..., Path]) -> None:
    """A model whose weights are stored in a new scheme is planned for, loaded and trained; nothing else was touched."""
    folder = small_model("qwen2", vocab_size=300, initializer_range=0.12)
    run = RunConfig(
        job=JobRef(name="job", uid="u", attempt=0), workspace="pvc://data", model=ModelSource(source="pvc://data/m"),
        dataset=Dataset(source="pvc://data/d.jsonl"), adapter=Adapter(rank=4), training=Training(max_steps=1),
        layout=Layout(memory_per_rank=2**34), isa="avx2",
    )  # fmt: skip
    planned = choose(model_shape(folder, run.adapter), run.model_copy(update={"quantization": rows8}), "fp32")
    model = load_model(folder, scheme_of(rows8), torch.float32)
    model.graph.train()
    parameters = method_for(run.adapter).attach(model, seed=0, dropout=None)
    optimizer = torch.optim.AdamW([parameters.flat], lr=1e-2, fused=True)
    samples = random_samples()
    batch = collate(samples, [0, 1])
    losses = []
    for _ in range(3):
        parameters.gradient.zero_()
        loss = summed_cross_entropy(
            model.hidden_states(batch)[batch.logit_positions], model.head, batch.targets
        )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))

    linear_weights = sum(math.prod(layer.shape) for layer in model.linears.values())
    assert {type(layer.weight) for layer in model.linears.values()} == {RowsOf8Bits}
    assert planned.base == linear_weights + model.head.nbytes
    assert losses[2] < losses[1] < losses[0]
    assert kernels.name("rows8") == "reference"
