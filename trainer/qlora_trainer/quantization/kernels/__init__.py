"""The kernels of quantized weights: the one place that says which implementation runs.

A kernel is a FrozenWeight of its own, made of the quantizer's numbers when a model is loaded: thus it may keep them in
the order that it multiplies in. There is one so far, plain torch. A compiled one is chosen here by what the processor
has, never by timing it in the run: the choice must be the same after a restart.
"""

import functools
import logging

from qlora_trainer.quantization.frozen_weight import FrozenWeight
from qlora_trainer.quantization.kernels import reference
from qlora_trainer.quantization.nf4 import Nf4Matrix

log = logging.getLogger(__name__)


@functools.cache
def name(scheme: str) -> str:
    """The implementation that multiplies with weights of a scheme on this processor: `reference` is plain torch.

    Chosen once in a process, and logged then. A checkpoint records it, since a resume is bit-exact only under the same.
    """
    log.info("kernels of %s weights: reference (plain torch; no compiled kernels are installed)", scheme)
    return "reference"


def nf4_weight(matrix: Nf4Matrix) -> FrozenWeight:
    """The weight (out, in) in the form of the implementation that runs. Takes the matrix over."""
    return reference.Nf4Weight(matrix)
