"""Times as Kubernetes writes them."""

from datetime import UTC, datetime


def stamp(time: datetime) -> str:
    """RFC 3339, UTC, whole seconds."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse(text: str) -> datetime:
    """The time in a status or in an object's metadata."""
    return datetime.fromisoformat(text)
