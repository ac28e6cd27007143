"""Intel's archived binding: seen, and never imported."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from qlora_trainer.distributed.backends import ccl, upstream
from qlora_trainer.native.libraries import ExtensionUnavailable

pytestmark = pytest.mark.process
MODULE = "oneccl_bindings_for_pytorch"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """install(version) -> a folder on the path with a binding of that version, which leaves a mark when imported."""

    def make(version: str) -> Path:
        info = tmp_path / f"oneccl_bind_pt-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: oneccl_bind_pt\nVersion: {version}\n")
        package = tmp_path / MODULE
        package.mkdir()
        mark = tmp_path / "imported"
        (package / "__init__.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
        return mark

    return make


def test_without_a_binding_nothing_is_refused() -> None:
    """Nothing installed is nothing to mind."""
    assert upstream.refusal("2.15.0") is None


@pytest.mark.parametrize(
    ("binding", "made_for", "installed"),
    [
        pytest.param("2.8.0+cpu", "2.8", "2.15.0+cu132", id="newer-torch"),
        pytest.param("2.1.0", "2.1", "2.10.0", id="minor-is-a-number"),
    ],
)
def test_a_refusal_names_both_versions(
    binding: str, made_for: str, installed: str, install: Callable[[str], Path]
) -> None:
    """The sentence has the binding's version, the torch that it was made for, and the one that is installed."""
    install(binding)

    assert upstream.refusal(installed) == (
        f"oneccl_bindings_for_pytorch {binding} is installed, but it was made for torch {made_for} and torch "
        f"{installed} is installed: its import would fail with an undefined symbol"
    )


def test_a_binding_is_never_imported(install: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both versions are named, with what to do, and the binding's code does not run."""
    mark = install("2.8.0+cpu")

    def not_compiled() -> None:
        raise ExtensionUnavailable("backend ccl is not compiled: run this")

    monkeypatch.setattr(ccl, "load_extension", not_compiled)

    with pytest.raises(
        ExtensionUnavailable,
        match=rf"2\.8\.0\+cpu.*torch {torch.__version__.split('+')[0]}.*undefined symbol; .*run this",
    ):
        ccl.register()
    assert not mark.exists()


def test_the_backend_compiled_here_is_used_instead(
    install: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """With a binding and an extension of our own, ours is registered, and the log says why."""
    mark = install("2.8.0+cpu")

    ccl.register()

    assert not mark.exists()
    assert "2.8.0+cpu" in caplog.text
    assert dist.Backend._plugins["CCL"].creator_fn is ccl.create
