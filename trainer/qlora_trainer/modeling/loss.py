"""Cross-entropy of the output head, on supervised rows only, in chunks.

The logits of a batch are often its largest tensor (tokens x vocabulary). Only
rows that are supervised are computed, a chunk at a time, and the gradient with
respect to the hidden states is made in the same pass, while the chunk's
probabilities are there (as Liger kernels do); the head is frozen and needs
none. The head may be stored in a narrower type than the one computed in; it is
widened in slices, so that no wide copy of it exists.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qlora_trainer.data.collate import pad_multiple

LOGITS_BYTES = 64 * 2**20
"""Size of the fp32 logits of one chunk, at most."""
SLICE_BYTES = 32 * 2**20
"""Size of one widened slice of the head, at most."""


def summed_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of -log softmax(hidden @ head.T)[target].

    Args:
        hidden: (rows, hidden size), in the compute dtype.
        head: (vocabulary, hidden size), frozen, in any float dtype.
        targets: (rows,) int64.

    Returns:
        A scalar in fp64; 0 for no rows.
    """
    result: Tensor = _SummedCrossEntropy.apply(hidden, head, targets)
    return result


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        supervised, multiple = len(targets), pad_multiple(hidden.dtype)
        padding = -supervised % multiple
        hidden = F.pad(hidden, (0, 0, 0, padding))
        targets = F.pad(targets, (0, padding))
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(targets))
        rows = max(multiple, LOGITS_BYTES // (4 * head.shape[0]) // multiple * multiple)
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            logits = _logits(hidden[chunk], head)
            losses[chunk] = _losses_then_probabilities(logits, targets[chunk])
            if gradient is not None:
                _gradient(logits, targets[chunk], head, gradient[chunk])
        ctx.gradient = None if gradient is None else gradient[:supervised]
        return losses[:supervised].sum(dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        gradient = ctx.gradient
        ctx.gradient = None
        return gradient.mul_(grad_outputs[0].to(gradient.dtype)), None, None


def _slices(head: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head (vocabulary, hidden size) in `dtype`, whole or in widened slices: (words, (words, hidden size))."""
    rows = head.shape[0]
    step = rows if head.dtype == dtype else max(1, SLICE_BYTES // (head.shape[1] * dtype.itemsize))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        yield part, head[part].to(dtype)


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """(rows, hidden size), (vocabulary, hidden size) -> fp32 (rows, vocabulary)."""
    logits = torch.empty(hidden.shape[0], head.shape[0], dtype=torch.float32)
    for part, weight in _slices(head, hidden.dtype):
        logits[:, part] = hidden @ weight.t()
    return logits


def _losses_then_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (rows, vocabulary), targets (rows,) -> losses (rows,), fp32; the logits become probabilities in place."""
    at_target = logits.gather(1, targets[:, None]).squeeze(1)
    top = logits.amax(dim=1, keepdim=True)
    logits.sub_(top).exp_()
    total = logits.sum(dim=1, keepdim=True)
    logits.div_(total)
    return total.squeeze(1).log_().add_(top.squeeze(1)).sub_(at_target)


def _gradient(probabilities: Tensor, targets: Tensor, head: Tensor, out: Tensor) -> None:
    """d(sum of losses)/d(hidden) = (p - onehot) @ head, into `out` (rows, hidden size)."""
    probabilities.scatter_add_(1, targets[:, None], torch.full((len(targets), 1), -1.0))
    narrow = probabilities.to(out.dtype)
    for part, weight in _slices(head, out.dtype):
        out.addmm_(narrow[:, part], weight)
