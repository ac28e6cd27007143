"""Backends by the names of a job."""

import pytest
import torch.distributed as dist

from qlora_trainer.distributed.backends import ccl, registry
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.native.libraries import ExtensionUnavailable

pytestmark = pytest.mark.process


def test_every_backend_of_a_job_is_known_to_torch() -> None:
    """After `prepare`, torch has the backend under the name that `prepare` gave."""
    for backend in registry.TORCH_NAMES:
        assert registry.prepare(backend) in dist.Backend.backend_list


def test_an_unknown_backend_is_refused() -> None:
    """The sentence lists those that there are."""
    with pytest.raises(ConfigurationError, match="'nccl' is unknown: choose one of gloo, ccl, mpi"):
        registry.prepare("nccl")


def test_what_is_missing_is_a_fault_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that cannot be used ends the job for good, saying why: trying again would not help."""

    def missing() -> None:
        raise ExtensionUnavailable("backend ccl is not compiled")

    monkeypatch.setitem(registry._REGISTER, ccl.NAME, missing)

    with pytest.raises(ConfigurationError, match="backend ccl is not compiled"):
        registry.prepare("ccl")
