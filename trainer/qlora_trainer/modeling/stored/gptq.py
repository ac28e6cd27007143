"""GPTQ, as AutoGPTQ and GPTQModel write it: integers packed down the columns, scales and zeros of groups of rows.

The packed matrices are those of x W, (in, out); graphs have (out, in).
"""

from functools import partial

from torch import Tensor

from qlora_trainer.modeling.stored.format import Format, Parts, Settings, unpack_bits

BITS = (2, 4, 8)


def matches(settings: Settings) -> Format | str | None:
    """The form that quant_method `gptq` names."""
    if settings.get("quant_method") != "gptq":
        return None
    bits, layout = settings.get("bits"), settings.get("checkpoint_format") or "gptq"
    if bits not in BITS:
        return f"GPTQ of {bits} bits; 2, 4 and 8 are read"
    if layout not in ("gptq", "gptq_v2"):
        return f"GPTQ's layout {layout!r}; gptq and gptq_v2 are read"
    return Format(
        description=f"GPTQ, {bits} bits in groups of {settings.get('group_size')}",
        dequantize=partial(dequantize, bits=bits, zero_offset=1 if layout == "gptq" else 0),
        parts={".qweight": "codes", ".qzeros": "zeros", ".scales": "scales", ".g_idx": "group of row"},
    )


def dequantize(parts: Parts, bits: int, zero_offset: int) -> Tensor:
    """(code - zero) * scale in float32, (out, in).

    The first layout stores zeros less one: less one in each field of a word, as its writers subtract, with borrows.
    """
    codes = unpack_bits(parts["codes"].t(), bits)  # (out, in)
    one_each = sum(1 << shift for shift in range(0, 31, bits))
    zeros = unpack_bits(parts["zeros"] + zero_offset * one_each, bits).t()  # (out, groups)
    scales, group = parts["scales"].float().t(), parts["group of row"].long()
    out, in_ = codes.shape
    if scales.shape[0] != out or zeros.shape != scales.shape or group.shape != (in_,):
        raise ValueError(
            f"scales {list(scales.shape)}, zeros {list(zeros.shape)} and {group.numel()} rows in groups for a weight "
            f"of {[out, in_]}"
        )
    return codes.sub_(zeros[:, group]).float().mul_(scales[:, group])
