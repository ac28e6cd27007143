"""What is generated from the models."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qlora_contract.exit_codes import ExitCode
from qlora_operator.api import names
from qlora_operator.api.loader import load_jobs
from qlora_operator.api.schema import Schema, custom_resource_definition, job_schema
from qlora_operator.api.yaml_reader import read_documents

ROOT = Path(__file__).parents[2]
GENERATE = ROOT / "manifests/generate.py"
CRD = "manifests/crd/qlora.dev_qlorajobs.yaml"
REFERENCE = "docs/reference/qlorajob.md"


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the generator as a user does."""
    return subprocess.run(
        [sys.executable, str(GENERATE), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def field_paths(node: Schema, path: str) -> list[str]:
    """The path of every field within an object, lists opened."""
    paths = []
    for name, child in node.get("properties", {}).items():
        paths += [f"{path}.{name}", *field_paths(child.get("items", child), f"{path}.{name}")]
    return paths


def test_generated_files_are_up_to_date() -> None:
    """The CRD and the reference in the tree are what the models give now."""
    result = generate("--check")

    assert (result.returncode, result.stdout) == (0, ""), "run: python manifests/generate.py"


def test_a_check_says_what_differs(tmp_path: Path) -> None:
    """A changed or missing file makes the check fail and shows the difference; it writes nothing."""
    assert generate("--root", str(tmp_path)).returncode == 0
    crd = tmp_path / CRD
    crd.write_text(crd.read_text().replace("shortNames", "longNames"))
    (tmp_path / REFERENCE).unlink()
    result = generate("--check", "--root", str(tmp_path))

    assert result.returncode == 1
    assert "-    longNames:\n+    shortNames:\n" in result.stdout
    assert "+# QLoRAJob, field by field" in result.stdout
    assert not (tmp_path / REFERENCE).exists()


def test_the_crds_text_is_the_definition() -> None:
    """What kubectl reads from the file is what the code made."""
    text = (ROOT / CRD).read_bytes()

    assert read_documents(text) == [custom_resource_definition()]
    assert yaml.safe_load(text) == custom_resource_definition()


def test_the_reference_has_every_field() -> None:
    """Every field of spec and status has a row under its object's heading."""
    sections = dict(
        section.replace("[]", "").split("\n", 1)
        for section in (ROOT / REFERENCE).read_text().split("\n## ")[1:]
    )
    for top in ("spec", "status"):
        for path in field_paths(job_schema()["properties"][top], top):
            parent, _, name = path.rpartition(".")
            section = sections[parent]
            assert f"\n| `{name}` | " in section, path


def test_rows_of_the_reference_are_whole() -> None:
    """A bar within a cell is escaped, so that every row has five cells."""
    rows = [line for line in (ROOT / REFERENCE).read_text().splitlines() if line.startswith("| ")]

    assert [row for row in rows if len(re.findall(r"(?<!\\)\|", row)) != 6] == []


def rows(page: str) -> dict[str, list[str]]:
    """First cell of each row of a page's tables -> the others."""
    text = (ROOT / "docs/reference" / page).read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): others for first, *others in cells}


def test_every_phase_condition_and_reason_has_its_row() -> None:
    """What `kubectl describe` shows is found in the reference, with the docstring that the code has."""
    table = rows("conditions.md")

    assert {*names.Phase, *names.ConditionType, *names.Reason} <= set(table)
    assert table["Queued"] == ["`QuotaReserved` False", "The queue has not admitted the job."]
    assert table["Refused"][0] == "`Initialized` False or `Running` False"
    assert table["ImageNotAllowed"][1].startswith("The administrator does not allow")


def test_every_exit_code_has_its_row() -> None:
    """Each code leads to a reason and a price."""
    table = rows("exit-codes.md")

    assert {str(int(code)) for code in ExitCode} <= set(table)
    assert table["12"][:3] == ["`MODEL_UNUSABLE`", "`ModelUnusable`", "the job: it is never retried"]
    assert table["50"][2] == "one of `infrastructureBackoffLimit`"


@pytest.mark.parametrize("sample", ["minimal.yaml", "full.yaml", "demo.yaml", "two-nodes.yaml"])
def test_samples_are_valid(sample: str) -> None:
    """What a user copies is a valid job."""
    (job,) = load_jobs(str(ROOT / "manifests/samples" / sample))

    assert names.is_job_name(job.metadata.name)


def test_the_demo_on_two_nodes_is_the_demo() -> None:
    """It has as many ranks, in pods of their own; all else is the same, and so is the adapter."""
    (here,), (there,) = (
        load_jobs(str(ROOT / "manifests/samples" / name)) for name in ("demo.yaml", "two-nodes.yaml")
    )
    topology = here.spec.topology.model_copy(update={"pods": 2, "ranks_per_pod": 1})

    assert (here.spec.topology.pods, here.spec.topology.ranks_per_pod) == (1, 2)
    assert there == here.model_copy(update={"spec": here.spec.model_copy(update={"topology": topology})})


def test_the_smallest_sample_cannot_be_smaller() -> None:
    """Every line of it is needed: the file without it is invalid."""
    lines = (ROOT / "manifests/samples/minimal.yaml").read_text().splitlines()
    (job,) = read_documents("\n".join(lines).encode())
    spec = job_schema()["properties"]["spec"]

    assert list(job["spec"]) == spec["required"]
    for field in ("model", "topology"):
        assert list(job["spec"][field]) == spec["properties"][field]["required"]
    assert list(job["spec"]["dataset"]) == ["source"]  # or sources
    assert list(job["spec"]["training"]) == ["epochs"]


def test_the_full_sample_names_every_field() -> None:
    """A user finds each field of spec in full.yaml, in its place; what the job does without is a comment."""
    text = (ROOT / "manifests/samples/full.yaml").read_text()
    commented = re.sub(r"^( *)# ((- )?[a-zA-Z]+:( |$))", r"\1\2", text, flags=re.MULTILINE)
    (job,) = read_documents(commented.encode())

    named = set()
    pending = [("spec", job["spec"])]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            named |= {f"{path}.{name}" for name in value}
            pending += [(f"{path}.{name}", item) for name, item in value.items()]
        elif isinstance(value, list):
            pending += [(path, item) for item in value]
    assert set(field_paths(job_schema()["properties"]["spec"], "spec")) - named == set()


def test_values_of_the_full_sample_are_the_defaults_unless_it_says_so() -> None:
    """A sample that shows another value without a word would be taken for the default."""
    spec = job_schema()["properties"]["spec"]["properties"]
    (job,) = read_documents((ROOT / "manifests/samples/full.yaml").read_bytes())
    other = [
        f"{section}.{name}"
        for section, value in job["spec"].items()
        if isinstance(value, dict)
        for name, item in value.items()
        if "default" in spec[section]["properties"][name]
        and spec[section]["properties"][name]["default"] != item
    ]

    text = (ROOT / "manifests/samples/full.yaml").read_text()
    unsaid = [path for path in other if not re.search(rf" {path.split('.')[1]}:.*# .*default", text)]
    assert unsaid == []
