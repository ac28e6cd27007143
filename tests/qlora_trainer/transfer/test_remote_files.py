"""Which files are fetched, and what they hash to."""

import hashlib
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.remote import parse_remote
from qlora_trainer.errors import TransferRefused
from qlora_trainer.transfer import remote_files
from qlora_trainer.transfer.credentials import Role
from qlora_trainer.transfer.remote_files import Digest, RemoteFile, hash_file, select_files

MODEL = parse_remote("hf://org/name")


def chosen(role: Role, uri: str, *names: str) -> list[str]:
    """What is taken of these."""
    return [
        file.name for file in select_files(role, parse_remote(uri), [RemoteFile(name, 1) for name in names])
    ]


def test_a_model_is_what_training_reads() -> None:
    """Weights in safetensors, configuration and tokenizer; no pickles, no code, no other folders."""
    there = ["config.json", "model-1.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    there += [
        "merges.txt",
        "chat_template.jinja",
        "pytorch_model.bin",
        "consolidated.pth",
        "model.pt",
        "modeling.py",
    ]
    there += ["README.md", ".gitattributes", "onnx/model.onnx", "original/model.safetensors"]

    assert chosen("model", "hf://org/name", *there) == sorted(there[:6])


def test_copies_of_the_weights_are_left_out() -> None:
    """Some repositories hold them twice."""
    there = ["consolidated.safetensors", "model-1.safetensors", "model-2.safetensors"]

    assert chosen("model", "hf://org/name", *there) == there[1:]
    assert chosen("model", "hf://org/name", "weights.safetensors") == ["weights.safetensors"]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        pytest.param("hf://datasets/org/name", ["a.jsonl", "b.jsonl"], id="whole"),
        pytest.param("hf://datasets/org/name/a.jsonl", ["a.jsonl"], id="file"),
        pytest.param("hf://datasets/org/name/sub", ["sub/c.jsonl"], id="folder"),
        pytest.param("s3://team/sub/", ["sub/c.jsonl"], id="prefix"),
    ],
)
def test_a_dataset_is_a_file_or_a_folder(uri: str, expected: list[str]) -> None:
    """Only JSONL, and only what lies directly in the folder."""
    assert (
        chosen("dataset", uri, "b.jsonl", "a.jsonl", "x.parquet", "sub/c.jsonl", "sub/y.csv", "sub/z/d.jsonl")
        == expected
    )


@pytest.mark.parametrize(
    ("role", "uri", "there", "said"),
    [
        pytest.param(
            "model", "hf://org/name", ["a.bin", "config.json"],
            "hf://org/name has no *.safetensors: it has a.bin, config.json", id="pickles-only",
        ),
        pytest.param(
            "dataset", "s3://team/d", ["d/a.parquet"], "s3://team/d has no *.jsonl: it has a.parquet", id="parquet",
        ),
        pytest.param(
            "dataset", "s3://team/d", ["e/a.jsonl"], "no file has that name", id="nothing",
        ),
        pytest.param("dataset", "s3://team/d", [f"d/{i}" for i in range(20)], "and 12 more", id="many"),
    ],
)  # fmt: skip
def test_a_source_without_anything_to_read_is_refused(
    role: Role, uri: str, there: list[str], said: str
) -> None:
    """The sentence says what is there instead."""
    with pytest.raises(TransferRefused) as refused:
        chosen(role, uri, *there)

    assert said in str(refused.value)


@pytest.mark.parametrize(
    "name", ["../config.json", "a/../../b.json", "/etc/passwd.json", "./config.json", "a//b.json", "a\0.json"]
)
def test_a_name_that_leaves_its_folder_refuses_all(name: str) -> None:
    """Even when the file would not be wanted: such a repository is no honest one."""
    with pytest.raises(TransferRefused, match="leads out of its directory"):
        chosen("model", "hf://org/name", "model.safetensors", name)


@given(st.lists(st.text(st.sampled_from("a./\\\0"), min_size=1, max_size=8), max_size=4))
def test_what_is_chosen_stays_in_its_folder(names: list[str]) -> None:
    """Whatever a server makes up."""
    files = [RemoteFile(f"{name}.json", 1) for name in names] + [RemoteFile("model.safetensors", 1)]
    try:
        taken = select_files("model", MODEL, files)
    except TransferRefused:
        return
    root = Path("/root")
    assert all((root / file.name).resolve().parent == root for file in taken)


@pytest.mark.process
def test_digests_are_those_of_git_and_s3(tmp_path: Path) -> None:
    """Blobs as git names them, md5 as S3 does, and sha256 always."""
    path = tmp_path / "x"
    path.write_bytes(b"some bytes\n" * 300_000)
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    git = subprocess.run(
        ["git", "hash-object", path], capture_output=True, text=True, check=True
    ).stdout.strip()

    assert hash_file(path, None) == (sha256, sha256)
    assert hash_file(path, Digest("sha256", "")) == (sha256, sha256)
    assert hash_file(path, Digest("git-sha1", "")) == (sha256, git)
    assert hash_file(path, Digest("md5", "")) == (sha256, hashlib.md5(data).hexdigest())


def test_data_in_any_format_that_is_read_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset may be of a single format, whichever it is; without any, all of them are named."""
    monkeypatch.setattr(remote_files, "DATASET_FILES", ("*.jsonl", "*.csv"))

    assert chosen("dataset", "s3://team/d", "d/a.csv", "d/a.txt") == ["d/a.csv"]
    with pytest.raises(TransferRefused, match=r"has no \*\.jsonl or \*\.csv: it has a\.txt"):
        chosen("dataset", "s3://team/d", "d/a.txt")
