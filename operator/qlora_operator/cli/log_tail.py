"""The end of a log, once or as it grows."""

from pathlib import Path

CAUSE_LINES = 5
"""Last lines of a log that stand for a cause where there is no report."""
_TAIL_BYTES = 65_536


def last_lines(log: Path, count: int = CAUSE_LINES) -> str:
    """The last lines of a log that are not blank; empty for one that is gone."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    return "\n".join([line for line in lines if line][-count:])


class LogTail:
    """A log that is still being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new_lines(self) -> list[str]:
        """The complete lines that were written since the last call; none of a log that is gone."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                complete, newline, _ = stream.read().rpartition(b"\n")
        except OSError:
            return []
        self._offset += len(complete + newline)
        return [line.decode(errors="replace") for line in complete.splitlines()]
