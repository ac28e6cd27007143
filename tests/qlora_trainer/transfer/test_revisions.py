"""The revisions that a job keeps."""

from typing import Any

import pytest

from qlora_contract.remote import NamedSource
from qlora_trainer.transfer.revisions import PinnedRevisions
from testcluster.remote import Transfers

HUB = {"model": {"source": "hf://org/name", "revision": "v1"}}


def _pins(transfers: Transfers, field: str, **more: Any) -> tuple[PinnedRevisions, NamedSource]:
    """A job's pins, as an attempt sees them, and the source of a field."""
    run = transfers.config(**{**HUB, **more})
    source = next(source for source in run.sources if source.field == field)
    return PinnedRevisions(transfers.job(), run), source


def known(transfers: Transfers, field: str = "model", **more: Any) -> str | None:
    """The revision that an attempt knows."""
    pins, source = _pins(transfers, field, **more)
    return pins.get(source)


def keep(transfers: Transfers, field: str, revision: str, **more: Any) -> None:
    """Keep a revision, as a fetch does."""
    pins, source = _pins(transfers, field, **more)
    pins.set(source, revision)


def test_what_was_found_is_kept(transfers: Transfers) -> None:
    """For each source by itself."""
    assert known(transfers) is None
    keep(transfers, "model", "c0ffee")
    keep(transfers, "dataset", "beef")

    assert (known(transfers), known(transfers, "dataset")) == ("c0ffee", "beef")


def test_each_of_several_sources_has_its_own(transfers: Transfers) -> None:
    """By its place among them."""
    mix = {"dataset": {"sources": [{"source": "s3://bucket/a"}, {"source": "s3://bucket/a"}]}}
    keep(transfers, "dataset.sources[0]", "c0ffee", **mix)
    keep(transfers, "dataset.sources[1]", "beef", **mix)

    assert known(transfers, "dataset.sources[0]", **mix) == "c0ffee"
    assert known(transfers, "dataset.sources[1]", **mix) == "beef"


@pytest.mark.parametrize(
    "model", [{"source": "hf://org/name"}, {"source": "hf://org/other", "revision": "v1"}]
)
def test_it_is_kept_for_what_was_asked(transfers: Transfers, model: dict[str, str]) -> None:
    """Another source or revision is another question; credentials are none."""
    keep(transfers, "model", "c0ffee")

    assert known(transfers, model=model) is None
    assert known(transfers, model={**HUB["model"], "credentialsSecret": "hub"}) == "c0ffee"


def test_run_json_goes_first(transfers: Transfers) -> None:
    """The operator knows what an earlier attempt has found."""
    keep(transfers, "model", "c0ffee")

    assert known(transfers, fetched={"model": "beef"}) == "beef"
