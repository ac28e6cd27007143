"""Workspaces with a model and a job that has learned something: what tests of asking it share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import builders
from qlora_contract.files import sha256
from qlora_contract.job_folder import ADAPTER_WEIGHTS, TRAINING_REPORT, adapter_uri
from qlora_contract.paths import resolve
from qlora_contract.run_config import RunConfig
from qlora_trainer.artifacts import checkpoint
from qlora_trainer.artifacts.adapter import write_adapter
from qlora_trainer.artifacts.checkpoint import LoopState
from qlora_trainer.data.chat_template import ChatTemplate
from qlora_trainer.modeling.adapter_methods import method_for
from qlora_trainer.modeling.adapter_parameters import AdapterParameters
from qlora_trainer.modeling.loading import load_model
from qlora_trainer.modeling.weight_files import WeightsHash
from qlora_trainer.quantization.schemes import Unquantized
from qlora_trainer.storage.atomic import replace_folder, seal_folder
from qlora_trainer.storage.job_folder import JobFolder
from qlora_trainer.training.inputs import template_settings

CLAIM = "team"


def write_model(folder: Path, tokenizer: Any, **config: Any) -> Path:
    """A model of two layers with lively weights, and its tokenizer."""
    torch.manual_seed(0)
    known = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.12,
        "max_position_embeddings": 512,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**known | config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def a_chat_run(**fields: Any) -> RunConfig:
    """A job on the claim CLAIM, whose model is its folder `model`; in fp32, its base unquantized."""
    known = {
        "version": 2,
        "job": {"name": "assistant"},
        "workspace": f"pvc://{CLAIM}/work",
        "model": {"source": f"pvc://{CLAIM}/model"},
        "dataset": {"source": f"pvc://{CLAIM}/data.jsonl", "format": "chat"},
        "adapter": {"rank": 4, "alpha": 8.0},
        "quantization": {"scheme": "none"},
        "training": {"computeDtype": "fp32"},
    }
    return builders.a_run(**builders.merged(known, fields))


class TrainedJob:
    """A job's folder in a claim, and what is in it."""

    def __init__(self, root: Path, run: RunConfig) -> None:
        self.root = root
        self.run = run
        self.volumes = {CLAIM: root}
        self.folder = JobFolder(resolve(f"{run.workspace}/jobs/{run.job.name}", self.volumes), run)
        self.folder.acquire()
        self.run_file = self.folder.path / "run.json"
        self.run_file.write_text(run.to_json())

    @property
    def model_folder(self) -> Path:
        """The base."""
        return self.root / "model"

    def adapter(self, seed: int) -> tuple[AdapterParameters, str]:
        """A random adapter that changes much, and the hash of its base's weights."""
        weights = WeightsHash(1)
        model = load_model(self.model_folder, Unquantized(), torch.float32, weights_hash=weights)
        parameters = method_for(self.run.adapter).attach(model, seed=0, dropout=None)
        generator = torch.Generator().manual_seed(seed)
        parameters.flat.data.copy_(torch.randn(parameters.flat.shape, generator=generator) * 0.3)
        return parameters, weights.hexdigest()

    def save_checkpoint(self, tokenizer: Any, step: int, **state: Any) -> Path:
        """A checkpoint after so many steps; each has another adapter."""
        parameters, weights = self.adapter(step)
        settings = template_settings(self.run.dataset, tokenizer, self.folder.began(), ())
        digests = {"chat template": ChatTemplate(tokenizer, settings).digest()}
        optimizer = torch.optim.AdamW([parameters.flat])
        known: dict[str, Any] = {"step": step, "weights_sha256": weights, "token_digests": digests}
        return checkpoint.save(self.folder, parameters, optimizer, LoopState(**known | state), keep=9)

    def finish(self, template: str | None, seed: int = 1, **report: Any) -> Path:
        """The finished adapter, with the chat template that it was trained with."""
        parameters, weights = self.adapter(seed)
        staged = write_adapter(self.folder, parameters, None, template)
        seal_folder(staged, {"sha256": sha256(staged / ADAPTER_WEIGHTS)})
        replace_folder(staged, self.folder.adapter)
        known = {"steps": 7, "provenance": {"weights_sha256": weights}}
        (self.folder.path / TRAINING_REPORT).write_text(json.dumps(known | report))
        assert resolve(adapter_uri(self.run), self.volumes) == self.folder.adapter
        return self.folder.adapter


MakeJob = Callable[..., TrainedJob]
