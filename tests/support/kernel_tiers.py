"""Every tier of the kernel library that this machine can run, for tests of kernels."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qlora_trainer.errors import ConfigurationError
from qlora_trainer.kernels.library import KERNELS_ENV, REFERENCE, TIERS, Library, find, loaded

EVERY_TIER = pytest.mark.parametrize("tier", TIERS)
"""Runs a test with each tier's name as `tier`."""


@functools.cache
def _found(tier: str) -> Library | str:
    try:
        library = find(environ={KERNELS_ENV: tier})
    except ConfigurationError as error:
        return str(error)
    assert library is not None
    return library


def library_of(tier: str) -> Library:
    """The library with that tier; the test is skipped, with the reason, where it cannot run."""
    found = _found(tier)
    if isinstance(found, str):
        pytest.skip(found)
    return found


PASS_TIERS = [REFERENCE, *TIERS]
"""What passes are tested with."""


@contextmanager
def running(tier: str) -> Iterator[None]:
    """Within it, that tier or the reference runs; the test is skipped where it cannot."""
    if tier != REFERENCE:
        library_of(tier)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KERNELS_ENV, tier)
        loaded.cache_clear()
        yield
    loaded.cache_clear()
