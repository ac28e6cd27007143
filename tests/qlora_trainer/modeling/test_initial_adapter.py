"""Adapters to go on from, as stock peft writes them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_contract.job_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_contract.run_config import Adapter, AdapterMethodName
from qlora_trainer import smoke_model
from qlora_trainer.errors import ModelError
from qlora_trainer.modeling import initial_adapter
from qlora_trainer.modeling.adapter_parameters import PEFT_PREFIX, flat_parameters
from qlora_trainer.modeling.shape import adapter_shapes

MINE = Adapter(rank=4, alpha=8, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model."""
    folder = tmp_path_factory.mktemp("base")
    smoke_model.write(folder)
    return folder / "model"


@pytest.fixture(scope="module")
def stock(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(**fields of LoraConfig) -> the folder of an adapter that peft has saved, with no matrix of zeros."""

    def make(**fields: Any) -> Path:
        model = AutoModelForCausalLM.from_pretrained(base)
        config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | fields
        peft = get_peft_model(model, LoraConfig(init_lora_weights=False, **config))
        folder = tmp_path_factory.mktemp("adapter")
        peft.save_pretrained(folder)
        return folder

    return make


def test_training_begins_with_the_adapter_of_peft(base: Path, stock: Callable[..., Path]) -> None:
    """Every matrix is the one of the file."""
    folder, shapes = stock(), adapter_shapes(base, MINE)
    initial_adapter.check(folder, MINE, shapes)
    parameters = flat_parameters(shapes)
    digest = initial_adapter.load(folder, parameters)
    written = load_file(folder / ADAPTER_WEIGHTS)

    assert len(digest) == 64
    assert {f"{PEFT_PREFIX}{name}" for name in parameters.named} == written.keys()
    for name, parameter in parameters.named.items():
        assert torch.equal(parameter, written[f"{PEFT_PREFIX}{name}"])


@pytest.mark.parametrize(
    ("theirs", "mine", "says"),
    [
        pytest.param(
            {"r": 8}, {}, "was trained with r 8, and adapter.rank is 4: set adapter.rank to 8", id="rank"
        ),
        pytest.param({"lora_alpha": 16}, {}, "lora_alpha 16, and adapter.alpha is 8.0", id="alpha"),
        pytest.param({"use_rslora": True}, {}, "use_rslora true, and adapter.rslora is false", id="rslora"),
        pytest.param(
            {}, {"rank_pattern": {"q_proj": 2}}, "rank_pattern {}, and adapter.rankPattern", id="pattern"
        ),
        pytest.param({"use_dora": True}, {}, "has use_dora True, which cannot be trained here", id="dora"),
        pytest.param({"bias": "lora_only"}, {}, "has bias lora_only", id="bias"),
        pytest.param({"modules_to_save": ["norm"]}, {}, r"has modules_to_save \['norm'\]", id="whole-layers"),
        pytest.param(
            {"trainable_token_indices": [3, 5]},
            {},
            r"has trainable_token_indices \[3, 5\], which cannot be trained here",
            id="rows-of-the-embedding",
        ),
        pytest.param(
            {"target_modules": ["q_proj"]},
            {},
            r"lacks .*down_proj.*must name its layers \(q_proj\)",
            id="too-few-layers",
        ),
        pytest.param(
            {}, {"target_modules": ["q_proj"]}, "has .*down_proj.*, which is not trained here", id="too-many"
        ),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    base: Path, stock: Callable[..., Path], theirs: dict[str, Any], mine: dict[str, Any], says: str
) -> None:
    """The sentence names both values, and the field to change."""
    adapter = MINE.model_copy(update=mine)
    with pytest.raises(ModelError, match=rf"^adapter\.initialAdapter: .*{says}"):
        initial_adapter.check(stock(**theirs), adapter, adapter_shapes(base, adapter))


VIRTUAL = {
    "prompt-tuning": (PromptTuningConfig, {}),
    "prefix-tuning": (PrefixTuningConfig, {}),
    "projected": (PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 8}),
}


@pytest.fixture(scope="module")
def stock_tokens(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """make(one of VIRTUAL) -> the folder of an adapter of four virtual tokens that peft has saved."""

    def make(kind: str) -> Path:
        config, fields = VIRTUAL[kind]
        model = AutoModelForCausalLM.from_pretrained(base)
        folder = tmp_path_factory.mktemp("adapter")
        peft = get_peft_model(model, config(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4, **fields))
        peft.save_pretrained(folder)
        return folder

    return make


def tokens(method: AdapterMethodName, number: int = 4) -> Adapter:
    """The settings of a job with virtual tokens."""
    return Adapter(method=method, num_virtual_tokens=number)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_training_begins_with_the_virtual_tokens_of_peft(
    base: Path, stock_tokens: Callable[[str], Path], kind: str
) -> None:
    """Also with a prefix that an MLP has made: it is one like any other."""
    mine = tokens("prompt-tuning" if kind == "prompt-tuning" else "prefix-tuning")
    folder, shapes = stock_tokens(kind), adapter_shapes(base, mine)
    initial_adapter.check(folder, mine, shapes)
    parameters = flat_parameters(shapes)
    initial_adapter.load(folder, parameters)
    (written,) = load_file(folder / ADAPTER_WEIGHTS).values()

    (parameter,) = parameters.named.values()
    assert torch.equal(parameter, written)
    assert parameter.abs().min() > 0


@pytest.mark.parametrize(
    ("kind", "mine", "says"),
    [
        pytest.param(
            "prompt-tuning",
            tokens("prefix-tuning"),
            "is of the type PROMPT_TUNING, and must be PREFIX_TUNING, as adapter.method is prefix-tuning",
            id="another-method",
        ),
        pytest.param("prompt-tuning", MINE, "type PROMPT_TUNING, and must be LORA", id="no-lora"),
        pytest.param(
            "prefix-tuning",
            tokens("prefix-tuning", 5),
            "trained with num_virtual_tokens 4, .*: set adapter.numVirtualTokens to 4",
            id="another-number",
        ),
    ],
)
def test_virtual_tokens_of_another_kind_are_refused(
    base: Path, stock_tokens: Callable[[str], Path], kind: str, mine: Adapter, says: str
) -> None:
    """The sentence names both values, and the field to change."""
    with pytest.raises(ModelError, match=rf"^adapter\.initialAdapter: .*{says}"):
        initial_adapter.check(stock_tokens(kind), mine, adapter_shapes(base, mine))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(lambda t: torch.cat([t, t], dim=1), "it is of another base model", id="another-base"),
        pytest.param(None, "must hold one tensor, prompt_embeddings, and holds other", id="another-tensor"),
    ],
)
def test_virtual_tokens_that_do_not_fit_are_refused(
    base: Path,
    stock_tokens: Callable[[str], Path],
    change: Callable[[torch.Tensor], torch.Tensor] | None,
    says: str,
) -> None:
    """Of a wider model, or of a file that peft has not written."""
    folder, mine = stock_tokens("prompt-tuning"), tokens("prompt-tuning")
    (matrix,) = load_file(folder / ADAPTER_WEIGHTS).values()
    tensors = {"other": matrix} if change is None else {"prompt_embeddings": change(matrix)}
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    with pytest.raises(ModelError, match=says):
        initial_adapter.check(folder, mine, adapter_shapes(base, mine))


def test_an_adapter_of_another_base_is_refused(base: Path, stock: Callable[..., Path]) -> None:
    """Its matrices have other shapes."""
    folder = stock()
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    save_file({name: torch.cat([t, t], dim=1) for name, t in tensors.items()}, folder / ADAPTER_WEIGHTS)
    with pytest.raises(ModelError, match=r"has the shape .* it is of another base model"):
        initial_adapter.check(folder, MINE, adapter_shapes(base, MINE))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        pytest.param({}, "has no adapter_config.json: it must be the folder of an adapter", id="no-adapter"),
        pytest.param({ADAPTER_CONFIG: "{"}, "adapter_config.json cannot be read", id="damaged-configuration"),
        pytest.param({ADAPTER_CONFIG: "[]"}, "is not a JSON object", id="a-list"),
        pytest.param(
            {ADAPTER_CONFIG: '{"peft_type": "IA3"}'},
            "is of the type IA3, and must be LORA, as adapter.method is lora",
            id="another-method",
        ),
        pytest.param({ADAPTER_CONFIG: None}, "has no adapter_model.safetensors", id="no-weights"),
        pytest.param({ADAPTER_CONFIG: None, ADAPTER_WEIGHTS: "no"}, "cannot be read", id="damaged-weights"),
    ],
)
def test_a_folder_that_holds_no_adapter_is_refused(
    tmp_path: Path, files: dict[str, str | None], says: str
) -> None:
    """Whatever is missing or damaged is named."""
    good = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    for name, text in files.items():
        (tmp_path / name).write_text(good if text is None else text)
    with pytest.raises(ModelError, match=f"^adapter.initialAdapter: .*{re.escape(says)}"):
        initial_adapter.check(tmp_path, MINE, {})
