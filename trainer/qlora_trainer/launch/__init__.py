"""The launcher, one per pod: starts the ranks on their CPUs, supervises them, reports how they ended.

    python -m qlora_trainer.launch

Nothing here imports torch: thread counts, affinity and the allocator must be set before torch is loaded.
"""
