"""AWQ in AutoAWQ's layout `gemm`: 4-bit integers of (in, out), eight columns a word in an order of their own."""

from functools import partial

from torch import Tensor

from qlora_trainer.modeling.stored.format import Format, Parts, Settings, unpack_bits

ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where, from the lowest bits on, each of a word's eight columns is."""


def matches(settings: Settings) -> Format | str | None:
    """The form that quant_method `awq` names."""
    if settings.get("quant_method") != "awq":
        return None
    bits, layout = settings.get("bits", 4), str(settings.get("version", "gemm")).lower()
    if bits != 4 or layout != "gemm":
        return f"AWQ of {bits} bits in the layout {layout!r}; 4 bits in gemm are read"
    group = settings.get("group_size", 128)
    return Format(
        description=f"AWQ, 4 bits in groups of {group}",
        dequantize=partial(dequantize, group_size=group),
        parts={".qweight": "codes", ".qzeros": "zeros", ".scales": "scales"},
    )


def dequantize(parts: Parts, group_size: int) -> Tensor:
    """(code - zero) * scale in float32, (out, in)."""
    codes, zeros, scales = _columns(parts["codes"]), _columns(parts["zeros"]), parts["scales"].float()
    in_, out = codes.shape
    size = in_ if group_size <= 0 else group_size
    if zeros.shape != scales.shape or scales.shape != (-(-in_ // size), out):
        raise ValueError(
            f"scales {list(scales.shape)} and zeros {list(zeros.shape)} of a weight of {[out, in_]} in groups of {size}"
        )
    weight = codes.sub_(zeros.repeat_interleave(size, 0)[:in_]).float()
    weight.mul_(scales.repeat_interleave(size, 0)[:in_])
    return weight.t().contiguous()


def _columns(packed: Tensor) -> Tensor:
    """int32 (rows, n) -> int32 (rows, 8 n), in order."""
    words = unpack_bits(packed, 4).view(packed.shape[0], -1, 8)
    return words[..., ORDER].reshape(packed.shape[0], -1)
