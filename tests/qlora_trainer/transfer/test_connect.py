"""From a URI to what serves it."""

import pytest

from qlora_contract.remote import parse_remote
from qlora_trainer.errors import TransferRefused
from qlora_trainer.transfer.connect import connect
from qlora_trainer.transfer.hub import Hub
from qlora_trainer.transfer.s3 import S3
from testcluster.remote import Transfers


@pytest.mark.parametrize(
    ("uri", "kind"),
    [("hf://org/name", Hub), ("hf://datasets/org/name/x", Hub), ("s3://team/x", S3)],
    ids=["model", "dataset", "bucket"],
)
def test_the_scheme_tells_the_server(here: dict[str, str], uri: str, kind: type) -> None:
    """Nothing is asked of it yet."""
    assert type(connect(parse_remote(uri), "model", here, 10)) is kind


@pytest.mark.parametrize(
    ("uri", "missing"), [("hf://org/name", "token"), ("s3://team/x", "AWS_ACCESS_KEY_ID")], ids=["hub", "s3"]
)
def test_a_secret_of_another_kind_is_refused(
    here: dict[str, str], transfers: Transfers, uri: str, missing: str
) -> None:
    """A token is no key of S3, nor the other way round."""
    transfers.credentials("model", other="x")
    environ = here | {"QLORA_CREDENTIALS": str(transfers.folder / "credentials")}
    with pytest.raises(
        TransferRefused, match=f"the Secret named by model.credentialsSecret must have a value for {missing}"
    ):
        connect(parse_remote(uri), "model", environ, 10)
