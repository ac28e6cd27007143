"""Who this process is among all ranks."""

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_contract.env import RENDEZVOUS_PORT
from qlora_trainer.errors import ConfigurationError


@dataclass(frozen=True)
class World:
    """This rank's number among all, as the launcher set it in the environment."""

    rank: int
    size: int
    local_rank: int
    """Number of this rank within its pod."""
    master_addr: str
    """Name or address of rank 0's host; a name need not resolve yet."""
    master_port: int
    pod: int = 0
    """Completion index of its pod."""
    local_size: int = 1
    """Ranks of its pod."""

    @property
    def master(self) -> str:
        """Where ranks meet, as `host:port`."""
        return f"{self.master_addr}:{self.master_port}"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "World":
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, NODE_RANK, MASTER_ADDR and MASTER_PORT.

        Without WORLD_SIZE the process is alone. Raises ConfigurationError.
        """
        size = _number(environ, "WORLD_SIZE", 1, 1, 1 << 20)
        if size > 1 and not (environ.get("RANK") and environ.get("MASTER_ADDR")):
            raise ConfigurationError(f"WORLD_SIZE is {size}, so RANK and MASTER_ADDR must be set as well")
        return cls(
            rank=_number(environ, "RANK", 0, 0, size - 1),
            size=size,
            local_rank=_number(environ, "LOCAL_RANK", 0, 0, size - 1),
            master_addr=environ.get("MASTER_ADDR") or "127.0.0.1",
            master_port=_number(environ, "MASTER_PORT", RENDEZVOUS_PORT, 1, 65535),
            pod=_number(environ, "NODE_RANK", 0, 0, size - 1),
            local_size=_number(environ, "LOCAL_WORLD_SIZE", 1, 1, size),
        )


def _number(environ: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise ConfigurationError(f"{name} is {text!r}; it must be a whole number from {low} to {high}")
    return int(text)
