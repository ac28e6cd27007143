"""report.html from what a job's folder holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_contract.cost import Price, cost_of
from qlora_contract.export import EXPORT_FORMS
from qlora_contract.files import read_json
from qlora_contract.job_folder import (
    ANSWERS,
    EXPORT_REPORT,
    EXPORTS,
    METRICS,
    REPORT_FACTS,
    REPORT_PAGE,
    TRAINING_REPORT,
)
from qlora_trainer.artifacts.metrics_log import read_metrics
from qlora_trainer.report.page import render
from qlora_trainer.storage.atomic import write_atomically
from qlora_trainer.storage.attempts import read_attempts


def page_of(folder: Path, price: Price | None) -> str | None:
    """The page of a job's folder; None where nothing is known of a job.

    A job of an earlier release has less to tell: whatever was not recorded is left out.

    Args:
        folder: the job's.
        price: of a CPU's hour; None: the one that the job's own report has, if any.
    """
    report = _read(folder / TRAINING_REPORT) or _read(folder / REPORT_FACTS)
    metrics, attempts = read_metrics(folder / METRICS), read_attempts(folder)
    if not report and not metrics:
        return None
    report |= {"answers": _read(folder / ANSWERS), "exports": _exports(folder, report.get("adapter_sha256"))}
    name = report.get("job")
    cost = cost_of(attempts, price or _own_price(report)) if attempts else None
    return render(report, metrics, attempts, cost, name if isinstance(name, str) else folder.name)


def write_page(folder: Path, price: Price | None) -> Path | None:
    """Write report.html into a job's folder; its path, or None where nothing is known. Raises StorageFull."""
    page = page_of(folder, price)
    if page is None:
        return None
    path = folder / REPORT_PAGE
    write_atomically(path, page)
    return path


def _exports(folder: Path, adapter_sha256: Any) -> dict[str, Any]:
    """export_report.json by form, of what was made of this adapter: by the job, or later by `qlora export`."""
    reports = {form: _read(folder / EXPORTS / form / EXPORT_REPORT) for form in EXPORT_FORMS}
    return {
        form: made for form, made in reports.items() if made and made.get("adapter_sha256") == adapter_sha256
    }


def _own_price(report: Mapping[str, Any]) -> Price | None:
    cost = report.get("cost")
    if not isinstance(cost, dict) or cost.get("price_per_core_hour") is None:
        return None
    try:
        return Price(amount=cost["price_per_core_hour"], currency=cost.get("currency", ""))
    except ValidationError:
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        report = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}
