"""The kernel library's passes on tensors of torch.

What each computes is said where its twin in plain torch is (`layers`, `attention`, `loss`, `lora_linear`); here are
pointers, strides and threads. Activations are stored as they come, in fp32 or bf16, and computed with in fp32. What
comes out does not depend on the number of threads.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_trainer.kernels import library
from qlora_trainer.quantization.kernels import usable

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What activations may be stored as, by the library's number."""

ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
"""What gates may go through, by transformers' name and the library's number."""

_pointer, _integer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


def passes_for(*tensors: Tensor) -> "Passes | None":
    """The passes, where they can take these tensors: all fp32 or all bf16. None where plain torch is to compute."""
    kernels = usable()
    dtype = tensors[0].dtype
    if kernels is None or dtype not in _TYPES or any(t.dtype != dtype for t in tensors):
        return None
    return _bound(kernels)


class _Rows(ctypes.Structure):
    """Attention::Rows of csrc/passes.hpp."""

    _fields_ = (("data", _pointer), ("head", _integer), ("token", _integer))


class _Attention(ctypes.Structure):
    """Attention of csrc/passes.hpp."""

    _fields_ = (
        *((name, _int) for name in ("type", "heads", "key_heads", "head_size")),
        ("tokens", _integer), ("window", _integer), ("scale", _float), ("softcap", _float),
        *((name, _Rows) for name in ("query", "key", "value", "gradient")),
        *((name, _pointer) for name in ("output", "statistics", "dquery", "dkey", "dvalue")),
    )  # fmt: skip


@dataclass(frozen=True)
class AttentionSettings:
    """What an attention's forward and backward pass have in common."""

    lengths: Sequence[int]
    """Tokens of each sample, in order."""
    window: int | None
    """Tokens that a token sees, itself included; None: all before it in its sample."""
    scale: float
    """Factor of the scores."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap); None: they stay."""
    sinks: Tensor | None = None
    """(heads,): a further score of each row, which only takes its share of the probabilities; None: there is none. Not
    for the passes: modeling.attention adds it to what they return."""


class Passes:
    """The functions of a library, with tensors for arguments; every result is fresh memory, in its inputs' dtype."""

    def __init__(self, kernels: library.Library) -> None:
        p, n, i, f = _pointer, _integer, _int, _float
        self._rms_norm = kernels.function("rms_norm", i, i, p, p, p, p, n, n, f)
        self._rms_norm_grad = kernels.function("rms_norm_grad", i, i, p, p, p, p, p, n, n)
        self._gated = kernels.function("gated", i, i, p, p, p, n)
        self._gated_grad = kernels.function("gated_grad", i, i, p, p, p, p, p, n)
        self._attention = kernels.function("attention", p, p, n)
        self._attention_grad = kernels.function("attention_grad", p, p, n)
        self._cross_entropy = kernels.function("cross_entropy", i, p, p, p, p, n, n, i)
        self._dropout = kernels.function("dropout", i, p, p, ctypes.c_uint64, ctypes.c_uint32, f, n, n, i)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """(..., size), (size,) -> y (..., size), and what x is multiplied by, fp32 (..., 1).

        The weight is of x's dtype or fp32.
        """
        x, weight = x.contiguous(), weight.contiguous()
        size = x.shape[-1]
        y, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        self._rms_norm(
            torch.get_num_threads(), _TYPES[x.dtype], _TYPES[weight.dtype], x.data_ptr(), weight.data_ptr(),
            y.data_ptr(), scale.data_ptr(), scale.numel(), size, epsilon,
        )  # fmt: skip
        return y, scale

    def rms_norm_grad(self, x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor) -> Tensor:
        """The gradient of x (..., size)."""
        x, weight, dy = x.contiguous(), weight.contiguous(), dy.contiguous()
        dx = torch.empty_like(x)
        self._rms_norm_grad(
            torch.get_num_threads(), _TYPES[x.dtype], _TYPES[weight.dtype], x.data_ptr(), weight.data_ptr(),
            scale.data_ptr(), dy.data_ptr(), dx.data_ptr(), scale.numel(), x.shape[-1],
        )  # fmt: skip
        return dx

    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """Two of one shape -> one of it. `activation`: of ACTIVATIONS."""
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        self._gated(
            torch.get_num_threads(), _TYPES[y.dtype], ACTIVATIONS[activation], gate.data_ptr(), up.data_ptr(),
            y.data_ptr(), y.numel(),
        )  # fmt: skip
        return y

    def gated_grad(self, gate: Tensor, up: Tensor, dy: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up."""
        gate, up, dy = gate.contiguous(), up.contiguous(), dy.contiguous()
        dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
        self._gated_grad(
            torch.get_num_threads(), _TYPES[dy.dtype], ACTIVATIONS[activation], gate.data_ptr(), up.data_ptr(),
            dy.data_ptr(), dgate.data_ptr(), dup.data_ptr(), dy.numel(),
        )  # fmt: skip
        return dgate, dup

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings
    ) -> tuple[Tensor, Tensor]:
        """Packed causal attention.

        Args:
            query: (1, heads, tokens, head size), however it lies in memory.
            key: (1, key heads, tokens, head size); so is value.
            value: see key.
            settings: lengths sum to tokens.

        Returns:
            (1, tokens, heads, head size), and statistics of the rows of scores for the backward pass, fp32
            (2, heads, tokens).
        """
        _, heads, tokens, size = query.shape
        query, key, value = (_dense_rows(x) for x in (query, key, value))
        output = query.new_empty(1, tokens, heads, size)
        statistics = torch.empty(2, heads, tokens, dtype=torch.float32)
        call = _call(query, key, value, output, statistics, settings)
        self._attention(
            torch.get_num_threads(), ctypes.byref(call), _lengths(settings), len(settings.lengths)
        )
        return output, statistics

    def attention_grad(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        statistics: Tensor,
        gradient: Tensor,
        settings: AttentionSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of query, key and value, from that of the output: (1, tokens, heads, head size)."""
        query, key, value, gradient = (_dense_rows(x) for x in (query, key, value, gradient))
        call = _call(query, key, value, output, statistics, settings)
        call.gradient = _rows(gradient.transpose(1, 2))
        # Tokens first in memory, as the layers before have them.
        grads = [
            torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format)
            for x in (query, key, value)
        ]
        call.dquery, call.dkey, call.dvalue = (x.data_ptr() for x in grads)
        self._attention_grad(
            torch.get_num_threads(), ctypes.byref(call), _lengths(settings), len(settings.lengths)
        )
        dquery, dkey, dvalue = (x.transpose(1, 2) for x in grads)
        return dquery, dkey, dvalue

    def cross_entropy(self, logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
        """The loss of each row.

        Args:
            logits: (rows, words), contiguous; with `gradient` they become probabilities less 1 at the target, in place.
            targets: (rows,) int64.
            gradient: whether they are wanted.

        Returns:
            (rows,) fp32.
        """
        rows, words = logits.shape
        total, distance = (torch.empty(rows, dtype=torch.float32) for _ in range(2))
        self._cross_entropy(
            torch.get_num_threads(), _TYPES[logits.dtype], logits.data_ptr(), targets.data_ptr(), total.data_ptr(),
            distance.data_ptr(), rows, words, gradient,
        )  # fmt: skip
        return total.log_().add_(distance)

    def dropout(self, x: Tensor, y: Tensor, key: int, threshold: int, factor: float, *, add: bool) -> None:
        """A bin's y = mask * x, or y += mask * x, all contiguous (rows, columns): see lora_linear.Mask."""
        rows, columns = x.shape
        self._dropout(
            torch.get_num_threads(), _TYPES[x.dtype], x.data_ptr(), y.data_ptr(), key, threshold, factor, rows, columns,
            add,
        )  # fmt: skip


@functools.cache
def _bound(kernels: library.Library) -> Passes:
    return Passes(kernels)


def _dense_rows(x: Tensor) -> Tensor:
    """The same numbers, a head's row of them side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> _Rows:
    """(1, heads, tokens, head size), dense rows."""
    return _Rows(x.data_ptr(), x.stride(1), x.stride(2))


def _lengths(settings: AttentionSettings) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * len(settings.lengths))(*settings.lengths)


def _call(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, statistics: Tensor, settings: AttentionSettings
) -> _Attention:
    """What both passes are told."""
    _, heads, tokens, size = query.shape
    return _Attention(
        type=_TYPES[query.dtype],
        heads=heads,
        key_heads=key.shape[1],
        head_size=size,
        tokens=tokens,
        window=settings.window or 0,
        scale=settings.scale,
        softcap=settings.softcap or 0.0,
        query=_rows(query),
        key=_rows(key),
        value=_rows(value),
        output=output.data_ptr(),
        statistics=statistics.data_ptr(),
    )
