"""`kubectl explain`: what a user reads of the API without leaving the terminal."""

import re
from collections.abc import Iterator

import pytest

from qlora_operator.api import names
from qlora_operator.api.schema import Schema, job_schema
from testcluster.cluster import Cluster

pytestmark = pytest.mark.cluster

JARGON = re.compile(
    r"`|\bNone\b|\bnull\b|pydantic|[Pp]ython|\b(dict|bool|str|int|float|tuple)\b|docstring|\bTODO\b"
)


def objects(node: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """Every object below, itself included, with the path that explain knows it by."""
    inner = node.get("items", node)
    if "properties" in inner:
        yield path, inner
        for name, child in inner["properties"].items():
            yield from objects(child, f"{path}.{name}")


OBJECTS = {
    path: node
    for top in ("spec", "status")
    for path, node in objects(job_schema()["properties"][top], f"{names.SHORT_NAME}.{top}")
}


def explained(text: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """What explain prints of an object: its description, and type and description of each field."""
    head, _, body = text.partition("\nFIELDS:\n")
    description = " ".join(head.partition("DESCRIPTION:")[2].split())
    fields = {}
    for block in re.split(r"^  (?=\w+\t<)", body, flags=re.MULTILINE)[1:]:
        heading, *lines = block.splitlines()
        name, kind = heading.split("\t")
        words = [line for line in lines if not line.startswith("  enum: ")]
        fields[name] = (kind, " ".join(" ".join(words).split()))
    return description, fields


@pytest.mark.parametrize("path", OBJECTS)
def test_every_field_is_explained(path: str, told_cluster: Cluster) -> None:
    """An object and each of its fields has whole sentences of plain words."""
    description, fields = explained(told_cluster.kubectl("explain", path))

    assert set(fields) == set(OBJECTS[path]["properties"])
    for name, text in {"": description, **{name: text for name, (_, text) in fields.items()}}.items():
        assert re.match(r"[A-Za-z]", text), f"{path}.{name}: {text!r}"
        assert text.endswith((".", ".)")), f"{path}.{name}: {text!r}"
        assert not JARGON.search(text), f"{path}.{name}: {text!r}"


def test_what_must_be_given_is_marked(told_cluster: Cluster) -> None:
    """Fields without a default say that they are required, those with one say which."""
    _, fields = explained(told_cluster.kubectl("explain", "qlj.spec.topology"))

    assert fields["memoryPerRank"][0] == "<string> -required-"
    assert fields["pods"][0] == "<integer>"
    assert fields["pods"][1].endswith("Default: 1.")


def test_one_field_can_be_asked_for(told_cluster: Cluster) -> None:
    """A field's own page has its type, its values and its description."""
    text = " ".join(told_cluster.kubectl("explain", "qlj.spec.training.schedule").split())

    assert "FIELD: schedule <string> ENUM: linear cosine constant DESCRIPTION: Learning rate" in text


def tree(node: Schema, indent: int) -> Iterator[str]:
    """The lines that `explain --recursive` begins with for each field of an object."""
    for name, child in node.get("items", node).get("properties", {}).items():
        yield f"{' ' * indent}{name}\t<"
        yield from tree(child, indent + 2)


def test_the_whole_tree_is_shown(told_cluster: Cluster) -> None:
    """`--recursive` lists every field of spec and status in its place."""
    text = told_cluster.kubectl("explain", "qlj", "--recursive")
    spec = text.partition("\n  spec\t")[2].partition("\n  status\t")
    for part, top in ((spec[0], "spec"), (spec[2], "status")):
        lines = [line for line in part.splitlines() if "\t<" in line and line.startswith(" ")]
        beginnings = sorted(line[: line.index("\t<") + 2] for line in lines)
        assert beginnings == sorted(tree(job_schema()["properties"][top], 4))
