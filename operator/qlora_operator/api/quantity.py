"""Kubernetes quantities of memory."""

import re
from decimal import ROUND_CEILING, Decimal

MEMORY_PATTERN = r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?$"
MAX_MEMORY_CHARACTERS = 24
MIN_MEMORY = "64Mi"
"""Less is a forgotten suffix: `16` is sixteen bytes."""
MAX_MEMORY = "64Ti"
"""More than any node has; keeps sums far below 2^63."""

_FACTORS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "P": 10**15,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
    "Pi": 2**50,
}


def parse_memory(quantity: str) -> int:
    """Bytes of a quantity such as `16Gi`, `1.5G` or `17179869184`, rounded up as Kubernetes does.

    Raises ValueError for anything else, `m` (thousandths of a byte) and exponents included.
    """
    match = re.fullmatch(rf"([0-9.]+)({'|'.join(_FACTORS)})", quantity)
    if len(quantity) > MAX_MEMORY_CHARACTERS or not re.fullmatch(MEMORY_PATTERN[1:-1], quantity) or not match:
        raise ValueError(f"{quantity[:60]!r} is no quantity of memory such as 16Gi or 900M")
    number, suffix = match.groups()
    return int((Decimal(number) * _FACTORS[suffix]).to_integral_value(rounding=ROUND_CEILING))


def is_plausible_memory(quantity: str) -> bool:
    """Whether a rank could have so much memory: from MIN_MEMORY to MAX_MEMORY."""
    return parse_memory(MIN_MEMORY) <= parse_memory(quantity) <= parse_memory(MAX_MEMORY)
