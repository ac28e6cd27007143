"""What a job goes through: remote sources are fetched, the ranks train, the adapter is sent on.

Each stage is an attempt of its own, so that whatever holds for attempts (never two at a time, budgets, lost
nodes, suspension) holds for transfers as well.
"""

from qlora_contract.progress import ProgressReport
from qlora_contract.remote import is_remote
from qlora_contract.run import Fetched, RunStage
from qlora_operator.api.names import Reason
from qlora_operator.api.types import Provenance, QLoRAJobSpec, QLoRAJobStatus

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def next_stage(spec: QLoRAJobSpec, status: QLoRAJobStatus) -> RunStage:
    """What is to be done next, of a job that is not over."""
    known = fetched(status)
    for source, revision in ((spec.model.source, known.model), (spec.dataset.source, known.dataset)):
        if is_remote(source) and revision is None:
            return "fetch"
    return "train" if status.adapter is None else "publish"


def fetched(status: QLoRAJobStatus) -> Fetched:
    """What the remote sources stand for, as far as that is known."""
    known = status.provenance or Provenance()
    return Fetched(model=known.model_revision, dataset=known.dataset_revision)


def intention(spec: QLoRAJobSpec, stage: RunStage) -> str:
    """What an attempt does, in words that follow its number."""
    if stage == "fetch":
        remote = [uri for uri in (spec.model.source, spec.dataset.source) if is_remote(uri)]
        return f"fetches {' and '.join(remote)}"
    return "starts" if stage == "train" else f"sends the adapter to {spec.output.destination}"


RUNNING: dict[RunStage, Reason] = {
    "fetch": Reason.FETCHING,
    "train": Reason.LOADING,
    "publish": Reason.UPLOADING,
}
"""How an attempt runs that has not told of itself yet."""


def transferred(told: ProgressReport | None) -> str:
    """`: 1.2 of 7.4 GiB`, or nothing while nobody knows."""
    if told is None or told.bytes_done is None or not told.bytes_total:
        return ""
    size, unit = next((each for each in _UNITS if told.bytes_total >= each[0]), (1, "bytes"))
    return f": {_rounded(told.bytes_done / size)} of {_rounded(told.bytes_total / size)} {unit}"


def _rounded(number: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"
