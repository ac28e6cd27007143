"""The merged model, loaded by the programs that will load it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_folders import shard
from qlora_trainer.errors import ModelError
from qlora_trainer.export.adapter_weights import read_adapter
from qlora_trainer.export.merged import INDEX, write_merged
from qlora_trainer.export.merged_weights import plan_tensors
from qlora_trainer.modeling.families import FAMILIES, read_model

pytestmark = pytest.mark.process

IDS = torch.tensor([[5, 17, 250, 3, 99, 42]])


def merge(model: Path, adapter: Path, target: Path, **more: Any) -> Path:
    """The merged model's folder."""
    target.mkdir()
    read = read_adapter(adapter)
    write_merged(target, model, plan_tensors(model, read_model(model)[0], read), None, lambda _: None, **more)
    return target


def logits(model: Any) -> torch.Tensor:
    """Of IDS."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def by_peft(model: Path, adapter: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of stock transformers and peft: with the adapter, and without."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(base, adapter).eval()
    with wrapped.disable_adapter():
        without = logits(wrapped)
    return logits(wrapped), without


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_the_merged_model_is_the_base_with_pefts_adapter(
    kind: str, small_model: Callable[..., Path], an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Stock transformers gives the same logits for one as with peft for the other, and others than the base's."""
    from transformers import AutoModelForCausalLM

    model = small_model(kind, vocab_size=300)
    settings: dict[str, Any] = {
        "qwen3": {"use_rslora": True},
        "llama": {
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"q_proj": 3, "model.layers.1.mlp.up_proj": 40},
        },
        "qwen3_moe": {"targets": ["q_proj", "o_proj"]},
    }
    adapter = an_adapter(model, **settings.get(kind, {}))

    merged = merge(model, adapter, tmp_path / "merged")

    found = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
    expected, base = by_peft(model, adapter)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((expected - base).abs().max()) > 0.01


def test_shards_are_written_with_their_index_and_read_again(
    small_model: Callable[..., Path], an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Whatever files the base has; a tied head is not written twice, and types stay."""
    import shutil

    from transformers import AutoModelForCausalLM

    model = Path(shutil.copytree(small_model(dtype="bfloat16", vocab_size=300), tmp_path / "base"))
    adapter = an_adapter(model)
    expected, _ = by_peft(model, adapter)
    shard(model)

    merged = merge(model, adapter, tmp_path / "merged", shard_bytes=20_000)

    places = json.loads((merged / INDEX).read_text())["weight_map"]
    assert len(set(places.values())) > 3
    assert {t.dtype for file in set(places.values()) for t in load_file(merged / file).values()} == {
        torch.bfloat16
    }
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), expected, rtol=0.05, atol=0.05)


def test_tokenizer_and_template_go_along(
    small_model: Callable[..., Path], an_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """The template that was trained with is in both places where programs look for it."""
    model = small_model(vocab_size=300)
    read = read_adapter(an_adapter(model))
    target = tmp_path / "merged"
    target.mkdir()

    write_merged(target, model, plan_tensors(model, read_model(model)[0], read), "{{ mine }}", lambda _: None)

    assert {"config.json", "tokenizer.json"} <= {path.name for path in target.iterdir()}
    assert (target / "chat_template.jinja").read_text() == "{{ mine }}"
    assert json.loads((target / "tokenizer_config.json").read_text())["chat_template"] == "{{ mine }}"


def _rename(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(
        {name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"}
    )


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(("layers.1", "layers.9"), "changes 7 layers that .* does not have", id="another base"),
        pytest.param(("lora_A", "lora_E"), "is no LoRA matrix", id="something else"),
    ],
)
def test_an_adapter_of_which_something_would_be_lost_is_refused(
    damage: tuple[str, str],
    said: str,
    small_model: Callable[..., Path],
    an_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Servers pass over names that they do not know, and serve the base."""
    model = small_model(vocab_size=300)
    adapter = an_adapter(model)
    _rename(adapter, *damage)

    with pytest.raises(ModelError, match=said):
        merge(model, adapter, tmp_path / "merged")


def test_settings_that_change_the_formula_are_refused(
    small_model: Callable[..., Path], an_adapter: Callable[..., Path]
) -> None:
    """DoRA is not scale B A, and experts are no linear layers."""
    adapter = an_adapter(small_model(vocab_size=300))
    config = adapter / "adapter_config.json"
    written = json.loads(config.read_text())
    for name, value in {
        "use_dora": True,
        "target_parameters": ["experts.down_proj"],
        "trainable_token_indices": [3],
    }.items():
        config.write_text(json.dumps(written | {name: value}))

        with pytest.raises(ModelError, match=f"sets {name}, which cannot be exported"):
            read_adapter(adapter)
