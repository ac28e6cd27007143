"""What other programs call the fields of a job, and their configurations, which people try first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIELDS = {
    "base_model": "model.source",
    "model_name": "model.source",
    "model_name_or_path": "model.source",
    "model_path": "model.source",
    "data": "dataset.source",
    "data_path": "dataset.source",
    "datasets": "dataset.source",
    "dataset_name": "dataset.source",
    "train_dataset": "dataset.source",
    "train_file": "dataset.source",
    "output_dir": "workspace",
    "test_size": "dataset.evalFraction",
    "val_set_size": "dataset.evalFraction",
    "val_size": "dataset.evalFraction",
    "lr": "training.learningRate",
    "lr_scheduler": "training.schedule",
    "lr_scheduler_type": "training.schedule",
    "scheduler": "training.schedule",
    "warmup": "training.warmupRatio",
    "warmup_steps": "training.warmupRatio",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "iterations": "training.maxSteps",
    "num_steps": "training.maxSteps",
    "steps": "training.maxSteps",
    "batch_size": "training.globalBatchTokens",
    "gradient_accumulation_steps": "training.globalBatchTokens",
    "micro_batch_size": "training.globalBatchTokens",
    "per_device_train_batch_size": "training.globalBatchTokens",
    "context_length": "training.maxSequenceLength",
    "cutoff_len": "training.maxSequenceLength",
    "max_length": "training.maxSequenceLength",
    "max_seq_len": "training.maxSequenceLength",
    "max_seq_length": "training.maxSequenceLength",
    "sequence_len": "training.maxSequenceLength",
    "sample_packing": "training.packing",
    "bf16": "training.computeDtype",
    "dtype": "training.computeDtype",
    "fp16": "training.computeDtype",
    "torch_dtype": "training.computeDtype",
    "max_norm": "training.maxGradNorm",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.targetModules",
    "lora_target_modules": "adapter.targetModules",
    "use_rslora": "adapter.rslora",
    "bnb_4bit_quant_type": "quantization.scheme",
    "load_in_4bit": "quantization.scheme",
    "quantization_bit": "quantization.scheme",
    "eval_steps": "evaluation.everySteps",
    "save_steps": "checkpoint.everySteps",
    "save_total_limit": "checkpoint.keep",
    "hub_model_id": "output.destination",
    "push_to_hub": "output.destination",
    "report_to": "tracking",
    "nproc_per_node": "topology.ranksPerPod",
    "num_processes": "topology.ranksPerPod",
}
"""A field of TRL, PEFT, Axolotl, LLaMA-Factory or Unsloth -> that of a job's spec which stands for it."""
NOTES = {
    "training.globalBatchTokens": "a whole step over all ranks, in tokens",
    "training.warmupRatio": "a share of the steps",
    "output.destination": "hf://org/name",
}
"""Where a value of the others is not one here: what the field holds."""
ABSENT = {
    "device_map": "no GPU is used, and the ranks are placed by topology",
    "neftune_noise_alpha": "there is no NEFTune",
    "optim": "the optimizer is AdamW, and there is no other",
    "optimizer": "the optimizer is AdamW, and there is no other",
    "use_dora": "there is no DoRA",
    "wandb_project": "there is no Weights & Biases; tracking has MLflow and TensorBoard",
}
"""A field of theirs without a counterpart -> why."""


def folded(name: str) -> str:
    """A field's name without what spellings differ in."""
    return name.replace("_", "").replace("-", "").lower()


_FIELDS = {folded(name): path for name, path in FIELDS.items()}
_ABSENT = {folded(name): why for name, why in ABSENT.items()}


def path_here(name: str) -> str | None:
    """The field of spec that stands for another program's; None where there is none."""
    return _FIELDS.get(folded(name))


def called_here(name: str, prefix: str = "") -> str | None:
    """What stands for another program's field here, or why nothing does; None: no program is known to have it.

    Args:
        name: the field's.
        prefix: of paths, such as `spec.`.
    """
    if why := _ABSENT.get(folded(name)):
        return why
    if (path := path_here(name)) is None:
        return None
    return f"here it is {prefix}{path}" + (f" ({NOTES[path]})" if path in NOTES else "")


@dataclass(frozen=True)
class Program:
    """A program that trains, by its configuration."""

    name: str
    needs: frozenset[str]
    """Fields that every one of its configurations has."""
    among: frozenset[str]
    """It has one of these, too."""


PROGRAMS = (
    Program(
        "Axolotl",
        frozenset({"base_model"}),
        frozenset({"datasets", "sequence_len", "adapter", "micro_batch_size", "load_in_4bit"}),
    ),
    Program(
        "LLaMA-Factory",
        frozenset({"model_name_or_path"}),
        frozenset({"finetuning_type", "stage", "cutoff_len", "template"}),
    ),
    Program(
        "TRL",
        frozenset({"model_name_or_path"}),
        frozenset({"dataset_name", "datasets", "per_device_train_batch_size", "use_peft", "load_in_4bit"}),
    ),
)
"""Most particular first."""


def program_of(document: Mapping[Any, Any]) -> tuple[Program, list[str]] | None:
    """The program that a document configures, and those of its fields that have a counterpart here."""
    fields = {key for key in document if isinstance(key, str)}
    program = next((each for each in PROGRAMS if each.needs <= fields and each.among & fields), None)
    return None if program is None else (program, [name for name in FIELDS if name in fields])


def explanation(found: tuple[Program, list[str]]) -> str:
    """Says whose configuration it is, and how to go on."""
    program, fields = found
    pairs = ", ".join(f"{name} is spec.{FIELDS[name]}" for name in fields)
    article = "an" if program.name[0] in "AEIOU" else "a"
    return (
        f"this is {article} {program.name} configuration, not a QLoRAJob ({pairs}); "
        "`qlora init --model MODEL --data DATA` writes one to begin with"
    )
