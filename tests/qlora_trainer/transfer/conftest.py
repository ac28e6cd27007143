"""The Hub and S3, and transfers between them and a workspace."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testcluster.remote import Remotes, Transfers, remotes


@pytest.fixture(scope="module")
def servers() -> Iterator[Remotes]:
    """Both servers, for a module's tests."""
    with remotes() as made:
        yield made


@pytest.fixture
def sound(servers: Remotes) -> Remotes:
    """The servers, with nothing on them and wires that are sound."""
    servers.clear()
    return servers


@pytest.fixture
def transfers(tmp_path: Path, sound: Remotes) -> Iterator[Transfers]:
    """Transfers of jobs that share a workspace."""
    made = Transfers(tmp_path, sound.environ)
    yield made
    made.close()


@pytest.fixture
def here(sound: Remotes, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment, in which this very process reaches the servers as well."""
    for name in ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in sound.environ.items():
        monkeypatch.setenv(name, value)
    return sound.environ


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, int], None]]:
    """A maker of file systems of so many bytes."""
    mounted: list[Path] = []

    def mount(folder: Path, size: int) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = (
            subprocess.run(command, capture_output=True, text=True, check=False)
            if shutil.which("mount")
            else None
        )
        if done is None or done.returncode:
            pytest.skip(f"cannot mount a small file system: {done.stderr.strip() if done else 'no mount'}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)
