"""Files of jobs."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from qlora_operator.api.loader import OBJECT_META, load_jobs, parse_api_object, parse_job, without_nulls
from qlora_operator.api.names import JOB_NAME_RULE
from qlora_operator.api.schema import job_schema
from qlora_operator.api.v1alpha1 import Metadata
from qlora_operator.errors import InvalidFileError, InvalidJobError

CLAIM = """
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: team-data}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes documents to a file and returns its path."""

    def write_documents(*documents: object) -> str:
        path = tmp_path / "job.yaml"
        texts = [text if isinstance(text, str) else yaml.safe_dump(text) for text in documents]
        path.write_text("\n---\n".join(texts), encoding="utf-8")
        return str(path)

    return write_documents


def faults(path: str) -> list[str]:
    """The lines with which the file is refused."""
    with pytest.raises(InvalidFileError) as error:
        load_jobs(path)
    return [str(fault).replace(path, "FILE") for fault in error.value.faults]


def test_a_file_of_one_job_is_read(write: Callable[..., str], minimal: dict[str, Any]) -> None:
    """The job has the name and the settings of the file."""
    (job,) = load_jobs(write(minimal))

    assert job.metadata.name == "smollm2-docs"
    assert job.spec.training.epochs == 3


def test_scientific_notation_is_a_number(
    write: Callable[..., str], changed: Callable[..., dict[str, Any]]
) -> None:
    """`learningRate: 2e-4` and `maxSteps: 1e3` mean what they mean to kubectl."""
    text = yaml.safe_dump(changed({"spec.training": {"learningRate": "RATE", "maxSteps": "STEPS"}}))
    (job,) = load_jobs(write(text.replace("RATE", "2e-4").replace("STEPS", "1e3")))

    assert (job.spec.training.learning_rate, job.spec.training.max_steps) == (0.0002, 1000)


def test_json_is_read_too(tmp_path: Path, minimal: dict[str, Any]) -> None:
    """What a program wrote as JSON is as good."""
    path = tmp_path / "job.json"
    path.write_text(json.dumps(minimal, indent="\t"), encoding="utf-8")

    assert len(load_jobs(str(path))) == 1


def test_other_kinds_are_passed_over(write: Callable[..., str], minimal: dict[str, Any]) -> None:
    """A claim may stand in the job's file; jobs come in the file's order."""
    other = {**minimal, "metadata": {"name": "second"}}
    jobs = load_jobs(write(CLAIM, minimal, CLAIM, other))

    assert [job.metadata.name for job in jobs] == ["smollm2-docs", "second"]


@pytest.mark.parametrize("kind", ["List", "QLoRAJobList"])
def test_lists_are_opened(kind: str, write: Callable[..., str], minimal: dict[str, Any]) -> None:
    """`kubectl get qlj -o yaml` writes several jobs as one list."""
    listed = {"apiVersion": "v1", "kind": kind, "items": [minimal, {**minimal, "metadata": {"name": "b"}}]}

    assert len(load_jobs(write(listed))) == 2


def test_faults_name_file_and_field(
    write: Callable[..., str], changed: Callable[..., dict[str, Any]]
) -> None:
    """Each line says where, what is wrong, and what would be right."""
    job = changed({"spec.training.maxStep": 5, "spec.isa.allowed": ["avx2", "sse"]})

    assert faults(write(job)) == [
        "FILE: spec.training.maxStep: no such field; did you mean maxSteps?",
        "FILE: spec.isa.allowed[1]: is the string 'sse'; it must be one of amx_bf16, avx512_bf16, avx512, avx2",
    ]


def test_the_document_is_named_when_there_are_several(
    write: Callable[..., str], minimal: dict[str, Any], changed: Callable[..., dict[str, Any]]
) -> None:
    """In a file with several documents a fault says which, by number and name; all are judged."""
    path = write(CLAIM, minimal, changed({"spec.suspend": 1}), changed({"metadata.name": 7}))

    assert faults(path) == [
        "FILE: document 3 (smollm2-docs): spec.suspend: is the number 1; it must be true or false",
        f"FILE: document 4: metadata.name: is the number 7; it must be {JOB_NAME_RULE}",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "FILE: is empty; it must contain a QLoRAJob"),
        ("# later\n", "FILE: is empty; it must contain a QLoRAJob"),
        (CLAIM, "FILE: does not contain a QLoRAJob, only PersistentVolumeClaim"),
        ("kind: QloraJob", "FILE: does not contain a QLoRAJob, only QloraJob"),
        ("just words", "FILE: the document is the string 'just words'; a job is a map"),
        ("- a", "FILE: the document is a list; a job is a map"),
        ("a: 1\na: 2\n", "FILE: a: is given twice in the same map"),
        ("a: [", "FILE: is not YAML: line 1, column 5: expected the node content, but found '<stream end>'"),
    ],
    ids=[
        "nothing",
        "a comment",
        "another kind",
        "kind in other capitals",
        "words",
        "a list",
        "twice",
        "broken",
    ],
)
def test_a_file_without_a_job_is_refused(text: str, fault: str, write: Callable[..., str]) -> None:
    """A file that holds no job, or is none, is refused with a sentence."""
    assert faults(write(text)) == [fault]


def test_an_object_that_does_not_say_what_it_is_is_judged_as_a_job(write: Callable[..., str]) -> None:
    """Forgotten or wrong headings are faults, never a reason to pass a document over."""
    assert "FILE: kind: is required: QLoRAJob" in faults(write("apiVersion: qlora.dev/v1alpha1"))
    assert "FILE: kind: is the string 'QloraJob'; it must be QLoRAJob" in faults(
        write("{apiVersion: qlora.dev/v1alpha1, kind: QloraJob}")
    )
    assert "FILE: apiVersion: is required: qlora.dev/v1alpha1" in faults(write("kind: QLoRAJob"))
    assert "FILE: spec: is required" in "\n".join(faults(write("spec: null")))


def test_what_cannot_be_opened_is_a_fault(tmp_path: Path) -> None:
    """A missing file, a folder and an impossible name give a sentence, not a traceback."""
    assert faults(str(tmp_path / "none.yaml")) == ["FILE: cannot be read: no such file or directory"]
    assert faults(str(tmp_path)) == ["FILE: cannot be read: is a directory"]
    assert "null character" in faults("a\0b")[0]


def test_an_endless_file_ends() -> None:
    """No more than a file's limit is read of a device."""
    assert faults("/dev/zero") == ["FILE: is larger than 256 KiB; a job has a few"]


def test_a_pipe_is_read_like_a_file(minimal: dict[str, Any]) -> None:
    """`<(...)` of a shell works."""
    reading, writing = os.pipe()
    os.write(writing, yaml.safe_dump(minimal).encode())
    os.close(writing)
    try:
        assert len(load_jobs(f"/dev/fd/{reading}")) == 1
    finally:
        os.close(reading)


def test_a_hyphen_is_standard_input(monkeypatch: pytest.MonkeyPatch, minimal: dict[str, Any]) -> None:
    """`-` reads standard input, and faults call it that."""

    def give(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    give(yaml.safe_dump(minimal))
    assert len(load_jobs("-")) == 1
    give("")
    assert faults("-") == ["standard input: is empty; it must contain a QLoRAJob"]


def test_nulls_of_known_fields_are_not_given() -> None:
    """An API server drops them before it looks further; those of unknown fields stay, to be refused."""
    value = {
        "spec": {
            "image": None,
            "unknown": None,
            "isa": {"allowed": None},
            "scheduling": {"tolerations": [{"key": None}], "nodeSelector": {"a": None, "b": "c"}},
        }
    }

    assert without_nulls(value, job_schema()) == {
        "spec": {"unknown": None, "isa": {}, "scheduling": {"tolerations": [{}], "nodeSelector": {"b": "c"}}}
    }


LABELS = {
    "a value with a space": ("labels", {"a": "b c"}, "metadata.labels.a", "is the string 'b c'"),
    "a value of 64 characters": ("labels", {"a": "b" * 64}, "metadata.labels.a", "at most 63 of them"),
    "a key with a space": ("labels", {"a b": ""}, "metadata.labels", "a key is the string 'a b'; it must be"),
    "a prefix of 254 characters": (
        "labels",
        {"a" * 254 + "/b": ""},
        "metadata.labels",
        "the name of a label",
    ),
    "a prefix in capitals": ("labels", {"A.b/c": ""}, "metadata.labels", "such as kubernetes.io/hostname"),
    "an annotation's key": ("annotations", {"a b": ""}, "metadata.annotations", "a key is the string 'a b'"),
}


@pytest.mark.parametrize(("field", "entries", "path", "phrase"), LABELS.values(), ids=LABELS)
def test_labels_that_an_api_server_refuses_are_faults(
    field: str, entries: dict[str, str], path: str, phrase: str, changed: Callable[..., dict[str, Any]]
) -> None:
    """Metadata has no schema of ours in the CRD, but the API server's own rules."""
    with pytest.raises(InvalidJobError) as error:
        parse_job(changed({f"metadata.{field}": entries}))

    assert [where for where, _ in error.value.faults] == [path]
    assert phrase in error.value.faults[0][1]


def test_labels_that_an_api_server_takes_are_none(changed: Callable[..., dict[str, Any]]) -> None:
    """A prefix, an empty value, null, and capitals in an annotation's prefix are all right."""
    labels = {"app.kubernetes.io/part-of": "A_b.c-1", "a": "", "b": None}

    assert (
        parse_job(changed({"metadata.labels": labels, "metadata.annotations": {"A.b/C": "d e"}})) is not None
    )


def test_the_models_metadata_is_kubernetes() -> None:
    """What the model reads of metadata is among the fields that a file may have."""
    assert {info.alias for info in Metadata.model_fields.values()} <= set(OBJECT_META)


def test_a_refused_job_says_why_in_one_line(changed: Callable[..., dict[str, Any]]) -> None:
    """The error of a single document is readable where there is no file to name."""
    with pytest.raises(
        InvalidJobError, match=r"spec\.backoffLimit: is the number -1; it must be an integer from 0"
    ):
        parse_job(changed({"spec.backoffLimit": -1}))


# --- from the API server


def test_an_object_of_the_api_server_is_read(minimal: dict[str, Any]) -> None:
    """Nothing is ignored of an object that this release wrote."""
    job, ignored = parse_api_object({**minimal, "status": {"phase": "Running"}})

    assert (job.spec, ignored) == (parse_job(minimal).spec, [])  # type: ignore[union-attr]
    assert job.status is not None
    assert job.status.phase == "Running"


def test_what_a_newer_definition_adds_is_ignored_and_named(changed: Callable[..., dict[str, Any]]) -> None:
    """An API server sets the defaults of fields that this operator does not know, in every job."""
    tolerations = [{"operator": "Exists", "until": "noon"}]
    raw = changed(
        {
            "spec.notifications": {"onEnd": []},
            "spec.training.rslora": False,
            "spec.scheduling": {"tolerations": tolerations},
            "metadata.later": 1,
            "status": {"later": 1, "attempt": 3},
        }
    )
    job, ignored = parse_api_object(raw)

    assert sorted(ignored) == [
        "spec.notifications",
        "spec.scheduling.tolerations[0].until",
        "spec.training.rslora",
    ]
    assert job.status is not None
    assert job.status.attempt == 3


def test_a_value_that_is_not_known_is_an_error(changed: Callable[..., dict[str, Any]]) -> None:
    """What the user asked for is never replaced by something else."""
    with pytest.raises(ValidationError, match="scheme"):
        parse_api_object(changed({"spec.quantization": {"scheme": "int2"}}))


def test_files_are_read_strictly(changed: Callable[..., dict[str, Any]]) -> None:
    """A field that the user misspelled is a fault in a file, as it is for kubectl."""
    with pytest.raises(InvalidJobError, match="no such field"):
        parse_job(changed({"spec.notifications": {}}))
