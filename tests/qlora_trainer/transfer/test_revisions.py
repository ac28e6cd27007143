"""The revisions that a job keeps."""

from typing import Any

import pytest

from qlora_trainer.transfer.revisions import PinnedRevisions
from testcluster.remote import Transfers

HUB = {"model": {"source": "hf://org/name", "revision": "v1"}}


def pins(transfers: Transfers, **more: Any) -> PinnedRevisions:
    """A job's pins, as an attempt sees them."""
    return PinnedRevisions(transfers.job(), transfers.config(**{**HUB, **more}))


def test_what_was_found_is_kept(transfers: Transfers) -> None:
    """For each source by itself."""
    assert pins(transfers).get("model") is None
    pins(transfers).set("model", "c0ffee")
    pins(transfers).set("dataset", "beef")

    assert (pins(transfers).get("model"), pins(transfers).get("dataset")) == ("c0ffee", "beef")


@pytest.mark.parametrize(
    "model", [{"source": "hf://org/name"}, {"source": "hf://org/other", "revision": "v1"}]
)
def test_it_is_kept_for_what_was_asked(transfers: Transfers, model: dict[str, str]) -> None:
    """Another source or revision is another question; credentials are none."""
    pins(transfers).set("model", "c0ffee")

    assert pins(transfers, model=model).get("model") is None
    assert pins(transfers, model={**HUB["model"], "credentialsSecret": "hub"}).get("model") == "c0ffee"


def test_run_json_goes_first(transfers: Transfers) -> None:
    """The operator knows what an earlier attempt has found."""
    pins(transfers).set("model", "c0ffee")

    assert pins(transfers, fetched={"model": "beef"}).get("model") == "beef"
