"""The kernels of quantised weights: the one place that says which implementation runs.

There is one so far, plain torch. A compiled one is chosen here by what the
processor has and by the weight's shape, never by timing it in the run: the choice
must be the same after a restart.
"""

import logging

from qlora_trainer.kernels.reference import dequantise

__all__ = ["dequantise", "log_choice", "name"]

_logger = logging.getLogger(__name__)


def name() -> str:
    """The implementation in use; a checkpoint records it, since a resume is bit-exact only under the same."""
    return "reference"


def log_choice() -> None:
    """Log which implementation runs, and why."""
    _logger.info("kernels: %s (plain torch; no compiled kernels are installed)", name())
