"""Earlier releases, frozen: their code to run beside today's, and random jobs for both.

0.1.0.tar.xz is `git archive COMMIT operator/qlora_operator trainer/qlora_contract manifests/crd | xz -9e` of the commit
that the release was made from. It is never changed; a release adds another one.
"""

import importlib
import math
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from builders import job_manifest
from qlora_operator.api.schema import INT_OR_STRING, Schema, job_schema

ARCHIVE = Path(__file__).with_name("0.1.0.tar.xz")
CRD = "manifests/crd/qlora.dev_qlorajobs.yaml"


@pytest.fixture(scope="session")
def old_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Release 0.1.0, unpacked."""
    root = tmp_path_factory.mktemp("release-0.1.0")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.fixture(scope="session")
def old(old_root: Path) -> SimpleNamespace:
    """The pure parts of release 0.1.0, in this process."""
    names = {
        "run": "qlora_contract.run",
        "progress": "qlora_contract.progress",
        "types": "qlora_operator.api.types",
        "run_config": "qlora_operator.desired.run_config",
        "decision": "qlora_operator.status.decision",
        "observation": "qlora_operator.status.observation",
        "unreadable": "qlora_operator.status.unreadable",
    }
    modules = _import_from(old_root, list(names.values()))
    return SimpleNamespace(**{short: modules[name] for short, name in names.items()})


def _import_from(root: Path, names: list[str]) -> dict[str, ModuleType]:
    """Modules of another release, which have the names of today's: those are put aside meanwhile."""
    ours = ("qlora_contract", "qlora_operator")
    today = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ours}
    folders = [str(root / "operator"), str(root / "trainer")]
    for name in today:
        del sys.modules[name]
    sys.path[:0] = folders
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        del sys.path[:2]
        for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
            del sys.modules[name]
        sys.modules.update(today)


@pytest.fixture(scope="session")
def old_crd(old_root: Path) -> dict[str, Any]:
    """The CRD of release 0.1.0."""
    crd = yaml.safe_load((old_root / CRD).read_text())
    assert isinstance(crd, dict)
    return crd


# --- random jobs

SOURCES = {
    "model": ["pvc://team/model", "hf://org/model", "s3://bucket/model"],
    "dataset": ["pvc://team/data.jsonl", "hf://datasets/org/data", "s3://bucket/data"],
    "destination": ["hf://org/adapter", "s3://bucket/adapters"],
}
WORDS = {
    "chatTemplate": st.sampled_from(["bundled:auto", "{{ messages }}"]),
    "memoryPerRank": st.sampled_from(["1Gi", "1.5G", "100000001"]),
    "targetModules": st.lists(st.sampled_from(["q_proj", "v_proj", "all-linear"]), min_size=1, max_size=3),
    "destination": st.sampled_from(SOURCES["destination"]),
}
CARRIED = (
    "model",
    "dataset",
    "adapter",
    "quantization",
    "training",
    "evaluation",
    "checkpoint",
    "output",
    "distributed",
    "topology",
    "terminationGracePeriodSeconds",
)
"""Fields of spec that ranks need, besides workspace."""


def texts(node: Schema) -> SearchStrategy[str]:
    """Texts that a schema accepts."""
    if "pattern" not in node:
        return st.text("ab {}", min_size=node.get("minLength", 0), max_size=min(node["maxLength"], 9))
    return st.from_regex(node["pattern"], fullmatch=True).filter(
        lambda text: node.get("minLength", 0) <= len(text) <= node["maxLength"]
    )


def values(node: Schema, name: str) -> SearchStrategy[Any]:
    """Values that a schema accepts."""
    low, high = node.get("minimum"), node.get("maximum")
    if name in WORDS:
        return WORDS[name]
    if "enum" in node:
        return st.sampled_from(node["enum"])
    if INT_OR_STRING in node:
        return st.integers(low, high) | st.just(node["pattern"].strip("^$"))
    match node["type"]:
        case "object" if "properties" not in node:
            entry = values(node["additionalProperties"], "")
            return st.dictionaries(st.sampled_from(["a", "b"]), entry, max_size=2)
        case "object":
            inner = {child: values(schema, child) for child, schema in node["properties"].items()}
            return st.fixed_dictionaries({}, optional=inner)
        case "array":
            return st.lists(values(node["items"], ""), min_size=1, max_size=node["maxItems"])
        case "integer":
            return st.integers(low, high)
        case "number":
            inside = low is not None and node.get("exclusiveMinimum", False)
            below = node.get("exclusiveMaximum", False)
            return st.floats(low, high, exclude_min=inside, exclude_max=below).filter(math.isfinite)
        case "boolean":
            return st.booleans()
    return texts(node)


def _consistent_evaluation(evaluation: dict[str, Any]) -> None:
    """A random section `evaluation` after its rules."""
    if "everySteps" not in evaluation:
        evaluation.pop("keepBest", None)
    if not evaluation.get("keepBest"):
        evaluation.pop("earlyStoppingPatience", None)


def _consistent_training(training: dict[str, Any]) -> None:
    """A random section `training` after its rules, with room for a few virtual tokens."""
    if ("epochs" in training) == ("maxSteps" in training):
        training.pop("maxSteps", None)
        training["epochs"] = 2
    if training.get("globalBatchTokens", 8192) < training.get("maxSequenceLength", 1024):
        training.pop("globalBatchTokens", None)
        training.pop("maxSequenceLength", None)
    if training.get("maxSequenceLength", 1024) < 16:
        training["maxSequenceLength"] = 16
        if training.get("globalBatchTokens", 8192) < 16:
            training["globalBatchTokens"] = 16


def _consistent_initial(adapter: dict[str, Any]) -> None:
    """Random settings of what an adapter starts as: nothing, or another, wherever it is, without further settings."""
    for name in ("initialAdapterRevision", "initialAdapterCredentialsSecret"):
        adapter.pop(name, None)
    if {"promptInit", "prefixProjection"} & adapter.keys():
        adapter.pop("initialAdapter", None)


def _consistent(spec: dict[str, Any], model: str, dataset: str) -> dict[str, Any]:
    """A random spec after the rules between its fields."""
    training, topology = spec.setdefault("training", {}), spec.setdefault("topology", {})
    _consistent_training(training)
    topology.setdefault("memoryPerRank", "2Gi")
    if (
        topology.get("ranksPerPod") != "auto"
        and topology.get("pods", 1) * topology.get("ranksPerPod", 1) > 1024
    ):
        topology["pods"] = 3
    if topology.get("minPods", 1) > topology.get("pods", 1):
        topology["minPods"] = topology.get("pods", 1)
    sections = [(spec.setdefault("model", {}), model), (spec.setdefault("dataset", {}), dataset)]
    several = spec["dataset"].get("sources")
    if several:
        sections = [sections[0], *((each, dataset) for each in several)]
        for name in (
            "source",
            "revision",
            "credentialsSecret",
            "format",
            "columns",
            "trainSplit",
            "evalSplit",
        ):
            spec["dataset"].pop(name, None)
    for section, source in sections:
        section["source"] = source
        if not source.startswith("hf://"):
            section.pop("revision", None)
        if source.startswith("pvc://"):
            section.pop("credentialsSecret", None)
    _consistent_evaluation(spec.get("evaluation", {}))
    _consistent_initial(spec.get("adapter", {}))
    _of_one_method(spec.get("adapter", {}), spec.get("output", {}))
    if "destination" not in spec.get("output", {}):
        spec.get("output", {}).pop("credentialsSecret", None)
    return {"workspace": "pvc://team/work", **spec}


LORA = ("rank", "alpha", "dropout", "targetModules", "rslora", "rankPattern", "alphaPattern", "loraPlusRatio")
VIRTUAL = ("numVirtualTokens", "promptInit", "promptInitText", "prefixProjection", "encoderHiddenSize")


def _of_one_method(adapter: dict[str, Any], output: dict[str, Any]) -> None:
    """Keep of a random adapter what its method has, in place."""
    method = adapter.get("method", "lora")
    for name in VIRTUAL if method == "lora" else LORA:
        adapter.pop(name, None)
    if method == "lora":
        return
    adapter["numVirtualTokens"] = min(adapter.get("numVirtualTokens", 3), 5)
    output.pop("formats", None)
    if "initialAdapter" in adapter:  # which is what they start as
        for name in ("promptInit", "prefixProjection"):
            adapter.pop(name, None)
    if adapter.get("promptInit") != "text":
        adapter.pop("promptInit", None)
        adapter.pop("promptInitText", None)
    else:
        adapter.setdefault("promptInitText", "Answer.")
    if method == "prompt-tuning" or "promptInit" in adapter or not adapter.get("prefixProjection"):
        adapter.pop("prefixProjection", None)
        adapter.pop("encoderHiddenSize", None)


@pytest.fixture(scope="session")
def specs() -> SearchStrategy[dict[str, Any]]:
    """Random valid specs: every field that ranks need, set or not."""
    return _specs(job_schema())


@pytest.fixture(scope="session")
def old_specs(old_crd: dict[str, Any]) -> SearchStrategy[dict[str, Any]]:
    """As specs, with the fields and values that release 0.1.0 had."""
    return _specs(old_crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])


def _specs(job: Schema) -> SearchStrategy[dict[str, Any]]:
    schema = job["properties"]["spec"]["properties"]
    fields = {name: values(schema[name], name) for name in CARRIED}
    return st.builds(
        _consistent,
        st.fixed_dictionaries({}, optional=fields),
        st.sampled_from(SOURCES["model"]),
        st.sampled_from(SOURCES["dataset"]),
    )


@pytest.fixture(scope="session")
def document() -> Callable[..., dict[str, Any]]:
    """document(spec, status=None): a job as the API server returns it."""

    def make(spec: dict[str, Any], status: dict[str, Any] | None = None) -> dict[str, Any]:
        metadata = {"namespace": "team", "uid": "0f-1", "generation": 1}
        return {**job_manifest("demo", metadata=metadata, status=status), "spec": spec}

    return make
