"""Which models are refused by their config.json, and what a family says of its graph."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model_folders import by_transformers, configure
from qlora_trainer.data.dataset import Samples
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling import families
from qlora_trainer.modeling.families import FAMILIES, Family, read_config
from qlora_trainer.modeling.layers import GatedMlp, RmsNorm
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.lora import attach_adapters
from qlora_trainer.modeling.lora_linear import LoraLinear
from qlora_trainer.quantization.schemes import Unquantized

pytestmark = pytest.mark.process

Make = Callable[..., Path]
Loss = Callable[..., Tensor]
LIVELY = {"vocab_size": 300, "initializer_range": 0.12}
"""Few words; weights large enough for lively attention."""


CONFIGURATIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "has no config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "other architecture": (lambda f: configure(f, model_type="gpt2"), "'gpt2' model; supported are llama, mistral"),
    "unknown architecture": (lambda f: configure(f, model_type="nonesuch"), "config.json cannot be read"),
    "wrong type": (lambda f: configure(f, hidden_size="wide"), "config.json cannot be read.*hidden_size"),
    "quantized": (
        lambda f: configure(f, quantization_config={"quant_method": "quanto"}), "is quantized by 'quanto'",
    ),
    "dynamic rope": (
        lambda f: configure(f, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic'",
    ),
    "old dynamic rope": (
        lambda f: configure(f, rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}), "'dynamic'",
    ),
    "attention of another kind": (
        lambda f: configure(f, layer_types=["full_attention", "linear_attention"]), "layers of 'linear_attention'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_refuses_what_it_cannot_train_exactly(
    damage: Callable[[Path], Any], message: str, copied: Make
) -> None:
    """config.json is refused, with the reason, before any weight is read."""
    folder = copied("llama")
    damage(folder)

    with pytest.raises(ModelError, match=message):
        read_config(folder)


# --- the graphs


NORMS = {"llama": 5, "mistral": 5, "qwen2": 5, "qwen3": 9}
"""Of two decoder layers; qwen3 has two more in each attention."""


def test_every_family_is_tested() -> None:
    """A family of the table is one of those below."""
    assert NORMS.keys() == FAMILIES.keys()


@pytest.mark.parametrize(("kind", "norms"), NORMS.items(), ids=NORMS)
def test_every_layer_of_a_family_s_graph_is_ours(kind: str, norms: int, small_model: Make) -> None:
    """All norms, gated MLPs and linear layers of two decoder layers are replaced by the ones that keep less."""
    model = load_model(small_model(kind, **LIVELY), Unquantized(), torch.float32)
    modules = list(model.graph.modules())

    assert sum(isinstance(module, RmsNorm) for module in modules) == norms
    assert sum(isinstance(module, GatedMlp) for module in modules) == 2
    assert sum(isinstance(module, LoraLinear) for module in modules) == 2 * 7
    assert not any(isinstance(module, torch.nn.Linear) for module in modules)


def test_another_activation_keeps_transformers_mlp(
    small_model: Make, samples: Samples, loss_of: Loss
) -> None:
    """Where hidden_act is not silu, the MLP's formula is another one, and stays transformers' own."""
    folder = small_model("llama", **LIVELY, hidden_act="gelu")
    model = load_model(folder, Unquantized(), torch.float32)

    assert not any(isinstance(module, GatedMlp) for module in model.graph.modules())
    assert float(loss_of(model)) == pytest.approx(by_transformers(folder, samples), rel=1e-6)


def test_a_new_family_is_one_entry(
    monkeypatch: pytest.MonkeyPatch, small_model: Make, samples: Samples, loss_of: Loss
) -> None:
    """A family with fused projections, refused so far, is loaded and trained once it is in the table."""
    folder = small_model("phi3", **LIVELY)
    with pytest.raises(ModelError, match=r"is a 'phi3' model; supported are llama"):
        read_config(folder)
    monkeypatch.setitem(families.FAMILIES, "phi3", Family(gated_mlp=None))
    model = load_model(folder, Unquantized(), torch.float32)
    model.graph.train()
    parameters = attach_adapters(model.linears, rank=3, alpha=6.0, dropout=None, seed=0)
    packed = loss_of(model)
    packed.backward()

    assert {name.rpartition(".")[2] for name in model.linears} == {
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj",
    }  # fmt: skip
    assert float(packed.detach()) == pytest.approx(by_transformers(folder, samples), rel=1e-6)
    assert bool(parameters.gradient.any())


def test_a_family_refuses_what_its_entry_says(monkeypatch: pytest.MonkeyPatch, small_model: Make) -> None:
    """A reason of an entry is read after the folder's name."""
    folder = small_model("llama", **LIVELY)
    refusing = Family(refusals=(lambda config: f"has {config.num_hidden_layers} layers" if config else None,))
    monkeypatch.setitem(families.FAMILIES, "llama", refusing)

    with pytest.raises(ModelError, match=f"^{folder} has 2 layers$"):
        read_config(folder)
