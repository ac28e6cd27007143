"""The trainer: quantised LoRA fine-tuning on CPUs, one process per rank."""
