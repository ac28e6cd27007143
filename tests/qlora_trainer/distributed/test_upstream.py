"""Intel's archived binding: seen before it is imported."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from qlora_trainer.distributed import ccl, upstream
from qlora_trainer.distributed.libraries import BackendUnavailable

MINOR = ".".join(torch.__version__.split(".")[:2])


@pytest.mark.parametrize(
    ("binding", "installed", "fits"),
    [
        pytest.param("2.8.0+cpu", "2.8.1", True, id="same-minor"),
        pytest.param("2.8.0", "2.15.0+cu132", False, id="newer-torch"),
        pytest.param("2.1.0", "2.10.0", False, id="minor-is-a-number"),
    ],
)
def test_a_binding_fits_the_minor_version_it_was_made_for(binding: str, installed: str, fits: bool) -> None:
    """Only the minor version counts; a mismatch names both versions."""
    sentence = upstream.mismatch(binding, installed)

    assert (sentence is None) == fits
    assert fits or (binding in str(sentence) and installed in str(sentence))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """install(version) -> a folder on the path with a binding of that version, which leaves a mark when imported."""

    def make(version: str) -> Path:
        info = tmp_path / f"oneccl_bind_pt-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: oneccl_bind_pt\nVersion: {version}\n")
        package = tmp_path / upstream.MODULE
        package.mkdir()
        mark = tmp_path / "imported"
        (package / "__init__.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, upstream.MODULE, raising=False)
        return mark

    return make


def test_without_a_binding_there_is_no_version() -> None:
    """Nothing installed is nothing to mind."""
    assert upstream.installed_version() is None


def test_a_binding_that_fits_is_used(install: Callable[[str], Path]) -> None:
    """A binding made for this torch is imported, which registers it."""
    mark = install(f"{MINOR}.0+cpu")

    ccl.register()

    assert mark.exists()


def test_a_binding_for_another_torch_is_never_imported(
    install: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both versions are named, with what to do, and the binding's code does not run."""
    mark = install("2.8.0+cpu")

    def not_compiled() -> None:
        raise BackendUnavailable("backend ccl is not compiled: run this")

    monkeypatch.setattr(ccl, "extension", not_compiled)

    with pytest.raises(
        BackendUnavailable, match=rf"2\.8\.0\+cpu.*torch {MINOR}.*undefined symbol; .*run this"
    ):
        ccl.register()
    assert not mark.exists()


def test_the_one_compiled_here_steps_in(
    install: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """With a binding for another torch and an extension of our own, ours is registered, and the log says why."""
    mark = install("2.8.0+cpu")

    ccl.register()

    assert not mark.exists()
    assert "2.8.0+cpu" in caplog.text
    assert dist.Backend._plugins["CCL"].creator_fn is ccl.create
