"""LoRA on experts, against transformers with peft's own adapters of parameters."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import builders
from model_folders import stock_model
from qlora_contract.run_config import Adapter
from qlora_trainer.artifacts.adapter import write_adapter
from qlora_trainer.data.collate import collate
from qlora_trainer.data.dataset import Samples
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling.adapter_methods import adapters_disabled, method_for
from qlora_trainer.modeling.adapter_parameters import PEFT_PREFIX, AdapterParameters
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.expert_adapters import JoinedExperts, parameter_and_number
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.shape import adapter_shapes, model_shape
from qlora_trainer.quantization.schemes import Unquantized
from qlora_trainer.storage.job_folder import JobFolder

pytestmark = pytest.mark.process

Make = Callable[..., Path]
LIVELY = {"vocab_size": 300, "initializer_range": 0.12}
TARGETS = {
    "both, and attention": ["q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "one, of one layer": ["model.layers.1.mlp.experts.down_proj"],
    "gates and ups, and all that is linear": ["all-linear", "experts.gate_up_proj"],
}


def adapter_of(targets: list[str], **settings: Any) -> dict[str, Any]:
    """alpha / rank is neither 1 nor 2."""
    return {"rank": 4, "alpha": 6.0, "targetModules": targets, **settings}


def with_adapter(
    folder: Path, targets: list[str], to: Path, **settings: Any
) -> tuple[BaseModel, AdapterParameters, Path]:
    """A base with a random adapter, B not zero, and the same adapter as it is published."""
    run = builders.a_run(adapter=adapter_of(targets, **settings))
    model = load_model(folder, Unquantized(), torch.float32)
    parameters = method_for(run.adapter).attach(model, seed=0, dropout=None)
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.named.values():
        parameter.data.copy_(
            torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1]) / 2
        )
    return model, parameters, write_adapter(JobFolder(to, run), parameters, str(folder))


def by_peft(folder: Path, adapter: Path, samples: Samples) -> tuple[float, dict[str, Tensor]]:
    """Summed loss and gradients of the stock libraries, each sample alone."""
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(stock_model(folder), adapter, is_trainable=True)
    total = 0.0
    for number in range(len(samples)):
        ids, mask = (torch.from_numpy(x.astype(np.int64)) for x in samples.sample(number))
        labels = torch.where(mask.bool(), ids, -100)
        logits = model(input_ids=ids[None]).logits[0]
        loss = F.cross_entropy(logits[:-1].double(), labels[1:], reduction="sum", ignore_index=-100)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    found = {n.replace(".default.", "."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return total, found


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_loss_and_gradients_are_those_of_stock_peft(
    kind: str,
    targets: list[str],
    rslora: bool,
    small_model: Make,
    samples: Samples,
    loss_of: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    """peft loads the written adapter, all of it, and every matrix of every expert has the same gradient."""
    if rslora and targets != TARGETS["both, and attention"]:
        pytest.skip("another scale is another scale for all")
    folder = small_model(kind, **LIVELY)
    model, parameters, written = with_adapter(folder, targets, tmp_path / "job", rslora=rslora)

    loss = loss_of(model)
    loss.backward()  # type: ignore[no-untyped-call]

    expected, theirs = by_peft(folder, written, samples)
    assert isinstance(parameters.form, JoinedExperts)
    gradients: dict[str, Any] = {name: parameter.grad for name, parameter in parameters.named.items()}
    mine = JoinedExperts(gradients, parameters.form.counts).tensors()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert float(gradient.norm()) > 0, name
        assert float((mine[name] - gradient).norm() / gradient.norm()) <= 1e-4, name


def test_the_adapter_that_is_written_is_the_one_that_is_read(
    small_model: Make, loss_of: Callable[..., Tensor], tmp_path: Path
) -> None:
    """Published and loaded into a fresh model, it computes the same; disabled, it is as if it were not there."""
    from safetensors.torch import load_file

    folder, targets = small_model("gpt_oss", **LIVELY), TARGETS["both, and attention"]
    model, _, written = with_adapter(folder, targets, tmp_path / "job")
    fresh = load_model(folder, Unquantized(), torch.float32)
    base = loss_of(fresh)
    parameters = method_for(Adapter.model_validate(adapter_of(targets))).attach(fresh, seed=5, dropout=None)
    assert torch.equal(loss_of(fresh), base)

    parameters.load_published(load_file(written / "adapter_model.safetensors"))

    assert torch.equal(loss_of(fresh), loss_of(model))
    assert not torch.equal(loss_of(model), base)
    with adapters_disabled(model):
        assert torch.equal(loss_of(model), base)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_shapes_by_config_json_are_those_of_the_loaded_model(
    kind: str, targets: list[str], small_model: Make
) -> None:
    """Also where all but the first layer have experts."""
    config: dict[str, Any] = {"mlp_only_layers": [0]} if kind == "qwen3_moe" else {}
    folder = small_model(kind, **LIVELY, **config)
    adapter = Adapter.model_validate(adapter_of(targets))
    model = load_model(folder, Unquantized(), torch.float32)
    parameters = method_for(adapter).attach(model, seed=0, dropout=None)

    assert adapter_shapes(folder, adapter) == {n: tuple(p.shape) for n, p in parameters.named.items()}
    assert model_shape(folder, adapter).adapter_weights == sum(p.numel() for p in parameters.named.values())


def test_experts_are_adapted_by_choice_alone(small_model: Make) -> None:
    """all-linear names linear layers, as in peft, and adapter_config.json then says nothing of parameters."""
    model = load_model(small_model("gpt_oss", **LIVELY), Unquantized(), torch.float32)
    method = method_for(Adapter.model_validate(adapter_of(["all-linear"])))
    parameters = method.attach(model, seed=0, dropout=None)

    assert not any(".experts." in name for name in parameters.named)
    assert "target_parameters" not in method.peft_config(parameters)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dropout": 0.1},
            r"adapter.dropout does not go with adapters on experts \(model.layers.0.mlp.experts.down",
        ),
        ({"rankPattern": {"q_proj": 2}}, "adapter.rankPattern does not go with adapters on experts"),
        ({"alphaPattern": {"q_proj": 2.0}}, "adapter.alphaPattern does not go with adapters on experts"),
        ({"initialAdapter": "pvc://data/a"}, "adapter.initialAdapter does not go with adapters on experts"),
    ],
)
def test_what_peft_has_not_for_experts_is_refused(
    settings: dict[str, Any], message: str, small_model: Make
) -> None:
    """Before any weight is read."""
    adapter = Adapter.model_validate(adapter_of(["q_proj", "experts.down_proj"], **settings))

    with pytest.raises(ModelError, match=message):
        adapter_shapes(small_model("gpt_oss", **LIVELY), adapter)


def test_a_dense_model_has_no_experts_to_adapt(small_model: Make) -> None:
    """The target is refused as any other that names nothing."""
    adapter = Adapter.model_validate(adapter_of(["experts.down_proj"]))

    with pytest.raises(ModelError, match=r"no linear layer is called 'experts\.down_proj'"):
        adapter_shapes(small_model("llama", **LIVELY), adapter)


def test_experts_inputs_are_in_the_estimate(small_model: Make, samples: Samples) -> None:
    """What autograd keeps of a layer whose experts are adapted is no more than estimated."""
    from qlora_contract.memory import activation_bytes

    found, adapter = [], Adapter.model_validate(adapter_of(TARGETS["both, and attention"]) | {"rank": 1})
    for layers in (2, 4):
        folder = small_model(
            "gpt_oss", **LIVELY, num_hidden_layers=layers, layer_types=["full_attention"] * layers
        )
        model = load_model(folder, Unquantized(), torch.float32)
        model.graph.train()
        method_for(adapter).attach(model, seed=0, dropout=None)
        kept: dict[int, int] = {}
        own = {t.untyped_storage().data_ptr() for t in (*model.graph.parameters(), *model.graph.buffers())}

        def note(tensor: Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            states = model.hidden_states(collate(samples, range(len(samples))))
        assert states.requires_grad
        found.append(sum(kept.values()))
    estimated = activation_bytes(model_shape(folder, adapter), len(samples.ids), "fp32", "none") / 2

    assert 0.66 * estimated <= found[1] - found[0] <= estimated


def test_names_of_parameters() -> None:
    """What is in one parameter of transformers' is told by the path."""
    path = "model.layers.0.mlp.experts"

    assert parameter_and_number(f"{path}.3.up_proj") == (f"{path}.gate_up_proj", 3)
    assert parameter_and_number(f"{path}.11.down_proj") == (f"{path}.down_proj", 11)
    assert parameter_and_number("model.layers.0.mlp.down_proj") is None


def test_the_file_says_which_parameters(small_model: Make, tmp_path: Path) -> None:
    """As PEFT's configuration does."""
    _, parameters, written = with_adapter(
        small_model("gpt_oss", **LIVELY), ["q_proj", "experts.down_proj"], tmp_path / "job"
    )
    config = json.loads((written / "adapter_config.json").read_text())

    assert (config["target_modules"], config["target_parameters"]) == (["q_proj"], ["experts.down_proj"])
    assert f"{PEFT_PREFIX}model.layers.0.mlp.experts.lora_B.weight" in parameters.published()
