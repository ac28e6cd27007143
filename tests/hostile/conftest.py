"""Where hostile files lie: in memory, since a disk takes longer to write them than anybody to read them."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """An empty folder."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="qlora-hostile-", dir=memory if memory.is_dir() else tmp_path
    ) as folder:
        yield Path(folder)
