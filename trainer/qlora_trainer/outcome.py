"""How a rank ended, as a TerminationReport."""

import socket
import traceback
from pathlib import Path
from typing import Any

from qlora_contract import places
from qlora_contract.progress import TerminationReport
from qlora_trainer.errors import ConfigurationError, OutOfMemory, TrainerError, from_os_error
from qlora_trainer.session import Session
from qlora_trainer.storage import adapter_uri

_SEE_DATA = frozenset({"data", "records", "template", "packing"})
"""Modules that handle the text of the data."""
OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""How torch's allocator and the system say it."""


def done(session: Session, report: dict[str, Any]) -> TerminationReport:
    """The report of a rank whose job is done; `report` is training_report.json."""
    loss = report["eval_loss"]
    return TerminationReport(
        exit_code=0,
        reason="DONE",
        cause="adapter published" + ("" if loss is None else f", eval loss {loss:.4f}"),
        rank=session.world.rank,
        host=socket.gethostname(),
        step=report["steps"],
        not_bit_exact=report["not_bit_exact"],
        compute_dtype=report["compute_dtype"],
        world_size=report["world_size"],
        base_eval_loss=report["base_eval_loss"],
        base_eval_loss_quantized=report["base_eval_loss_quantized"],
        eval_loss=loss,
        adapter_uri=adapter_uri(session.run),
        adapter_sha256=report["adapter_sha256"],
    )


def failed(error: BaseException, rank: int, session: Session | None) -> TerminationReport:
    """The report of a rank that `error` ended."""
    known = as_trainer_error(error)
    progress = session.progress.report if session else None
    return TerminationReport(
        exit_code=int(known.exit_code),
        reason=known.exit_code.name,
        cause=str(known),
        rank=rank,
        host=socket.gethostname(),
        step=progress.step if progress else None,
        checkpoint_step=progress.checkpoint.step if progress and progress.checkpoint else None,
        compute_dtype=progress.compute_dtype if progress else None,
    )


def as_trainer_error(error: BaseException) -> TrainerError:
    """What ended the rank, as one of the foreseen ends where it is one."""
    if isinstance(error, TrainerError):
        return error
    if isinstance(error, places.PlaceError):
        return ConfigurationError(str(error))
    if isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY_TEXTS):
        return OutOfMemory(
            "memory could not be had: raise topology.memoryPerRank, or lower training.microBatchTokens "
            f"or training.maxSequenceLength ({first_line(error)})"
        )
    if isinstance(error, OSError) and (known := from_os_error(error, "training")) is not None:
        return known
    return TrainerError(f"unexpected {type(error).__name__}: {_words(error)}")


def _words(error: BaseException) -> str:
    """An error's first line; of one that came up with the data only where, since its text may quote them, and ends up
    in the job's status."""
    frames = traceback.extract_tb(error.__traceback__)
    near = [frame for frame in frames if Path(frame.filename).stem in _SEE_DATA]
    if not near:
        return first_line(error)
    return f"in {near[-1].name} of {Path(near[-1].filename).name}; the log of the rank has the rest"


def first_line(error: BaseException) -> str:
    """An error's text, cut to its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
