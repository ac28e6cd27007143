"""The finished adapter: PEFT's format, a model card, a report, a curve.

It is written under a temporary name, reloaded from there and evaluated by the
caller, and only then published.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from qlora_contract import places
from qlora_contract.run import RunConfig
from qlora_trainer import storage
from qlora_trainer.adapter import AdapterParameters
from qlora_trainer.errors import ConfigurationError, TrainerError
from qlora_trainer.storage import JobFolder, storing

PEFT_PREFIX = "base_model.model."


def staging(folder: JobFolder) -> Path:
    """Where the adapter is until it is published."""
    return folder.path / f".{places.ADAPTER}.{folder.run.job.uid}-{folder.run.job.attempt}.tmp"


def write_adapter(folder: JobFolder, parameters: AdapterParameters, base: str) -> Path:
    """Write weights and configuration as PEFT does, into the staging folder.

    Args:
        folder: the job's.
        parameters: the adapters.
        base: what `base_model_name_or_path` shall say.
    """
    stage = staging(folder)
    shutil.rmtree(stage, ignore_errors=True)
    tensors = {f"{PEFT_PREFIX}{name}": p.data for name, p in parameters.named.items()}
    with storing(f"writing the adapter to {folder.path}"):
        stage.mkdir(parents=True)
        storage.save_tensors(tensors, stage / places.ADAPTER_WEIGHTS, {"format": "pt"})
        config = json.dumps(peft_config(folder.run, parameters, base), indent=2)
        (stage / places.ADAPTER_CONFIG).write_text(config)
    return stage


def peft_config(run: RunConfig, parameters: AdapterParameters, base: str) -> dict[str, Any]:
    """adapter_config.json. Written by hand: to import peft is to import every quantiser that is installed."""
    layers = [n.removesuffix(".lora_A.weight") for n in parameters.named if n.endswith(".lora_A.weight")]
    every = "all-linear" in run.adapter.target_modules
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": run.fetched.model if run.model.source.startswith("hf://") else None,
        "r": run.adapter.rank,
        "lora_alpha": run.adapter.alpha,
        "lora_dropout": run.adapter.dropout,
        "target_modules": sorted(
            {n.rpartition(".")[2] for n in layers} if every else run.adapter.target_modules
        ),
        "bias": "none",
        "inference_mode": True,
    }


def reload_adapter(stage: Path, parameters: AdapterParameters) -> None:
    """Put the written weights in the place of the trained ones: what is evaluated next is what was written.

    Raises:
        TrainerError: when the file does not hold exactly the adapter's tensors.
    """
    tensors = {k.removeprefix(PEFT_PREFIX): t for k, t in load_file(stage / places.ADAPTER_WEIGHTS).items()}
    if tensors.keys() != parameters.named.keys():
        raise TrainerError(f"{stage} does not hold the tensors that were written to it")
    for name, parameter in parameters.named.items():
        parameter.data.copy_(tensors[name])


def publish(folder: JobFolder, stage: Path, report: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    """Add card, report and curve to the staged adapter, and make it the job's adapter if the fence allows.

    Args:
        folder: the job's.
        stage: what write_adapter made.
        report: training_report.json.
        steps: the lines of metrics.jsonl.
    """
    text = json.dumps(report, indent=1)
    with storing(f"publishing the adapter to {folder.adapter}"):
        (stage / "README.md").write_text(model_card(folder.run, report))
        (stage / places.TRAINING_REPORT).write_text(text)
        loss_curve(steps, report, stage / places.LOSS_CURVE)
        storage.publish_folder(stage, {"sha256": storage.sha256(stage / places.ADAPTER_WEIGHTS)})
        folder.check_fence()
        storage.replace_folder(stage, folder.adapter)
        shutil.copyfile(folder.adapter / places.LOSS_CURVE, folder.path / places.LOSS_CURVE)
    # The last file, since the job counts as done from here on.
    storage.write_atomically(folder.path / places.TRAINING_REPORT, text)


def discard(folder: JobFolder) -> None:
    """Remove a staged adapter that will not be published."""
    shutil.rmtree(staging(folder), ignore_errors=True)


def model_card(run: RunConfig, report: dict[str, Any]) -> str:
    """README.md of the adapter, with the metadata that model hubs read."""
    base = report["provenance"]["base_model"]
    revision = f" at {run.fetched.model}" if run.fetched.model else ""
    rows = [
        ("Base, unquantised", report["base_eval_loss"]),
        ("Base, as trained on", report["base_eval_loss_quantized"]),
        ("With this adapter", report["eval_loss"]),
    ]
    table = "\n".join(f"| {name} | {'not measured' if v is None else f'{v:.4f}'} |" for name, v in rows)
    adapter, training = run.adapter, run.training
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
pipeline_tag: text-generation
tags: [lora, qlora, cpu]
---

# {run.job.name}

A LoRA adapter for `{base}`{revision}, trained on CPUs by qlora-operator.

| Evaluation loss | |
| --- | --- |
{table}

- adapter: rank {adapter.rank}, alpha {adapter.alpha:g}, dropout {adapter.dropout:g},
  on {", ".join(adapter.target_modules)}
- base weights: {run.quantization.scheme}, computed in {report["compute_dtype"]}
- {report["steps"]} steps of at most {training.global_batch_tokens} tokens, {report["tokens"]} tokens in all,
  learning rate {training.learning_rate:g} ({training.schedule}), seed {training.seed}

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""


def loss_curve(steps: list[dict[str, Any]], report: dict[str, Any], path: Path) -> None:
    """Draw training and evaluation loss over the steps as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    trained = [(m["step"], m["loss"]) for m in steps if m.get("loss") is not None]
    evaluated = [(m["step"], m["eval_loss"]) for m in steps if m.get("eval_loss") is not None]
    axes.plot(*zip(*trained, strict=True), label="training", linewidth=1.2)
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", label="evaluation", markersize=4)
    if report["base_eval_loss"] is not None:
        axes.axhline(
            report["base_eval_loss"], linestyle="--", color="gray", label="evaluation, unquantised base"
        )
    axes.set(xlabel="step", ylabel="loss per supervised token", title=path.parent.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def check_adapter(folder: Path) -> str:
    """sha256 of a published adapter's weights.

    Raises:
        ConfigurationError: the folder is not whole.
    """
    manifest = storage.read_manifest(folder)
    if manifest is None:
        raise ConfigurationError(f"{folder} is not a whole published adapter")
    return str(manifest["sha256"])
