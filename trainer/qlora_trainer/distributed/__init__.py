"""The ranks of a job as one group. Process groups and backends are named here and nowhere else."""

from qlora_trainer.distributed.group import Group
from qlora_trainer.distributed.world import World

__all__ = ["Group", "World"]
