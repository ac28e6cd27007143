"""Configurations of other programs, which people try first: whose they are, and what their fields are called here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Program:
    """A program that trains, by its configuration."""

    name: str
    needs: frozenset[str]
    """Fields that every one of its configurations has."""
    among: frozenset[str]
    """It has one of these, too."""
    ours: Mapping[str, str]
    """Some of its fields, and what they are called in a QLoRAJob's spec."""


_COMMON = {
    "learning_rate": "training.learningRate",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.maxSteps",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "sequence_len": "training.maxSequenceLength",
    "cutoff_len": "training.maxSequenceLength",
    "max_length": "training.maxSequenceLength",
    "max_seq_length": "training.maxSequenceLength",
}
PROGRAMS = (
    Program(
        "Axolotl",
        frozenset({"base_model"}),
        frozenset({"datasets", "sequence_len", "adapter", "micro_batch_size", "load_in_4bit"}),
        {"base_model": "model.source", "datasets": "dataset.source", **_COMMON},
    ),
    Program(
        "LLaMA-Factory",
        frozenset({"model_name_or_path"}),
        frozenset({"finetuning_type", "stage", "cutoff_len", "template"}),
        {"model_name_or_path": "model.source", "dataset": "dataset.source", **_COMMON},
    ),
    Program(
        "TRL",
        frozenset({"model_name_or_path"}),
        frozenset({"dataset_name", "datasets", "per_device_train_batch_size", "use_peft", "load_in_4bit"}),
        {"model_name_or_path": "model.source", "dataset_name": "dataset.source", **_COMMON},
    ),
)
"""Most particular first."""


def program_of(document: Mapping[Any, Any]) -> tuple[Program, list[str]] | None:
    """The program that a document configures, and those of its fields that have a counterpart here."""
    fields = {key for key in document if isinstance(key, str)}
    program = next((each for each in PROGRAMS if each.needs <= fields and each.among & fields), None)
    return None if program is None else (program, [name for name in program.ours if name in fields])


def explanation(found: tuple[Program, list[str]]) -> str:
    """Says whose configuration it is, and how to go on."""
    program, fields = found
    pairs = ", ".join(f"{name} is spec.{program.ours[name]}" for name in fields)
    article = "an" if program.name[0] in "AEIOU" else "a"
    return (
        f"this is {article} {program.name} configuration, not a QLoRAJob ({pairs}); "
        "`qlora init --model MODEL --data DATA` writes one to begin with"
    )
