"""What `python -m qlora_trainer.export` is asked, as one line of JSON on stdin, and what it tells, line by line, on
stdout."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Literal, get_args

from pydantic import Field, ValidationError

from qlora_contract.base import ContractModel
from qlora_contract.plan import PlanError
from qlora_contract.progress import Work
from qlora_contract.run_config import GgufType, Output, RunConfig

ExportForm = Literal["merged", "gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "gguf-lora"]
"""What is made of an adapter; also the name of its folder."""
EXPORT_FORMS: tuple[ExportForm, ...] = get_args(ExportForm)


class ExportRequest(ContractModel):
    """An adapter, and what to make of it."""

    name: str = Field(min_length=1, max_length=128, pattern="^[A-Za-z0-9][-A-Za-z0-9._]*$")
    """What the files are called."""
    model: str
    """Folder of the base model."""
    adapter: str
    """Folder of the adapter."""
    output: str
    """Folder that gets a folder of each form."""
    forms: list[ExportForm] = Field(min_length=1)
    weights_sha256: str | None = None
    """Hash of the weights that the adapter was trained on (training_report.json); None where the job kept none."""
    run: RunConfig | None = None
    """The attempt that asks. What is made gets its name only while the fence of the job's folder names that attempt."""
    job_folder: str | None = None
    """That folder."""


class ExportEvent(ContractModel):
    """A line of the answer; one of these."""

    work: Work | None = None
    """What is begun."""
    advanced: int | None = None
    """How much of it was just done, in its unit."""
    exported: ExportForm | None = None
    """What is finished."""
    error: PlanError | None = None
    """Why nothing more is done: the exit code, and one sentence."""


def export_events(lines: Iterable[str]) -> Iterator[ExportEvent]:
    """The events among the lines of an exporter's output; what libraries print is passed over."""
    for line in lines:
        with suppress(ValidationError):
            yield ExportEvent.model_validate_json(line)


def forms_of(output: Output) -> list[ExportForm]:
    """What a job's output asks for, besides the adapter, in the order of EXPORT_FORMS."""
    wanted = {"merged"} if "merged" in output.formats else set()
    if "gguf" in output.formats:
        wanted |= {gguf_form(kind) for kind in output.gguf_types}
    return [form for form in EXPORT_FORMS if form in wanted]


def gguf_form(kind: GgufType) -> ExportForm:
    """The form of a GGUF file of this type."""
    return next(form for form in EXPORT_FORMS if form == f"gguf-{kind}")


def gguf_type(form: ExportForm) -> GgufType | None:
    """The type of a form's GGUF file; None: it has none."""
    kinds: tuple[GgufType, ...] = get_args(GgufType)
    return next((kind for kind in kinds if form == f"gguf-{kind}"), None)
