"""The backends by the names that a job has for them."""

from collections.abc import Callable

from qlora_trainer.distributed.backends import ccl, mpi
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.native.libraries import ExtensionUnavailable

TORCH_NAMES = {"gloo": "gloo", "ccl": ccl.NAME, "mpi": mpi.TORCH_NAME}
"""Backend of a job -> backend of `init_process_group`."""

_REGISTER: dict[str, Callable[[], None]] = {"ccl": ccl.register, "mpi": mpi.register}


def prepare(backend: str) -> str:
    """Check that a backend can be used here, and make it known to torch; returns its name there.

    Raises ConfigurationError, which says what to install or to run.
    """
    if backend not in TORCH_NAMES:
        raise ConfigurationError(f"backend {backend!r} is unknown: choose one of {', '.join(TORCH_NAMES)}")
    try:
        if backend in _REGISTER:
            _REGISTER[backend]()
    except ExtensionUnavailable as error:
        raise ConfigurationError(str(error)) from error
    return TORCH_NAMES[backend]
