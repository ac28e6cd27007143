"""How a rank ended, as a TerminationReport."""

import socket
import traceback
from pathlib import Path
from typing import Any

from qlora_contract.export import forms_of
from qlora_contract.job_folder import adapter_uri
from qlora_contract.progress import TerminationReport
from qlora_contract.units import first_line
from qlora_trainer.errors import TrainerError, expected
from qlora_trainer.training.context import RankContext

_DATA = "qlora_trainer.data"
"""The package that handles the text of the data."""


def success_report(context: RankContext, report: dict[str, Any]) -> TerminationReport:
    """The report of a rank whose job is done.

    Args:
        context: this rank's.
        report: training_report.json.
    """
    loss = report["eval_loss"]
    return TerminationReport(
        exit_code=0,
        reason="DONE",
        cause=_done(context, loss),
        rank=context.world.rank,
        host=socket.gethostname(),
        step=report["steps"],
        not_bit_exact=report["not_bit_exact"],
        compute_dtype=report["compute_dtype"],
        world_size=report["world_size"],
        base_eval_loss=report["base_eval_loss"],
        base_eval_loss_quantized=report["base_eval_loss_quantized"],
        eval_loss=loss,
        adapter_uri=adapter_uri(context.run),
        adapter_sha256=report["adapter_sha256"],
        energy_kwh=report.get("cost", {}).get("energy_kwh"),
    )


def _done(context: RankContext, loss: float | None) -> str:
    if context.run.stage == "export":
        return f"exported {', '.join(forms_of(context.run.output))}"
    return "adapter published" + ("" if loss is None else f", eval loss {loss:.4f}")


def failure_report(error: BaseException, rank: int, context: RankContext | None) -> TerminationReport:
    """The report of a rank that `error` ended; `context` is None when it ended before it had one."""
    known = expected(error, "training") or TrainerError(
        f"unexpected {type(error).__name__}: {_without_data(error)}"
    )
    progress = context.progress.report if context else None
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


def _without_data(error: BaseException) -> str:
    """An error's first line; only the place for one that passed through _DATA.

    Such an error may quote the data, and the report is shown in the job's status.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    in_data = [f for f in frames if f"{f.f_globals.get('__name__')}.".startswith(f"{_DATA}.")]
    if not in_data:
        return first_line(error)
    code = in_data[-1].f_code
    return f"in {code.co_name} of {Path(code.co_filename).name}; the log of the rank has the details"
