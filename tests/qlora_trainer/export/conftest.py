"""Adapters of small models, as PEFT writes them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture
def an_adapter(tmp_path: Path) -> Callable[..., Path]:
    """make(model, rslora=False, scale=1.0, targets="all-linear") -> a random adapter's folder, written by peft."""

    def make(
        model: Path, *, rslora: bool = False, scale: float = 1.0, targets: str | list[str] = "all-linear"
    ) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM"
        )
        wrapped = get_peft_model(base, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05 * scale)
        folder = tmp_path / f"adapter{len(list(tmp_path.iterdir()))}"
        wrapped.save_pretrained(folder)
        return folder

    return make
