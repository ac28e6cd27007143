"""Numbers, times and errors as people read them: the same everywhere, in the operator, the command and the trainer."""

from datetime import UTC, datetime

_BINARY_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def format_bytes(count: int) -> str:
    """Bytes in the largest binary unit that they fill, to three digits: `1.21 GiB`, `440 MiB`, `512 bytes`."""
    size, unit = _unit(count)
    return f"{_digits(count / size)} {unit}" if size > 1 else f"{count} {unit}"


def format_bytes_done(done: int, total: int) -> str:
    """How much of `total` bytes is done, in the unit of `total`: `1.21 of 7.40 GiB`."""
    size, unit = _unit(total)
    if size == 1:
        return f"{done} of {total} {unit}"
    return f"{_digits(done / size)} of {_digits(total / size)} {unit}"


def _unit(count: int) -> tuple[int, str]:
    """(bytes of the unit, its name). A count that rounds up to 1024 of a unit is one of the next."""
    return next(((size, unit) for size, unit in _BINARY_UNITS if count >= size * (1 - 2**-11)), (1, "bytes"))


def _digits(number: float) -> str:
    """Two decimals below 10, one below 100, then none: three digits, with trailing zeros so that columns stay."""
    decimals = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{decimals}f}"


def format_duration(seconds: float) -> str:
    """The two largest units of a duration: `45s`, `9m 12s`, `2h 05m`, `3d 04h`. Fractions of a second are dropped."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600:02}h"


def rfc3339(time: datetime) -> str:
    """A time as Kubernetes writes it: UTC, whole seconds, `2026-01-31T09:30:00Z`.

    Args:
        time: aware, of any time zone; a naive one would be taken for local time.
    """
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def now() -> str:
    """The current time, as `rfc3339` writes it."""
    return rfc3339(datetime.now(UTC))


def parse_time(text: str) -> datetime:
    """The aware time that an RFC 3339 text stands for. Raises ValueError."""
    return datetime.fromisoformat(text)


LONGEST_LINE = 500
"""Characters of an error of a library's that ours repeat."""


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message, or its class when it has none: libraries append pages of advice.

    Of a line without end, such as one that quotes a whole file, the beginning.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."
