"""The backends by the names that a job has for them."""

from collections.abc import Callable

from qlora_trainer.distributed import ccl, mpi
from qlora_trainer.distributed.libraries import BackendUnavailable
from qlora_trainer.errors import ConfigurationError

TORCH_NAMES = {"gloo": "gloo", "ccl": ccl.NAME, "mpi": mpi.TORCH_NAME}
"""Backend of a job -> backend of `init_process_group`."""

_REGISTER: dict[str, Callable[[], None]] = {"ccl": ccl.register, "mpi": mpi.register}


def prepare(backend: str) -> str:
    """See that a backend can be used here, and make it known to torch; returns its name there.

    Raises ConfigurationError, which says what to install or to run.
    """
    try:
        if backend in _REGISTER:
            _REGISTER[backend]()
        return TORCH_NAMES[backend]
    except KeyError:
        raise ConfigurationError(f"backend {backend!r} is not known: {', '.join(TORCH_NAMES)} are") from None
    except BackendUnavailable as error:
        raise ConfigurationError(str(error)) from error
