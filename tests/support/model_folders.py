"""Folders of models, changed and judged: what tests of reading them share."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qlora_trainer.data.collate import collate
from qlora_trainer.data.dataset import Samples
from qlora_trainer.modeling.families import WRAPPERS


def configure(folder: Path, **values: Any) -> Path:
    """Change config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def shard(folder: Path) -> Path:
    """Split model.safetensors into three files and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    places: dict[str, str] = {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        mine = names[number::3]
        save_file({n: tensors[n] for n in mine}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(mine, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def stock_model(folder: Path, **options: Any) -> Any:
    """The stock model in fp32, in the class that its users load: of a multimodal model the whole."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind in ("gemma2", "gpt_oss"):
        options["attn_implementation"] = "eager"  # the only one that caps scores, or has sinks
    loader = AutoModelForImageTextToText if kind in WRAPPERS else AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32, **options)


def by_transformers(folder: Path, samples: Samples) -> float:
    """Summed loss of the samples by the stock model in fp32, each alone."""
    model = stock_model(folder)
    total = 0.0
    for number in range(len(samples)):
        batch = collate(samples, [number])
        with torch.no_grad():
            logits = model(input_ids=batch.ids[None]).logits[0].double()
        total -= float(logits.log_softmax(-1)[batch.logit_positions, batch.targets].sum())
    return total
