"""The demo's data: apart by module, no answer twice, worth learning from, the same every time."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "demo" / "data.py"
Records = list[dict[str, Any]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    subprocess.run([sys.executable, SCRIPT, folder], check=True, stdout=subprocess.PIPE)
    return folder


@pytest.fixture(scope="session")
def splits(folder: Path) -> dict[str, Records]:
    """The records of each split."""
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    }


def modules(records: Records) -> set[str]:
    """Top-level modules that the questions name."""
    return {record["messages"][0]["content"].split("`")[1].split(".")[0] for record in records}


def answers(records: Records) -> list[str]:
    """The answers' texts."""
    return [record["messages"][1]["content"] for record in records]


def test_there_is_enough_to_learn_and_just_enough_to_evaluate(splits: dict[str, Records]) -> None:
    """At least 1,500 pairs to train on; 200 to 220 to evaluate on, so that it stays quick."""
    assert len(splits["train"]) >= 1500
    assert 200 <= len(splits["eval"]) <= 220


def test_no_module_is_in_both_splits(data: ModuleType, splits: dict[str, Records]) -> None:
    """The splits are apart by top-level module, and every module that is meant for evaluation is there."""
    assert modules(splits["train"]).isdisjoint(modules(splits["eval"]))
    assert modules(splits["eval"]) <= data.EVAL_MODULES
    assert len(modules(splits["eval"])) >= 20


def test_no_text_is_in_both_splits(data: ModuleType, splits: dict[str, Records]) -> None:
    """After its opening sentence no answer occurs twice, within a split or across them."""
    texts = [
        data.normalised(text.partition("`. ")[2] or text.partition("library. ")[2])
        for name in ("train", "eval")
        for text in answers(splits[name])
    ]

    assert all(texts)
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_every_record_is_one_question_and_one_answer(splits: dict[str, Records], name: str) -> None:
    """A record is a chat of a user's turn and an assistant's turn, both plain text, and nothing else."""
    for record in splits[name]:
        assert list(record) == ["messages"]
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"]
        assert all(set(message) == {"role", "content"} for message in record["messages"])


@pytest.mark.parametrize("name", ["train", "eval"])
def test_answers_are_prose_of_bounded_length(data: ModuleType, splits: dict[str, Records], name: str) -> None:
    """An answer is one line that ends a sentence, without examples or markup, long enough that its end-of-turn is
    far below a tenth of what is learnt (a word is at least a token)."""
    texts = answers(splits[name])

    assert all(text.endswith((".", "!", "?")) for text in texts)
    assert not any(mark in text for text in texts for mark in ("\n", ">>>", "::", "``", ":func:", " .. "))
    assert all(len(text) <= data.LONGEST_PROSE + 150 for text in texts)
    assert min(len(text.split()) for text in texts) >= 10
    assert len(texts) <= 0.1 * sum(len(text.split()) for text in texts)


def test_the_questions_are_worded_in_several_ways(splits: dict[str, Records]) -> None:
    """Every wording is used for at least a tenth of the questions."""
    questions = [record["messages"][0]["content"] for record in splits["train"]]
    wordings = [question.split("`")[0] for question in questions]

    assert all(wordings.count(wording) >= 0.1 * len(wordings) for wording in set(wordings))
    assert len(set(wordings)) == 4


def test_the_same_python_writes_the_same_bytes(data: ModuleType, folder: Path, tmp_path: Path) -> None:
    """Another process, with another hash seed, writes the same files and leaves nothing else."""
    data.write_data(tmp_path / "again")

    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["eval.jsonl", "train.jsonl"]
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


SENTENCE = "Return every element of the first list that is not an element of the second list either."


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        pytest.param(SENTENCE, SENTENCE, id="prose stays"),
        pytest.param(f"f(x[, y]) -> z\n\n{SENTENCE}", SENTENCE, id="a signature above goes"),
        pytest.param(f"f(x) -> y\n{SENTENCE}", SENTENCE, id="a signature on the line above goes"),
        pytest.param(f"{SENTENCE}\n\n>>> f(1)\n2", SENTENCE, id="an example goes"),
        pytest.param(f"{SENTENCE}\n\n.. note:: mind", SENTENCE, id="a directive goes"),
        pytest.param(f"{SENTENCE}\n\n  - one thing.\n  - another.", SENTENCE, id="a list goes"),
        pytest.param(f"{SENTENCE} And then it", SENTENCE, id="an unfinished sentence goes"),
        pytest.param(SENTENCE.replace("every", "every\n   "), SENTENCE, id="lines are joined"),
        pytest.param(
            SENTENCE.replace("list", ":class:`~m.list`"),
            SENTENCE.replace("list", "`m.list`"),
            id="roles are names",
        ),
        pytest.param(
            SENTENCE.replace("list", "``list``"), SENTENCE.replace("list", "`list`"), id="literals are names"
        ),
        pytest.param("Return it.", None, id="too short"),
        pytest.param(f"\u00c4 {SENTENCE}", None, id="not ASCII"),
        pytest.param("", None, id="empty"),
        pytest.param("f(x) -> y", None, id="only a signature"),
    ],
)
def test_prose_is_what_a_docstring_says_in_words(
    data: ModuleType, docstring: str, expected: str | None
) -> None:
    """Only whole sentences of leading prose are kept."""
    assert data.prose(docstring) == expected


def test_prose_is_cut_at_the_last_sentence_that_fits(data: ModuleType) -> None:
    """Whole sentences are kept up to the longest length."""
    text = data.prose(" ".join([SENTENCE] * 5), longest=2 * len(SENTENCE) + 10)

    assert text == f"{SENTENCE} {SENTENCE}"


def test_sources_are_read_and_never_imported(data: ModuleType, tmp_path: Path) -> None:
    """A module that would fail when imported gives its docstrings, with what each of them describes."""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(
        '"""Module."""\nraise SystemExit\n'
        'class C:\n    """Class."""\n'
        '    def m(self):\n        """Method."""\n'
        '    @property\n    def p(self):\n        """Property."""\n'
        '    def _hidden(self):\n        """Hidden."""\n'
        'def f():\n    """Function."""\n'
        "def undocumented(): ...\n"
    )
    (tmp_path / "pkg" / "_private.py").write_text('"""Private."""')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "support.py").write_text('"""Skipped."""')

    found = [tuple(document) for document in data.from_sources(tmp_path)]

    assert found == [
        ("pkg", "module", "", "Module."),
        ("pkg.C", "class", "module", "Class."),
        ("pkg.C.m", "method", "class", "Method."),
        ("pkg.C.p", "attribute", "class", "Property."),
        ("pkg.f", "function", "module", "Function."),
    ]


def test_compiled_modules_are_asked_for_their_docstrings(data: ModuleType) -> None:
    """Built-in classes, methods and functions are found under the module's name; what is imported into it is not."""
    import itertools
    import socket

    kinds = {document.name: document.kind for document in data.from_compiled(itertools)}

    assert kinds["itertools.chain"] == "class"
    assert kinds["itertools.chain.from_iterable"] == "method"
    assert not any(".IntEnum" in document.name for document in data.from_compiled(socket))


@pytest.mark.parametrize(
    ("name", "kind", "owner", "expected"),
    [
        ("json", "module", "", "`json` is a module of Python's standard library. Text."),
        ("json.dump", "function", "module", "`dump` is a function of the module `json`. Text."),
        ("a.B.c", "attribute", "class", "`c` is an attribute of the class `a.B`. Text."),
    ],
    ids=["module", "function", "attribute"],
)
def test_an_answer_opens_with_what_it_is_about(
    data: ModuleType, name: str, kind: str, owner: str, expected: str
) -> None:
    """Before the prose comes what kind of thing it is and where it belongs."""
    assert data.answer(data.Document(name, kind, owner, "Text.")) == expected
