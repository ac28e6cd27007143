"""The chart's values, and what is made from them."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from qlora_operator.api.names import ConditionType
from qlora_operator.controller.metrics import Metrics
from qlora_operator.settings import Settings

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "qlora-operator"
CASES = Path(__file__).parent / "cases.yaml"
OPEN = {"affinity", "resources", "imagePullSecrets", "tolerations", "scrapers", "egress", "global"}
"""Values that are Kubernetes' own types, which the API server checks."""


def values() -> dict[str, Any]:
    """The default values."""
    content = yaml.safe_load((CHART / "values.yaml").read_text())
    assert isinstance(content, dict)
    return content


def paths(section: dict[str, Any], schema: dict[str, Any], parent: str = "") -> set[str]:
    """Path of every value set in the section; those that the schema does not open are sections themselves."""
    found = set()
    for key, value in section.items():
        inner = schema["properties"][key]
        path = f"{parent}{key}"
        found |= paths(value, inner, f"{path}.") if "properties" in inner else {path}
    return found


def test_every_setting_of_the_operator_is_a_value() -> None:
    """What an administrator may set in the operator's settings, the chart can set; and nothing else as such."""
    keys = {field.alias or name for name, field in Settings.model_fields.items()}
    there = values()
    settings = {**there["jobs"], **there["timing"]}

    assert (settings.keys() - {"image"}) | {"trainerImage", "scrapers"} == keys


def test_default_values_are_the_settings_defaults() -> None:
    """An operator that the chart installs does what one without settings does."""
    there = values()
    settings = {key: value for key, value in {**there["jobs"], **there["timing"]}.items() if key != "image"}

    assert Settings.model_validate({"trainerImage": "x", **settings}) == Settings(trainer_image="x")


def test_the_schema_is_closed() -> None:
    """No object of the schema takes a key that it does not describe, but for Kubernetes' own types."""
    opened = []
    pending = [("", json.loads((CHART / "values.schema.json").read_text()))]
    while pending:
        path, node = pending.pop()
        kinds = node["type"] if isinstance(node["type"], list) else [node["type"]]
        if "object" in kinds and "additionalProperties" not in node:
            opened.append(path)
        pending += [(key, child) for key, child in node.get("properties", {}).items()]
        pending += [(path, node["items"])] if "items" in node else []

    assert set(opened) <= OPEN


def test_every_value_has_a_case() -> None:
    """Each of the chart's values is set by one of the cases that are rendered and sent to an API server."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    cases = yaml.safe_load(CASES.read_text())

    assert paths(values(), schema) == {path for case in cases.values() for path in paths(case, schema)}


def test_the_charts_version_is_the_packages() -> None:
    """The images that the chart names by its appVersion are this source's."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert (chart["version"], chart["appVersion"]) == (project["version"], project["version"])


def series() -> set[str]:
    """Names of the series that an operator shows."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, "1")
    metrics.restarts.labels("Stalled", "user")
    metrics.jobs_finished.labels("team", "Failed")
    for counter in (metrics.core_hours, metrics.queue_seconds, metrics.lost_steps, metrics.energy):
        counter.labels("team")
    metrics.cost.labels("team", "EUR")
    metrics.exports.labels("team", "merged")
    metrics.notifications.labels("failed")
    metrics.api_request("get", "jobs", 200, 0.1)
    names = {sample.name for family in registry.collect() for sample in family.samples}
    return names | {family.name for family in registry.collect()}


@pytest.mark.parametrize("file", ["files/dashboard.json", "templates/prometheusrule.yaml"])
def test_metrics_that_are_looked_at_exist(file: str) -> None:
    """The dashboard and the alerts ask for series that the operator has."""
    asked = set(re.findall(r"\bqlora_[a-z_]+", (CHART / file).read_text()))

    assert asked
    assert asked - series() == set()


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    """Each panel has a place and an id of its own."""
    panels = json.loads((CHART / "files" / "dashboard.json").read_text())["panels"]
    cells = [
        (place["x"] + x, place["y"] + y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["w"])
        for y in range(place["h"])
    ]

    assert len(set(cells)) == len(cells)
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.parametrize("language", ["lua", "yaml"])
def test_health_checks_name_conditions_that_exist(language: str) -> None:
    """Argo CD's and Flux's checks in docs/install.md read conditions that a job has."""
    text = (ROOT / "docs" / "install.md").read_text()
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    named = {name for block in blocks for name in re.findall(r"type == ['\"](\w+)['\"]", block)}
    named |= {name for block in blocks for name in re.findall(r"is\.(\w+)", block)}

    assert {"Complete", "Failed"} <= named <= set(ConditionType)
