"""Which files are fetched, and what they hash to."""

import hashlib
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.containers import CONTAINERS
from qlora_contract.remote import parse_remote
from qlora_trainer.errors import TransferRefused
from qlora_trainer.transfer.remote_files import Digest, RemoteFile, Role, hash_file, list_down, select_files

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


def test_an_adapter_is_its_weights_and_its_configuration() -> None:
    """Beside them repositories have tokenizers, cards, checkpoints, whole models."""
    there = ["adapter_config.json", "adapter_model.safetensors"]
    more = [
        "README.md",
        "adapter_model.bin",
        "checkpoint-8/adapter_model.safetensors",
        "config.json",
        "tokenizer.json",
    ]

    assert chosen("adapter", "hf://org/name", *there, *more) == there
    assert chosen("adapter", "s3://bucket/a", *(f"a/{name}" for name in there)) == [
        f"a/{name}" for name in there
    ]


@pytest.mark.parametrize(
    "there", [["adapter_config.json", "adapter_model.bin"], ["adapter_model.safetensors"]]
)
def test_half_an_adapter_is_none(there: list[str]) -> None:
    """Pickles are not read."""
    with pytest.raises(TransferRefused, match=r"has no adapter in PEFT's format .*: it has adapter_"):
        chosen("adapter", "hf://org/name", *there)


def test_copies_of_the_weights_are_left_out() -> None:
    """Some repositories hold them twice."""
    there = ["consolidated.safetensors", "model-1.safetensors", "model-2.safetensors"]

    assert chosen("model", "hf://org/name", *there) == there[1:]
    assert chosen("model", "hf://org/name", "weights.safetensors") == ["weights.safetensors"]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        pytest.param(
            "hf://datasets/org/name",
            ["README.md", "a.jsonl", "b.jsonl", "chat.jinja", "x.parquet"],
            id="whole",
        ),
        pytest.param("hf://datasets/org/name/a.jsonl", ["a.jsonl"], id="file"),
        pytest.param("hf://datasets/org/name/sub", ["sub/c.jsonl", "sub/y.csv.gz"], id="folder"),
        pytest.param("s3://team/sub/", ["sub/c.jsonl", "sub/y.csv.gz"], id="prefix"),
    ],
)
def test_a_dataset_is_a_file_or_a_folder(uri: str, expected: list[str]) -> None:
    """What readers read and what lies directly in the folder, if anything does; with the card and chat templates."""
    there = [
        "chat.jinja",
        "b.jsonl",
        "a.jsonl",
        "x.parquet",
        "x.py",
        "README.md",
        "sub/c.jsonl",
        "sub/y.csv.gz",
        "sub/z/d.jsonl",
    ]
    assert chosen("dataset", uri, *there) == expected


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["data/train-00000.parquet", "LICENSE.txt", "dataset_infos.json"], ["data/train-00000.parquet"]),
        (["default/train/0000.parquet", "default/test/0000.parquet"], None),
        (["train/data-00000-of-00001.arrow", "train/state.json", "dataset_dict.json"], None),
        (["en/a.jsonl", "en/old/b.jsonl"], ["en/a.jsonl"]),
        (["a.txt"], None),
        (["a/b/c/d.jsonl", "a/e.txt"], ["a/b/c/d.jsonl", "a/e.txt"]),
    ],
    ids=["data", "converted", "saved", "nearest", "text", "too-deep"],
)  # fmt: skip
def test_a_dataset_may_lie_in_the_hubs_layout(there: list[str], taken: list[str] | None) -> None:
    """The nearest folders with records are taken, and what describes them."""
    described = [name for name in there if name.endswith((".json",))]

    assert chosen("dataset", "hf://datasets/org/name", *there) == sorted({*(taken or there), *described})


def test_folders_are_listed_until_there_are_records() -> None:
    """Level by level: nothing is asked for that is not needed."""
    tree = {
        "": (["README.md"], ["data", "img"]),
        "data": (["data/a.parquet"], ["data/old"]),
        "img": ([], ["img/x"]),
    }
    asked = []

    def list_folder(path: str) -> tuple[list[RemoteFile], list[str]]:
        asked.append(path)
        files, folders = tree[path]
        return [RemoteFile(name, 1) for name in files], folders

    files = list_down(list_folder, "")

    assert [file.name for file in files] == ["README.md", "data/a.parquet"]
    assert asked == ["", "data", "img"]


@pytest.mark.parametrize(
    ("role", "uri", "there", "said"),
    [
        pytest.param(
            "model", "hf://org/name", ["a.bin", "config.json"],
            "hf://org/name has no *.safetensors: it has a.bin, config.json", id="pickles-only",
        ),
        pytest.param(
            "dataset", "s3://team/d", ["d/a.pdf"], "s3://team/d has no file with records (.jsonl, .ndjson", id="pdf",
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


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_data_in_any_format_that_is_read_is_enough(suffix: str) -> None:
    """What the contract says that readers read is fetched."""
    assert chosen("dataset", "s3://team/d", f"d/a{suffix}", "d/a.pdf") == [f"d/a{suffix}"]
