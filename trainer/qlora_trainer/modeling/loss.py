"""Cross-entropy of the output head, on supervised rows only, in chunks.

The logits of a batch are often its largest tensor (tokens x vocabulary). Only
rows that are supervised are computed, a chunk at a time, and the gradient with
respect to the hidden states is made in the same pass, while the chunk's
probabilities are there (as Liger kernels do); the head is frozen and needs
none. The head may be stored in a narrower type than the one computed in; no
wide copy of it exists.

With the kernel library, the head is widened as it is multiplied with; logits
stay in the compute dtype, as the product made them, and one pass turns them
into losses and gradients in place. In plain torch the head is widened in
slices, and every operator passes over wide logits again.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qlora_contract.memory import LOGITS_BYTES
from qlora_trainer.data.collate import pad_multiple
from qlora_trainer.modeling.passes import passes_for
from qlora_trainer.quantization.kernels import tensor_weight

SLICE_BYTES = 32 * 2**20
"""Size of one widened slice of the head, at most, in plain torch."""


def summed_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None = None
) -> Tensor:
    """Sum over rows of -log softmax(hidden @ head.T)[target].

    Args:
        hidden: (rows, hidden size), in the compute dtype.
        head: (vocabulary, hidden size), frozen, in any float dtype.
        targets: (rows,) int64.
        softcap: logits l become softcap * tanh(l / softcap), in fp32; None: they stay.

    Returns:
        A scalar in fp64; 0 for no rows.
    """
    result: Tensor = _SummedCrossEntropy.apply(hidden, head, targets, softcap)
    return result


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        supervised, multiple = len(targets), pad_multiple(hidden.dtype)
        padding = -supervised % multiple
        hidden = F.pad(hidden, (0, 0, 0, padding))
        targets = F.pad(targets, (0, padding))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(targets))
        rows = max(multiple, LOGITS_BYTES // (4 * head.shape[0]) // multiple * multiple)
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            passes = passes_for(hidden)
            wide = passes is None or softcap is not None
            logits = head_logits(hidden[chunk], head, torch.float32 if wide else hidden.dtype)
            slope = None if softcap is None else cap(logits, softcap)
            if passes is None:
                losses[chunk] = _losses_then_gradient(logits, targets[chunk])
            else:
                losses[chunk] = passes.cross_entropy(logits, targets[chunk], gradient is not None)
            if gradient is not None:
                if slope is not None:
                    logits.mul_(slope)
                gradient[chunk] = _times_head(logits.to(hidden.dtype), head)
        ctx.gradient = None if gradient is None else gradient[:supervised]
        return losses[:supervised].sum(dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = ctx.gradient
        ctx.gradient = None
        # A plain number: as one of bf16 it would put all gradients of a step off by up to 0.2 %.
        return gradient.mul_(float(grad_outputs[0])), None, None, None


def _slices(head: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head (vocabulary, hidden size) in `dtype`, whole or in widened slices: (words, (words, hidden size))."""
    rows = head.shape[0]
    step = rows if head.dtype == dtype else max(1, SLICE_BYTES // (head.shape[1] * dtype.itemsize))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        yield part, head[part].to(dtype)


def head_logits(hidden: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, hidden size), (vocabulary, hidden size) -> (rows, vocabulary), stored as `dtype`."""
    weight = tensor_weight(head, hidden.dtype)
    # A single row, as when answers are made, is as fast as memory is: nothing pays for strips.
    if weight is not None and (len(hidden) > 1 or head.dtype != hidden.dtype):
        return weight.linear(hidden, None).to(dtype)
    if head.dtype == hidden.dtype == dtype:
        return hidden @ head.t()
    logits = torch.empty(hidden.shape[0], head.shape[0], dtype=dtype)
    for part, wide in _slices(head, hidden.dtype):
        logits[:, part] = hidden @ wide.t()
    return logits


def cap(logits: Tensor, softcap: float) -> Tensor:
    """Logits l become softcap * t, t = tanh(l / softcap), in place; returned is the slope 1 - t^2, as large."""
    tanh = logits.div_(softcap).tanh_()
    slope = tanh.square().neg_().add_(1)
    tanh.mul_(softcap)
    return slope


def _losses_then_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (rows, vocabulary), targets (rows,) -> losses (rows,), all fp32; the logits become p - onehot in place."""
    at_target = logits.gather(1, targets[:, None]).squeeze(1)
    top = logits.amax(dim=1, keepdim=True)
    logits.sub_(top).exp_()
    total = logits.sum(dim=1, keepdim=True)
    logits.div_(total)
    logits.scatter_add_(1, targets[:, None], torch.full((len(targets), 1), -1.0))
    return total.squeeze(1).log_().add_(top.squeeze(1)).sub_(at_target)


def _times_head(dlogits: Tensor, head: Tensor) -> Tensor:
    """d(sum of losses)/d(hidden) = (p - onehot) @ head: (rows, vocabulary) -> (rows, hidden size)."""
    weight = tensor_weight(head, dlogits.dtype)
    if weight is not None:
        return weight.linear_grad_input(dlogits)
    out = dlogits.new_zeros(len(dlogits), head.shape[1])
    for part, wide in _slices(head, out.dtype):
        out.addmm_(dlogits[:, part], wide)
    return out
