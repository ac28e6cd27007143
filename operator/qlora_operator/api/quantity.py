"""Kubernetes quantities."""

import re
from fractions import Fraction
from math import ceil

MEMORY_PATTERN = r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?$"
MAX_MEMORY_CHARACTERS = 24
MIN_MEMORY = "64Mi"
"""Less is a forgotten suffix: `16` is sixteen bytes."""
MAX_MEMORY = "64Ti"
"""More than any node has; keeps sums far below 2^63."""

_FACTORS = {
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 10**3),
    "": Fraction(1),
    **{suffix: Fraction(1000**power) for power, suffix in enumerate("kMGTPE", 1)},
    **{f"{suffix}i": Fraction(1024**power) for power, suffix in enumerate("KMGTPE", 1)},
}
# Two digits of exponent are more than 2^63 needs; more would only make numbers that fill the memory.
_QUANTITY = re.compile(
    r"(?P<number>[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+))"
    r"([eE](?P<exponent>[+-]?[0-9]{1,2})|(?P<suffix>[KMGTPE]i|[numkMGTPE]?))"
)
_MAX_CHARACTERS = 64


def parse_quantity(text: str) -> Fraction:
    """The number that a quantity in the API server's objects means, exactly: `3920m` is 3.92, `1.5Gi` 1.5 * 2^30.

    Raises ValueError for anything else.
    """
    match = _QUANTITY.fullmatch(text) if len(text) <= _MAX_CHARACTERS else None
    if match is None:
        raise ValueError(f"{text[:60]!r} is not a quantity such as 4, 3920m, 16Gi or 129e6")
    if match["exponent"]:
        return Fraction(match["number"]) * Fraction(10) ** int(match["exponent"])
    return Fraction(match["number"]) * _FACTORS[match["suffix"]]


def parse_memory(quantity: str) -> int:
    """Bytes that a user asks for, such as `16Gi`, `1.5G` or `17179869184`, rounded up as Kubernetes does.

    Raises ValueError for anything else, `m` (thousandths of a byte) and exponents included.
    """
    if len(quantity) > MAX_MEMORY_CHARACTERS or not re.fullmatch(MEMORY_PATTERN[1:-1], quantity):
        raise ValueError(f"{quantity[:60]!r} is not a quantity of memory such as 16Gi or 900M")
    return ceil(parse_quantity(quantity))


def is_plausible_memory(quantity: str) -> bool:
    """Whether a rank could have this much memory: from MIN_MEMORY to MAX_MEMORY.

    Compared as an API server compares: rounded up to 10^-9 bytes, not to whole ones.
    """
    nanos = ceil(parse_quantity(quantity) * 10**9)
    return parse_memory(MIN_MEMORY) * 10**9 <= nanos <= parse_memory(MAX_MEMORY) * 10**9
