"""What keeps sources from being a release, and what publishing one takes."""

import importlib
from typing import Any

import pytest

release: Any = importlib.import_module("release")

CHART = 'name: qlora-operator\nversion: 1.2.0\nappVersion: "1.2.0"\n'
CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-01-01\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(("v1.2.0", "1.2.0", CHART, CHANGELOG), [], id="all agree"),
        pytest.param(
            ("v1.3.0", "1.2.0", CHART, CHANGELOG),
            ["the tag is v1.3.0, but pyproject.toml has version 1.2.0: it must be v1.2.0"],
            id="another tag",
        ),
        pytest.param(
            ("v1.2.0", "1.2.0", CHART.replace('"1.2.0"', '"1.1.0"'), CHANGELOG),
            ["Chart.yaml has appVersion 1.1.0: it must be 1.2.0"],
            id="the chart of another release",
        ),
        pytest.param(
            ("v1.2.0", "1.2.0", CHART, "## [Unreleased]\n"),
            ["CHANGELOG.md has no section [1.2.0]: rename Unreleased, and begin a new one"],
            id="no changes told",
        ),
    ],
)
def test_a_release_agrees_with_its_tag(arguments: tuple[str, str, str, str], expected: list[str]) -> None:
    """Version, chart and changelog are the tag's; each that is not is named with what would be right."""
    assert release.faults(*arguments) == expected


def test_what_is_released_is_what_was_tagged() -> None:
    """Neither uncommitted changes nor another commit."""
    assert release.git_faults("v1.2.0", "", ["v1.2.0"]) == []
    assert len(release.git_faults("v1.2.0", " M README.md\n", [])) == 2


def test_publishing_names_all_that_was_built() -> None:
    """Images before the chart that names them, and every file with its sum."""
    files = [
        "qlora_operator-1.2.0-py3-none-any.whl",
        "qlora_operator-1.2.0.tar.gz",
        "qlora-operator-1.2.0.tgz",
        "SHA256SUMS",
    ]
    commands = release.publishing("1.2.0", "registry.example", files)
    text = "\n".join(commands)

    assert text.index("push registry.example/qlora-trainer:1.2.0") < text.index(
        "helm push dist/qlora-operator"
    )
    assert (
        "twine upload dist/qlora_operator-1.2.0-py3-none-any.whl dist/qlora_operator-1.2.0.tar.gz\n" in text
    )
    assert "--predicate dist/qlora-operator-1.2.0.spdx.json registry.example/qlora-operator@DIGEST" in text
    for pushed in ("qlora-operator", "qlora-trainer", "charts/qlora-operator"):
        assert f"cosign sign --key signing.key registry.example/{pushed}@DIGEST" in text
        assert (
            "cosign attest --key signing.key --type slsaprovenance1 --predicate dist/provenance.json "
            f"registry.example/{pushed}@DIGEST"
        ) in text
    assert all(f"dist/{name}" in commands[-1] for name in files)
