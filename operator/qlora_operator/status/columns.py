"""Numbers as `kubectl get` shows them."""

from qlora_operator.api.status import Columns, Progress, Restarts

_UNITS = ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))


def columns(
    ready: int,
    world_size: int | None,
    progress: Progress | None,
    restarts: Restarts,
    window: str | None = None,
) -> Columns:
    """The text of the columns.

    Args:
        ready: ranks of pods that are ready.
        world_size: all ranks; None while that is unknown.
        progress: of rank 0.
        restarts: of both kinds.
        window: whether one of the schedule's is open, and until when.
    """
    progress = progress or Progress()
    total = progress.total_steps
    return Columns(
        ranks=f"{ready}/{'auto' if world_size is None else world_size}",
        step=f"{progress.step}/{total}" if progress.step is not None and total else None,
        loss=f"{progress.loss:.4g}" if progress.loss is not None else None,
        tokens_per_second=f"{progress.tokens_per_second:.4g}"
        if progress.tokens_per_second is not None
        else None,
        eta=duration(progress.eta_seconds) if progress.eta_seconds is not None else None,
        restarts=str(restarts.user + restarts.infrastructure),
        window=window,
    )


def duration(seconds: int) -> str:
    """`45s`, `9m`, `3h20m`, `2d4h`: two units at most, and the second only where the first is coarse."""
    for position, (size, unit) in enumerate(_UNITS):
        if seconds >= size:
            count, rest = divmod(seconds, size)
            if unit in ("s", "m"):
                return f"{count}{unit}"
            below, name = _UNITS[position + 1]
            return f"{count}{unit}{rest // below}{name}" if rest // below else f"{count}{unit}"
    return "0s"
