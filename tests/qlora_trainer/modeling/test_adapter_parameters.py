"""Parameters as views of one flat buffer."""

import pytest
import torch

from qlora_trainer.modeling.adapter_parameters import ALIGNMENT, checksum, flat_parameters

pytestmark = pytest.mark.process

SHAPES = {"a.A": (3, 64), "a.B": (10, 3), "b.A": (3, 5), "b.B": (7, 3), "c": (1,), "d": (2, 3, 4)}
"""Some are multiples of the alignment, some are not."""


def test_views_are_aligned_disjoint_and_complete() -> None:
    """Parameters start at multiples of ALIGNMENT and do not overlap; all, and the padding between them, are zero."""
    parameters = flat_parameters(SHAPES)
    base, taken = parameters.flat.data_ptr(), torch.zeros(parameters.flat.numel(), dtype=torch.int64)
    for name, parameter in parameters.named.items():
        start = (parameter.data_ptr() - base) // 4
        assert parameter.shape == SHAPES[name]
        assert start % ALIGNMENT == 0
        taken[start : start + parameter.numel()] += 1

    assert list(parameters.named) == list(SHAPES)
    assert int(taken.max()) == 1
    assert int(taken.sum()) == 3 * 64 + 10 * 3 + 3 * 5 + 7 * 3 + 1 + 24
    assert not parameters.flat.detach().any()


def test_gradients_are_views_of_one_buffer() -> None:
    """Backward adds into the flat gradient in place, at the parameter's own place."""
    parameters = flat_parameters(SHAPES)
    gradient = parameters.gradient
    for parameter in parameters.named.values():
        for _ in range(2):
            parameter.sum().backward()  # type: ignore[no-untyped-call]

    assert parameters.gradient is gradient
    assert float(gradient.sum()) == 2 * sum(p.numel() for p in parameters.named.values())
    for parameter in parameters.named.values():
        assert parameter.grad is not None
        assert bool((parameter.grad == 2).all())


def test_any_changed_bit_changes_the_checksum() -> None:
    """Of the least number, and its sign, too; and it is exact as a double."""
    parameters = flat_parameters(SHAPES)
    flat = parameters.flat.data
    flat.normal_(generator=torch.Generator().manual_seed(0))
    before = checksum(parameters)
    bits = flat.view(torch.int32)
    for place, bit in ((0, 0), (17, 31), (len(flat) - 1, 12)):
        bits[place] ^= -(2**31) if bit == 31 else 1 << bit
        assert checksum(parameters) != before
        bits[place] ^= -(2**31) if bit == 31 else 1 << bit

    assert checksum(parameters) == before
    assert int(float(before)) == before
