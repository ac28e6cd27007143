"""What a machine lacks for nodes is installed, or named with what to do."""

import os
from pathlib import Path

import pytest

from testcluster import packages
from testcluster.errors import ClusterError


def test_nothing_is_done_when_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has every file needs neither apt-get nor root."""
    monkeypatch.setattr(packages, "PACKAGES", {"present": "/proc/self/exe"})
    monkeypatch.setenv("PATH", "")

    packages.ensure()

    assert packages.missing() == []


def test_without_root_the_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who may not install packages is told which, and how."""
    (tmp_path / "apt-get").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(packages, "PACKAGES", {"present": "/proc/self/exe", "absent": "/absent"})
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    with pytest.raises(ClusterError, match=r"only root .*: apt-get install --no-install-recommends absent$"):
        packages.ensure()


def test_without_apt_the_files_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another distribution has other packages: the message says which files they must bring."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(packages, "PACKAGES", {"absent": "/absent/file"})

    with pytest.raises(ClusterError, match=r"no Debian: install what holds /absent/file"):
        packages.ensure()
