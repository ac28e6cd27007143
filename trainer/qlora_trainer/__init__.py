"""The trainer: quantized LoRA fine-tuning on CPUs, one process per rank."""
