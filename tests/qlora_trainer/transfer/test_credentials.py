"""Secrets as files, certificates by name, and texts without secrets."""

from pathlib import Path

import pytest

from qlora_trainer.errors import ConfigurationError, TransferRefused
from qlora_trainer.transfer.credentials import HUB_KEYS, S3_KEYS, ca_bundle, read_credentials, redact


def mounted(root: Path, role: str, **keys: str) -> dict[str, str]:
    """A Secret as a pod sees it: links to a folder with a name that begins with dots."""
    folder = root / role
    (folder / "..2026").mkdir(parents=True)
    (folder / "..data").symlink_to("..2026")
    for key, value in keys.items():
        (folder / "..2026" / key).write_text(value)
        (folder / key).symlink_to(f"..data/{key}")
    return {"QLORA_CREDENTIALS": str(root)}


def test_keys_are_files(tmp_path: Path) -> None:
    """Each key's value is its file's, without the line's end that editors add."""
    environ = mounted(tmp_path, "model", token="hf_abc\n", other="x")

    assert read_credentials("model", HUB_KEYS, environ).values == {"token": "hf_abc", "other": "x"}
    assert "hf_abc" not in repr(read_credentials("model", HUB_KEYS, environ))


def test_without_a_secret_nothing_is_given(tmp_path: Path) -> None:
    """The libraries then look in their own places."""
    environ = mounted(tmp_path, "model", token="t")

    assert read_credentials("dataset", HUB_KEYS, environ).values == {}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        pytest.param(
            {"token": "t"},
            "must have a value for AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            id="another-kind",
        ),
        pytest.param({"AWS_ACCESS_KEY_ID": "a"}, "must have a value for AWS_SECRET_ACCESS_KEY", id="half"),
        pytest.param(
            {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": ""},
            "must have a value for AWS_SECRET_ACCESS_KEY",
            id="empty",
        ),
    ],
)
def test_a_secret_without_its_keys_is_refused(tmp_path: Path, keys: dict[str, str], said: str) -> None:
    """The sentence names the field, what is missing and what is there, and no value."""
    environ = mounted(tmp_path, "output", **keys)
    with pytest.raises(TransferRefused) as refused:
        read_credentials("output", S3_KEYS, environ)

    assert said in str(refused.value)
    assert str(refused.value).startswith("the Secret named by output.credentialsSecret")
    assert f"its keys are: {', '.join(sorted(keys))}" in str(refused.value)


def test_the_first_bundle_that_is_named_is_taken(tmp_path: Path) -> None:
    """In the order of the names; without any, the system's own."""
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    environ = {"A": str(tmp_path / "a"), "B": str(tmp_path / "b")}

    assert ca_bundle(environ, "C", "B", "A") == str(tmp_path / "b")
    assert ca_bundle(environ, "C") is None


def test_a_bundle_that_is_not_there_is_an_error() -> None:
    """Rather than connections that nobody can explain."""
    with pytest.raises(ConfigurationError, match="SSL_CERT_FILE is /nowhere, which is not a file"):
        ca_bundle({"SSL_CERT_FILE": "/nowhere"}, "SSL_CERT_FILE")


def test_secrets_are_blotted_out(tmp_path: Path) -> None:
    """Whether mounted, in the environment or in a proxy's address; what is too short to be one is left alone."""
    environ = mounted(tmp_path, "model", token="hf_abc") | {
        "HF_TOKEN": "hf_abcdef",
        "AWS_SECRET_ACCESS_KEY": "s3cr3t",
        "https_proxy": "http://me:pass-word@proxy:3128",
        "AWS_SESSION_TOKEN": "a",
    }
    text = "hf_abc hf_abcdef s3cr3t pass-word a"

    assert redact(text, environ) == "*** *** *** *** a"
