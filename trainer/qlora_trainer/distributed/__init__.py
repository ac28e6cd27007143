"""The only place where a process group or a backend is named."""

from qlora_trainer.distributed.group import Group
from qlora_trainer.distributed.world import World

__all__ = ["Group", "World"]
