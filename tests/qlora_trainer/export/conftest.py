"""Adapters of small models, as PEFT writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exported import stock_model


@pytest.fixture
def an_adapter(tmp_path: Path) -> Callable[..., Path]:
    """make(model, scale=1.0, targets="all-linear", **settings of peft's) -> a random adapter's folder, by peft."""

    def make(
        model: Path, *, scale: float = 1.0, targets: str | list[str] = "all-linear", **settings: Any
    ) -> Path:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        base = stock_model(model)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
        wrapped = get_peft_model(base, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05 * scale)
        folder = tmp_path / f"adapter{len(list(tmp_path.iterdir()))}"
        wrapped.save_pretrained(folder)
        return folder

    return make
