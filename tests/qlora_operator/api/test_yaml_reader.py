"""Reading files as kubectl does."""

import contextlib
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_operator.api.yaml_reader import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_VALUES,
    DocumentError,
    child_path,
    plain_value,
    read_documents,
)

AS_KUBECTL_READS = [
    ("2e-4", 0.0002),
    ("1e3", 1000),
    ("1e+3", 1000),
    ("12e03", 12000),
    ("4.0", 4),
    ("1.", 1),
    (".5", 0.5),
    ("-.5", -0.5),
    ("+5", 5),
    ("-0", 0),
    ("00", 0),
    ("08", 8),
    ("0777", 511),
    ("0o7", 7),
    ("0x1F", 31),
    ("-0x1f", -31),
    ("0x1_F", 31),
    ("0b11", 3),
    ("1_000", 1000),
    ("1__0", 10),
    ("1_", 1),
    ("1_0.5", 10.5),
    ("1_000e2", 100000),
    ("_1", "_1"),
    (".e5", ".e5"),
    ("1:30", "1:30"),
    ("1e400", "1e400"),
    ("1e21", 1e21),
    ("9223372036854775807", 2**63 - 1),
    ("2024-01-01", "2024-01-01"),
    ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z"),
    ("y", True),
    ("yes", True),
    ("on", True),
    ("True", True),
    ("TRUE", True),
    ("tRue", "tRue"),
    ("n", False),
    ("Off", False),
    ("~", None),
    ("Null", None),
    ("", None),
    ("=", "="),
    ("16Gi", "16Gi"),
    ("'2e-4'", "2e-4"),
    ('"yes"', "yes"),
    ("!!str 5", "5"),
    ("!!float 5", 5),
]
"""What stands in a file, and what kubectl 1.32 sends for it (`kubectl annotate --local -o json`)."""


@pytest.mark.parametrize(("written", "value"), AS_KUBECTL_READS, ids=[pair[0] for pair in AS_KUBECTL_READS])
def test_scalars_mean_what_kubectl_takes_them_for(written: str, value: object) -> None:
    """A scalar has kubectl's value, and its type."""
    (document,) = read_documents(f"a: {written}\n".encode())

    assert document == {"a": value}
    assert type(document["a"]) is type(value)


def test_keys_are_strings() -> None:
    """Whatever a key looks like, kubectl sends a string: `on` is "true"."""
    assert read_documents(b"{5: a, on: b, 1e3: c, x: d, ~: e}") == [
        {"5": "a", "true": "b", "1000": "c", "x": "d", "null": "e"}
    ]


def test_a_file_may_hold_several_documents() -> None:
    """Documents are told apart by `---`; empty ones do not count."""
    assert read_documents(b"---\na: 1\n---\n---\n# nothing\n---\nb: 2\n...\n") == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize("content", [b"", b"\n", b"# only a comment\n", b"---\n---\n", b"\xef\xbb\xbf"])
def test_an_empty_file_holds_no_document(content: bytes) -> None:
    """Comments and separators are no documents."""
    assert read_documents(content) == []


def test_json_is_read_too() -> None:
    """JSON has the same values, indented by tabs as well; so does YAML's own flow style."""
    text = b'\n{\n\t"a": [1.0, 1e3, 2e-4, true, null, "2e-4"]\n}\n'

    assert read_documents(text) == [{"a": [1, 1000, 0.0002, True, None, "2e-4"]}]
    assert read_documents(b"{a: [1.0, 1e3]}") == [{"a": [1, 1000]}]


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    """Files of some editors begin with one."""
    assert read_documents(b"\xef\xbb\xbfa: 1\n") == [{"a": 1}]


def test_anchors_and_merges_are_resolved() -> None:
    """An alias is a copy; `<<` adds what is not given, the first of several maps winning."""
    text = b"""
base: &base {a: 1, b: 2}
other: &other {b: 3, c: 4}
copy: *base
merged: {<<: [*base, *other], a: 9}
"""
    (document,) = read_documents(text)

    assert document["copy"] == document["base"]
    assert document["copy"] is not document["base"]
    assert document["merged"] == {"a": 9, "b": 2, "c": 4}


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)
)
REFUSED = {
    "duplicate key": ("a:\n  b: 1\n  b: 2\n", "is given twice in the same map"),
    "duplicate key in JSON": ('{"a": {"b": 1, "b": 2}}', "is given twice in the same map"),
    "keys alike once they are strings": ("{1: a, '1': b}", "is given twice"),
    "alias bomb": (BOMB, f"contains more than {MAX_VALUES} values"),
    "merge bomb": (MERGE_BOMB, f"contains more than {MAX_VALUES} values"),
    "alias of itself": ("a: &a [*a]", "or an alias contains itself"),
    "map of itself": ("a: &a\n  b: *a\n", "or an alias contains itself"),
    "alias of nothing": ("a: *b", "line 1, column 4: found undefined alias"),
    "deep list": ("[" * 10_000, f"is nested deeper than {MAX_DEPTH} levels"),
    "deep list that ends": ("[" * 200 + "]" * 200, f"is nested deeper than {MAX_DEPTH} levels"),
    "deep JSON": ('{"a":' * 30_000, f"is nested deeper than {MAX_DEPTH} levels"),
    "deep JSON that ends": ('{"a":' * 100 + "1" + "}" * 100, f"is nested deeper than {MAX_DEPTH} levels"),
    "not a number": ("a: .nan", "is .nan; it must be a finite number"),
    "infinity": ("a: -.INF", "is -.INF; it must be a finite number"),
    "infinity in JSON": ('{"a": Infinity}', "is inf; it must be a finite number"),
    "a number beyond bounds in JSON": ('{"a": 1e999}', "is not a number that a job can have"),
    "tag": ("a: !!binary aGk=", "has the tag '!!binary'"),
    "Python's tag": ("a: !!python/object/apply:os.system [ls]", "has the tag '!!python/object/apply:os.system'"),
    "half a character in YAML": ('a: "\\ud800"', "half of a surrogate pair"),
    "half a character in JSON": ('{"a": ["\\ud800"]}', "half of a surrogate pair"),
    "own tag": ("a: !secret b", "has the tag '!secret'"),
    "key that is a list": ("? [a]\n: b", "a key is a map or a list"),
    "merge of a word": ("<<: a", "must be a map or a list of maps"),
    "tab": ("a:\n\tb: 1", "line 2, column 1: found character '\\t' that cannot start any token; YAML is indented"),
    "unclosed quote": ('a: "b', "is not YAML: line 1, column 6"),
    "unclosed quote above": ('a: "b\nc: d\n', "while scanning a quoted scalar that begins in line 1"),
    "unclosed JSON": ('{"a": 1', "is not YAML: line 1"),
    "two values": ("a: b: c", "mapping values are not allowed here"),
    "control character": ("a: \x07", "is not YAML: unacceptable character"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "phrase"), REFUSED.values(), ids=REFUSED)
def test_what_no_job_needs_is_refused_with_a_sentence(text: str, phrase: str) -> None:
    """Broken, ambiguous and hostile files are refused, soon, and with the reason."""
    with pytest.raises(DocumentError) as error:
        read_documents(text.encode())

    assert phrase in error.value.message


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        pytest.param(b"\x7fELF\0\0", "is a binary file", id="binary"),
        pytest.param("a: ä".encode("latin-1"), "is not UTF-8 text: byte 3 is 0xe4", id="latin-1"),
        pytest.param("a: b".encode("utf-16"), "or not UTF-8", id="utf-16"),
        pytest.param(b"a" * (MAX_BYTES + 1), "is larger than 256 KiB", id="huge"),
    ],
)
def test_bytes_that_are_no_text_are_refused(content: bytes, phrase: str) -> None:
    """Before any parser sees it, a file must be a short text in UTF-8."""
    with pytest.raises(DocumentError) as error:
        read_documents(content)

    assert phrase in error.value.message


def test_a_fault_inside_a_document_has_its_path() -> None:
    """A duplicate or a bad number is found by the names that lead to it."""
    with pytest.raises(DocumentError) as error:
        read_documents(b"spec:\n  isa:\n    allowed: [{a: .inf}]\n")

    assert error.value.path == "spec.isa.allowed[0].a"


@pytest.mark.parametrize(
    ("path", "part", "expected"),
    [
        ("", "spec", "spec"),
        ("spec", "isa", "spec.isa"),
        ("spec.isa", 1, "spec.isa[1]"),
        ("spec", "kubernetes.io/os", "spec.kubernetes.io/os"),
        ("spec", "a b\n", r"spec.'a b\n'"),
        ("spec", "\ud800", r"spec.'\ud800'"),
    ],
)
def test_paths_are_printable(path: str, part: str | int, expected: str) -> None:
    """A path is what a user would write; names that cannot be printed are escaped."""
    assert child_path(path, part) == expected


@settings(deadline=None)
@given(
    st.binary(max_size=200) | st.text(alphabet="ab:-[]{}&*<>!|'\"# \n\t%~.0e", max_size=80).map(str.encode)
)
def test_no_bytes_raise_anything_else(content: bytes) -> None:
    """Any file either has documents, which are plain values, or raises DocumentError."""
    with contextlib.suppress(DocumentError):
        json.dumps(read_documents(content), allow_nan=False)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=20).filter(str.isprintable),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abcxyz1.~", min_size=1), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text("abc", min_size=2), values, min_size=1, max_size=4))
def test_json_means_the_same_read_as_json_and_as_yaml(document: dict[str, object]) -> None:
    """Which of the two parsers reads a JSON text makes no difference."""
    text = json.dumps(document, ensure_ascii=False)

    assert read_documents(text.encode()) == [document]
    assert read_documents(f"# YAML now\n{text}".encode()) == [document]


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_written_by_a_yaml_library_is_read_back(number: float) -> None:
    """Floats survive, whole ones as integers."""
    assert plain_value(yaml.safe_dump(number).split("\n")[0]) == number
