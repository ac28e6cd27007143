"""The oldest Kubernetes that the chart installs on: what it asks of the API server must be there.

The tests against an API server run on one version; `KUBERNETES_VERSION` selects another.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "qlora-operator"
RENDERED = ROOT / "manifests" / "install.yaml"
LITERAL = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")

SINCE = {
    # The CEL environment of the API server: the minor version in which a function came.
    **dict.fromkeys(["all", "contains", "exists", "filter", "has", "int", "double", "map", "matches"], 25),
    **dict.fromkeys(["size", "startsWith", "type", "split", "join"], 25),
    **dict.fromkeys(["group", "resource", "namespace", "name", "check", "allowed"], 27),  # authorizer
    **dict.fromkeys(["asApproximateFloat", "compareTo", "isQuantity", "quantity", "orValue"], 28),
    # Kinds.
    **dict.fromkeys(["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"], 30),
    "CustomResourceDefinition": 16,
}
OLDEST_OF_ALL = {
    "v1",
    "apps/v1",
    "rbac.authorization.k8s.io/v1",
    "policy/v1",
    "networking.k8s.io/v1",
    "batch/v1",
}


def oldest() -> int:
    """The minor version in the chart's kubeVersion."""
    wanted = yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"]
    match = re.fullmatch(r">=1\.(\d+)\.0-0", wanted)
    assert match is not None, wanted
    return int(match[1])


def expressions(part: Any) -> Iterator[str]:
    """All CEL in an object."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key in ("rule", "expression", "messageExpression") and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(part, list):
        for each in part:
            yield from expressions(each)


def test_no_function_is_newer_than_the_oldest_kubernetes() -> None:
    """An API server refuses a definition, or a policy, that calls what it does not know."""
    objects = list(yaml.safe_load_all(RENDERED.read_text()))
    called = {
        name
        for each in objects
        for text in expressions(each)
        for name in re.findall(r"([A-Za-z_]\w*)\(", LITERAL.sub("''", text))
    }

    assert {"has", "quantity", "allowed"} <= called
    assert called - SINCE.keys() == set(), "find out since when, and add it"
    assert {name for name in called if SINCE[name] > oldest()} == set()


def test_no_kind_is_newer_than_the_oldest_kubernetes() -> None:
    """A policy is not left out where its kind is missing."""
    objects = [each for each in yaml.safe_load_all(RENDERED.read_text()) if each]
    kinds = {each["kind"] for each in objects if each["apiVersion"] not in OLDEST_OF_ALL}

    assert kinds - SINCE.keys() == set(), "find out since when, and add it"
    assert {kind for kind in kinds if SINCE[kind] > oldest()} == set()


def test_documentation_names_the_oldest_kubernetes() -> None:
    """Wherever it says what is needed."""
    pages = [ROOT / "docs" / name for name in ("install.md", "operator.md", "quickstart.md")]

    for page in pages:
        assert re.findall(r"Kubernetes 1\.(\d+) or newer", page.read_text()) == [str(oldest())], page
