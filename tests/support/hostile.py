"""Hostile input: strategies that damage what is right, and what a target may do with it.

A target is a function that reads something from outside. Whatever it is given, it returns, or raises an error of ours
that no attempt repeats; it takes no more than seconds of a processor, and memory within a bound.
"""

import copy
import json
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning

from qlora_contract.exit_codes import PERMANENT
from qlora_trainer.errors import TrainerError

FAST_INPUTS = 200
"""Of each target in the fast tier, always the same ones."""
SOAK_INPUTS = 10_000
"""In `make soak`, every time others."""
CPU_SECONDS = 5.0
"""Of one input. Of the process's own time, so that a busy machine does not matter."""
MEMORY_BYTES = 256 * 2**20
"""That one input may add to the process."""
MOST_CHARACTERS = 2_000
"""Of an error."""
ADDRESS_SPACE_BYTES = 8 * 2**30
"""Beyond what is there: what would take the machine down fails here instead."""

HUGE = 2**60
NESTED = 100_000
"""Levels: no parser that calls itself comes to their end."""

INPUTS = pytest.mark.parametrize(
    "inputs", [FAST_INPUTS, pytest.param(SOAK_INPUTS, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
"""Of a test of a target: how many inputs it gets."""

T = TypeVar("T")


def attack(inputs: int, strategy: st.SearchStrategy[T], target: Callable[[T], object]) -> None:
    """Give a target so many inputs. Fails for the first that does anything but what the module says."""

    @settings(
        max_examples=inputs,
        deadline=None,
        derandomize=inputs == FAST_INPUTS,
        database=None,
        phases=[Phase.generate],  # what hangs would hang again, many times
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(value: T) -> None:
        survive(target, value)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)  # that an input is too large to be shown at once
        one()


def survive(target: Callable[[T], object], value: T) -> TrainerError | None:
    """Give a target one input; the error that it answers with. Fails for anything else."""
    error: TrainerError | None = None
    with within_limits():
        try:
            target(value)
        except TrainerError as raised:
            error = raised
    if error is not None:
        assert error.exit_code in PERMANENT, f"{type(error).__name__} would be retried: {error}"
        assert 0 < len(str(error).strip()) < MOST_CHARACTERS, f"an error of {len(str(error))} characters"
    return error


@contextmanager
def within_limits() -> Iterator[None]:
    """Fails what takes more than CPU_SECONDS or MEMORY_BYTES."""

    def out_of_time(*_: object) -> None:
        pytest.fail(f"takes longer than {CPU_SECONDS:g} s of a processor", pytrace=True)

    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESS_SPACE_BYTES, hard))
    handler = signal.signal(signal.SIGVTALRM, out_of_time)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    took = _status("VmHWM") - before
    assert took < MEMORY_BYTES, f"takes {took / 2**20:.0f} MiB"


def _status(name: str) -> int:
    """A figure of this process in /proc, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split(maxsplit=1)[0]) * 1024


# --- damage

NUMBERS: Sequence[Any] = (
    -1, 0, 1, 3, 7, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, HUGE, 10**30, -HUGE,
    0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"),
)  # fmt: skip
VALUES: Sequence[Any] = (
    *NUMBERS, None, True, False, "", "x", "\x00", "\ud800", "ü" * 99, "x" * 5_000, "../../etc/passwd", "/dev/zero",
    [], {}, [[]], [None], [0], [-1], ["x"], {"": ""}, {"x": None}, [1] * 999, [["x", "y"]],
)  # fmt: skip
"""What may stand where something else should."""


def nested(levels: int = NESTED, opening: str = "[", closing: str = "]") -> str:
    """JSON within JSON."""
    return opening * levels + closing * levels


def json_text(value: Any) -> str:
    """As JSON: NaN and lone surrogates, too."""
    return json.dumps(value)


@st.composite
def damaged_bytes(draw: st.DrawFn, right: Sequence[bytes], head: int | None = None) -> bytes:
    """One of `right` after a few accidents: cut, flipped, torn, repeated, or with numbers that are far too large.

    Args:
        draw: hypothesis's.
        right: what is right.
        head: bytes at the beginning in which three of four accidents happen; None: anywhere.
    """
    data = bytearray(draw(st.sampled_from(right)))
    for _ in range(draw(st.integers(1, 3))):
        near = head is not None and draw(st.integers(0, 3)) > 0
        at = draw(st.integers(0, min(len(data), head if near and head else len(data))))
        match draw(st.integers(0, 7)):
            case 0:
                del data[at:]
            case 1:
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 2 if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 3:
                del data[at : at + draw(st.integers(1, 40))]
            case 4:
                data[at:at] = draw(st.binary(max_size=20))
            case 5:
                size = draw(st.sampled_from([1, 2, 4, 8]))
                number = draw(st.sampled_from([0, 1, 2**7, 2**15, 2**31, 2**60, 2**63, 2**64 - 1]))
                data[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
            case 6:
                piece = bytes(data[at : at + draw(st.integers(1, 60))])
                data[at:at] = piece * draw(st.integers(1, 20))
            case _:
                other = draw(st.sampled_from(right))
                data[at:] = other[draw(st.integers(0, len(other))) :]
    return bytes(data)


@st.composite
def damaged_json(draw: st.DrawFn, right: Any, values: Sequence[Any] = VALUES) -> Any:
    """A value of JSON in which a few places hold something else, or nothing, or stand elsewhere, too."""
    value = copy.deepcopy(right)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return draw(st.sampled_from(values))
        holder, key = draw(st.sampled_from(places))
        match draw(st.integers(0, 5)):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[draw(st.sampled_from(["x", "", "type", "vocab", key.upper()]))] = holder[key]
            case 2:
                holder[key] = [holder[key]]
            case 3:
                _, other = draw(st.sampled_from(places))
                holder[key] = copy.deepcopy(holder.get(other)) if isinstance(holder, dict) else other
            case _:
                holder[key] = copy.deepcopy(draw(st.sampled_from(values)))
    return value


def _places(value: Any, most: int = 200) -> Iterator[tuple[Any, Any]]:
    """(container, key) of what is in a value of JSON: of long lists the first few."""
    waiting = [value]
    while waiting and most:
        holder = waiting.pop(0)
        keys = list(holder) if isinstance(holder, dict) else range(min(len(holder), 8))
        for key in list(keys)[:40]:
            most -= 1
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])


assert sys.platform == "linux"  # /proc
