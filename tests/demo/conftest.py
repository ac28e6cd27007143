"""The demo's scripts as modules: they are no package, so they are loaded from their files."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).parents[2] / "demo"


def load(name: str) -> ModuleType:
    """The script demo/NAME.py as a module `demo_NAME`."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def data() -> ModuleType:
    """demo/data.py."""
    return load("data")


@pytest.fixture(scope="session")
def model() -> ModuleType:
    """demo/model.py."""
    return load("model")


@pytest.fixture(scope="session")
def ask() -> ModuleType:
    """demo/ask.py."""
    return load("ask")


@pytest.fixture(scope="session")
def written(model: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's real model, written as the command writes it."""
    folder: Path = tmp_path_factory.mktemp("demo") / "model"
    assert model.write_model(folder) is True
    return folder
